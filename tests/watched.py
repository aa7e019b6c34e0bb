"""Trainings of which every step is watched, except the steps that log: the recipes, and what runs them."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from small_stage import TINY
from torch.optim import AdamW

from vitlit.callbacks import EMA, Bar, NonFinite, Throughput
from vitlit.data import ImageFolderData
from vitlit.data.erasing import Erasing
from vitlit.data.mixing import Mixing
from vitlit.model import ViT
from vitlit.objectives import MAE, Distillation, Supervised
from vitlit.optim import LAMB, Groups, Muon, Schedule
from vitlit.run.checkpoints import Best, Last
from vitlit.run.interrupt import Interrupt
from vitlit.stages import Finetune, Pretrain, Stage
from vitlit.weights import save_weights

EVERY = 3  # steps between those that log


class Enough(Exception):
    """The last watched step is over."""


def supervised(folder: Path) -> Stage:
    return Pretrain(
        ViT(**TINY, dropout=0.1, attention_dropout=0.1, drop_path=0.2),
        partial(Supervised, num_classes=4, label_smoothing=0.1),
        partial(AdamW, lr=1e-3, weight_decay=0.1),
        Schedule(3),
    )


def masked(folder: Path) -> Stage:
    decoder: dict[str, Any] = {"mask_ratio": 0.5, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    return Pretrain(ViT(**TINY, position="rope"), partial(MAE, **decoder), partial(LAMB, lr=1e-3))


def distilled(folder: Path) -> Stage:
    with torch.device("cpu"):
        save_weights(ViT(**TINY, num_classes=4), folder / "teacher.safetensors")
    return Finetune(
        vit=ViT(**TINY, distilled=True, drop_path=0.5, drop_path_subset=True, patch_dropout=0.5),
        num_classes=4,
        objective=partial(Distillation, teacher=str(folder / "teacher.safetensors")),
        optimizer=partial(Muon, lr=0.01),
        groups=Groups(layer_decay=0.75),
    )


MIXED = {"mixing": Mixing(mixup=0.8, cutmix=1.0), "erasing": Erasing(1.0, fill="mean"), "micro_batch": 4}
RECIPES: dict[str, tuple[Callable[[Path], Stage], dict[str, Any], dict[str, Any]]] = {
    # stage, options of the data, options of the Trainer
    "supervised": (supervised, MIXED, {"callbacks": [EMA(0.9)], "gradient_clip_val": 1.0}),
    "mae": (masked, {}, {}),
    "distillation": (distilled, {"repeats": 2}, {"gradient_clip_val": 0.5}),
}


class Watched(ImageFolderData):
    """Data that begins to watch when it is asked for a step's first batch."""

    watch: Callable[[bool], None]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        assert self.trainer is not None
        self.watch(self.trainer.global_step >= EVERY)  # by then everything is in place
        return super().on_before_batch_transfer(batch, dataloader_idx)


class Relax(Callback):
    """Ends the watch when a step begins that will be logged, and the training after some steps."""

    def __init__(self, watch: Callable[[bool], None], steps: int) -> None:
        self.watch, self.steps = watch, steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.steps:
            self.watch(False)
            raise Enough
        if (trainer.global_step + 1) % EVERY == 0 or trainer.is_last_batch:
            self.watch(False)


def run(
    recipe: str, stage: Stage, data: Watched, folder: Path, watch: Callable[[bool], None], steps: int, **options: Any
) -> None:
    """Train a recipe for some steps with all that `vitlit fit` would let run in them."""
    training = RECIPES[recipe][2]
    data.watch = watch
    last = Last(folder)
    own = [Interrupt(last, None, 1e6), Best(folder, "val/loss", "min"), last, Bar(), NonFinite(), Throughput()]
    callbacks = [Relax(watch, steps), *own, *training.get("callbacks", [])]
    trainer = Trainer(
        logger=False,
        enable_model_summary=False,
        max_epochs=1000,
        limit_val_batches=0,
        log_every_n_steps=EVERY,
        **{**training, **options, "callbacks": callbacks},
    )
    try:
        trainer.fit(stage, data)
    except Enough:
        return
    raise AssertionError("the training ended before the watch")


def data(recipe: str, root: Path, **options: Any) -> Watched:
    plain = {"image_size": 16, "batch_size": 8, "num_workers": 0}
    return Watched(str(root), **{**plain, **RECIPES[recipe][1], **options})


def on_gpu(recipe: str, root: str, folder: str) -> None:
    """75 steps; in the two of three that do not log, whatever waits for the GPU is an error."""

    def watch(on: bool) -> None:
        torch.cuda.set_sync_debug_mode("error" if on else "default")

    erasing = {"erasing": Erasing(1.0)} if "erasing" in RECIPES[recipe][1] else {}
    images = data(recipe, Path(root), **{**erasing, "num_workers": 2})
    run(
        recipe,
        RECIPES[recipe][0](Path(folder)),
        images,
        Path(folder),
        watch,
        EVERY + 75,
        accelerator="gpu",
        devices=1,
        precision="bf16-mixed",
    )


if __name__ == "__main__":
    on_gpu(*sys.argv[1:])
