"""Progress on a terminal and in a log."""

import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

# Metrics to show: their titles, and how their values are scaled and formatted.
FIGURES = {
    "train/loss": ("loss", 1, "{:.4f}"),
    "val/top1": ("top-1", 100, "{:.2f} %"),
    "val/map": ("mAP", 100, "{:.2f} %"),
    "val/knn": ("kNN", 100, "{:.2f} %"),
    "train/images_per_second": ("images/s", 1, "{:,.0f}"),
    "train/data_wait": ("data wait", 100, "{:.0f} %"),
    "train/mfu": ("MFU", 100, "{:.1f} %"),
    "train/memory_gib": ("memory", 1, "{:.1f} GiB"),
}


class Bar(RichProgressBar):
    """Lightning's progress bar with loss, accuracy and images/s, drawn ten times a second and not at every step."""

    _drawn = 0.0

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        if trainer.is_last_batch or time.monotonic() - self._drawn >= 0.1:
            self._drawn = time.monotonic()
            super().on_train_batch_end(trainer, *arguments)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return progress(trainer)


class Lines(Callback):
    """Progress without a terminal: a line a minute, the first after five seconds, and one at the end."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began, self._from = time.monotonic(), trainer.global_step
        self._last = self._began - 55

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if time.monotonic() - self._last >= 60:
            self._print(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print(trainer, ended=True)

    def _print(self, trainer: Trainer, ended: bool = False) -> None:
        self._last = time.monotonic()
        if not trainer.is_global_zero:
            return
        step, end = trainer.global_step, int(trainer.estimated_stepping_batches)
        parts = [f"epoch {trainer.fit_loop.epoch_progress.current.ready:,}", f"step {step:,} of {end:,}"]
        if self._from < step < end and not ended:
            left = (self._last - self._began) / (step - self._from) * (end - step)
            parts.append(f"{timedelta(seconds=round(left))} left")
        print("  ".join([*parts, *(f"{name} {value}" for name, value in progress(trainer).items())]), flush=True)


def progress(trainer: Trainer) -> dict[str, str]:
    """The figures to watch, formatted; none of the sanity check, which sees a part of the images."""
    metrics = {} if trainer.sanity_checking else trainer.progress_bar_metrics
    return {
        title: text.format(scale * float(metrics[name]))
        for name, (title, scale, text) in FIGURES.items()
        if name in metrics
    }
