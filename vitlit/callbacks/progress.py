"""Progress on a terminal and in a log."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class Bar(RichProgressBar):
    """Lightning's progress bar with loss, accuracy and images/s."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return progress(trainer)


class Lines(Callback):
    """Progress where there is no terminal: a plain line a minute, the first after five seconds, and one at the end."""

    def __init__(self) -> None:
        self._last = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = time.monotonic() - 55  # a first sign of life after five seconds

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() - self._last >= 60:
            self._print(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            last = trainer.global_step >= trainer.estimated_stepping_batches
            if last or time.monotonic() - self._last >= 60:
                self._print(trainer)

    def _print(self, trainer: Trainer) -> None:
        self._last = time.monotonic()
        if trainer.is_global_zero:
            metrics = "  ".join(f"{name} {value}" for name, value in progress(trainer).items())
            print(f"step {trainer.global_step:,} of {trainer.estimated_stepping_batches:,}  {metrics}", flush=True)


def progress(trainer: Trainer) -> dict[str, str]:
    """The figures that a user watches, as they are printed."""
    metrics = trainer.progress_bar_metrics
    shown = {}
    if "train/loss" in metrics:
        shown["loss"] = f"{metrics['train/loss']:.4f}"
    for name, title in (("top1", "top-1"), ("map", "mAP")):
        if f"val/{name}" in metrics:
            shown[title] = f"{100 * float(metrics[f'val/{name}']):.2f} %"
    if "train/images_per_second" in metrics:
        shown["images/s"] = f"{float(metrics['train/images_per_second']):,.0f}"
    if "train/data_wait" in metrics:
        shown["data wait"] = f"{100 * float(metrics['train/data_wait']):.0f} %"
    return shown
