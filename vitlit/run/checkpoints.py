"""The checkpoints of a run: each is written whole or not at all."""

import os
import shutil
import time
from functools import cached_property
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
    """Writes a checkpoint whole or not at all, and keeps an overwritten last.ckpt as previous.ckpt."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as partial:
                with partial.open("wb") as file:
                    torch.save(checkpoint, file)
                if path.name == LAST and path.exists():
                    link(path, path.with_name(PREVIOUS))
        except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise UserError(f"cannot write {path}: {cause.strerror}; make room, the same command continues") from error


def link(path: Path, other: Path) -> None:
    """Give a file a second name, which may exist; a copy on a file system without links."""
    with whole_file(other) as partial:
        partial.unlink(missing_ok=True)
        try:
            os.link(path, partial)
        except OSError:
            shutil.copyfile(path, partial)


class Best(ModelCheckpoint):
    """Keep the weights with the best metric, of which `mode` is min or max, in FOLDER/best.ckpt, even if it moves."""

    def __init__(self, folder: Path, monitor: str, mode: str) -> None:
        super().__init__(folder, "best", monitor, mode=mode, enable_version_counter=False, save_weights_only=True)
        self.on_train_batch_end = None  # type: ignore[method-assign, assignment]  # no step saves, each would ask

    @cached_property
    def state_key(self) -> str:  # which Lightning composes from the arguments in every hook of every step
        return super().state_key

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        here = str(Path(str(self.dirpath)) / BEST)  # Lightning forgets the best score of another folder
        moved = {"dirpath": self.dirpath, "best_model_path": here, "kth_best_model_path": here}
        scores = dict(zip([here], state_dict["best_k_models"].values(), strict=False))
        super().load_state_dict({**state_dict, **moved, "best_k_models": scores})


class Last(Checkpoint):
    """Write FOLDER/last.ckpt, from which a run continues, every epoch; every `keep_every` steps also step-N.ckpt."""

    def __init__(self, folder: Path, keep_every: int | None = None) -> None:
        self.path, self.keep_every = folder / LAST, keep_every
        self.saved_at = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether a step's checkpoint is kept for good."""
        return self.keep_every is not None and step > 0 and step % self.keep_every == 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write last.ckpt; every rank must call it."""
        trainer.save_checkpoint(self.path)
        if trainer.is_global_zero and self.due(trainer.global_step):
            link(self.path, self.path.with_name(f"step-{trainer.global_step}.ckpt"))
        self.saved_at = time.monotonic()
