"""The checkpoints of a run: written whole or not at all, and only of weights that are numbers."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from vitlit.errors import UserError
from vitlit.files import whole_file

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"


class Files(TorchCheckpointIO):
    """Writes a checkpoint beside its place and puts it there when it is on the disk, so that a kill leaves the old one.

    torch.save notes a CRC-32 of all that it writes, which vitlit.files.check_archive compares. A last.ckpt that
    is written over is kept as previous.ckpt.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            UserError: it cannot be written, as where the disk is full; what was there before is whole.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as partial:
                with partial.open("wb") as file:
                    torch.save(checkpoint, file)
                if path.name == LAST and path.exists():
                    link(path, path.with_name(PREVIOUS))
        except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
            reason = cause(error)
            if reason is None:
                raise
            raise UserError(
                f"cannot write {path}: {reason}; the checkpoints before it are whole, and the same command continues "
                "from there once there is room"
            ) from error


def cause(error: BaseException) -> str | None:
    """What the operating system says, at the bottom of a failed write; None where it says nothing."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen.strerror or str(seen)
        seen = seen.__cause__ or seen.__context__
    return None


def link(path: Path, other: Path) -> None:
    """Give a file a second name in the place of what had it; a copy where the file system has no links."""
    with whole_file(other) as partial:
        partial.unlink(missing_ok=True)
        try:
            os.link(path, partial)
        except OSError:
            shutil.copyfile(path, partial)


class Best(ModelCheckpoint):
    """Keep the weights with the best metric in `folder`/best.ckpt, also where the folder was moved meanwhile.

    Args:
        folder: of the checkpoints.
        monitor: the metric; the lowest is best of a loss, else the highest.
    """

    def __init__(self, folder: Path, monitor: str) -> None:
        mode = "min" if monitor.endswith("loss") else "max"
        super().__init__(folder, "best", monitor, mode=mode, enable_version_counter=False, save_weights_only=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        here = str(Path(str(self.dirpath)) / BEST)  # Lightning forgets the best score of another folder
        moved = {"dirpath": self.dirpath, "best_model_path": here, "kth_best_model_path": here}
        kept = dict(zip([here], state_dict["best_k_models"].values(), strict=False))
        super().load_state_dict({**state_dict, **moved, "best_k_models": kept})


class Last(Checkpoint):
    """Keep last.ckpt, from which a run is continued: at the end of every epoch, and whenever `save` is called.

    Args:
        folder: of the checkpoints.
        keep_every: optimiser steps between the checkpoints that are kept for good, as step-N.ckpt; None for none.
    """

    def __init__(self, folder: Path, keep_every: int | None = None) -> None:
        self.path, self.keep_every = folder / LAST, keep_every
        self.saved_at = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether the checkpoint of a step is to be kept for good."""
        return self.keep_every is not None and step > 0 and step % self.keep_every == 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write last.ckpt, on every rank at once.

        Raises:
            UserError: the file cannot be written.
        """
        trainer.save_checkpoint(self.path)
        if trainer.is_global_zero and self.due(trainer.global_step):
            link(self.path, self.path.with_name(f"step-{trainer.global_step}.ckpt"))
        self.saved_at = time.monotonic()
