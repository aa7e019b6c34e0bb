"""What accompanies a run: progress, mistakes, predictions."""

import csv
import os
import time
from errno import EISDIR
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor

from vitlit.data.index import Index
from vitlit.errors import UserError
from vitlit.loggers import CSV, Mistake, Wandb
from vitlit.optim import table


class Tracking(Callback):
    """Print the parameter groups, tell the loggers what the run is, and forget rows that will be logged again.

    Args:
        config: the resolved config.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            print(table(trainer.optimizers[0]), flush=True)
        for logger in trainer.loggers:
            if isinstance(logger, CSV):
                logger.cut(trainer.global_step - 1)  # Lightning counts from 0
            elif isinstance(logger, Wandb):
                logger.log_config(self.config)
                logger.log_classes(getattr(trainer.datamodule, "classes", []))  # type: ignore[attr-defined]


class Mistakes(Callback):
    """At the end of a run, log the last validation's confusion matrix and worst mistakes to W&B.

    Args:
        worst: how many mistakes, those with the highest probability for the wrong class.
    """

    def __init__(self, worst: int = 32) -> None:
        self.worst = worst
        self._rows: list[Tensor] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rows.clear()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if outputs is not None and len(batch) > 2 and batch[1].ndim == 1:  # not with several classes an image
            _, labels, indices = batch
            probability, prediction = outputs["probabilities"].max(-1)
            columns = (indices, labels, prediction, probability)
            self._rows.append(torch.stack([column.cpu().double() for column in columns], 1))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = torch.cat(gather(trainer, self._rows) or [torch.empty(0, 4)])
        loggers = [logger for logger in trainer.loggers if isinstance(logger, Wandb)]
        if not trainer.is_global_zero or not loggers or not len(rows):
            return
        rows = rows[rows[:, 0].argsort()]
        wrong = rows[rows[:, 1] != rows[:, 2]]
        wrong = wrong[wrong[:, 3].argsort(descending=True, stable=True)][: self.worst]
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        index = data.split("val")
        worst = [Mistake(index.path(int(i)), int(label), int(guess), p) for i, label, guess, p in wrong.tolist()]
        for logger in loggers:
            logger.log_mistakes(data.classes, rows[:, 1].int().tolist(), rows[:, 2].int().tolist(), worst)


class Predictions(Callback):
    """Write class probabilities as CSV: path, class, probability, then the next four classes of the top five.

    Args:
        out: the file.
        index: the images that are predicted.
        classes: names in the order of the probabilities.

    Raises:
        UserError: there is a folder of the file's name.
    """

    def __init__(self, out: Path, index: Index, classes: list[str]) -> None:
        if out.is_dir():
            raise UserError(f"cannot write {out}: {os.strerror(EISDIR)}; give another --out")
        self.out, self.index, self.classes = out, index, classes
        self.written = 0
        self._partial = out.with_name(out.name + ".partial")
        self._rows: list[Tensor] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            try:
                self.out.parent.mkdir(parents=True, exist_ok=True)
                self._partial.touch()
            except OSError as error:
                raise UserError(f"cannot write {self.out}: {error.strerror}; give another --out") from error

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.is_global_zero:
            self._partial.unlink(missing_ok=True)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        probabilities, classes = outputs.cpu().topk(min(5, outputs.shape[-1]))
        rows = torch.stack([classes.double(), probabilities.double()], -1).flatten(1)
        self._rows.append(torch.cat([batch[2].cpu().double()[:, None], rows], 1))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = torch.cat(gather(trainer, self._rows))
        if not trainer.is_global_zero:
            return
        rows = rows[rows[:, 0].argsort()]
        rows = rows[rows[:, 0] >= 0]  # data.on_bad_image skip leaves others out
        self.written = len(rows)
        head = ["path", "class", "probability"]
        head += [f"{name}_{k}" for k in range(2, rows.shape[1] // 2 + 1) for name in ("class", "probability")]
        with self._partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            table = csv.writer(file)
            table.writerow(head)
            for index, *pairs in rows.tolist():
                cells = [self.classes[int(v)] if i % 2 == 0 else f"{v:.6f}" for i, v in enumerate(pairs)]
                table.writerow([self.index.path(int(index)), *cells])
        os.replace(self._partial, self.out)


def gather(trainer: Trainer, rows: list[Tensor]) -> list[Tensor]:
    """The rows of every rank, on every rank."""
    if trainer.world_size == 1:
        return rows
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, rows)
    return [part for rank in gathered for part in rank]


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
