"""What accompanies a run: stopping in good order, progress, mistakes, predictions."""

import csv
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor

from vitlit.data.folder import Index
from vitlit.loggers import CSV, Mistake, Wandb


class Interrupted(Exception):
    """A signal ended the run after a checkpoint was saved.

    Attributes:
        signal: its number; the process exits with 128 + signal.
    """

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}")
        self.signal = signal_number


class Interrupt(Callback):
    """On SIGTERM or SIGINT finish the step, save `checkpoint` and raise Interrupted on every rank.

    It replaces Lightning's handling, which saves nothing, exits 0, and hangs where one rank alone is signalled. A
    second SIGINT stops at once.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.received = 0
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if trainer.strategy.reduce_boolean_decision(self.received != 0, all=False):
            trainer.save_checkpoint(self.checkpoint)
            raise Interrupted(self.received or signal.SIGTERM, trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


class Tracking(Callback):
    """Tell the loggers what the run is, and forget the rows that a continued run will log again.

    Args:
        config: the resolved config.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
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
        if outputs is not None and len(batch) > 2:
            _, labels, indices = batch
            probability, prediction = outputs["probabilities"].max(-1)
            rows = torch.stack([indices.double(), labels.double(), prediction.double(), probability.double()], 1)
            self._rows.append(rows.cpu())

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
        worst = [Mistake(str(index.path(int(i))), int(label), int(guess), p) for i, label, guess, p in wrong.tolist()]
        for logger in loggers:
            logger.log_mistakes(data.classes, rows[:, 1].int().tolist(), rows[:, 2].int().tolist(), worst)


class Predictions(Callback):
    """Write class probabilities as CSV: path, class, probability, then the next four classes of the top five.

    Args:
        out: the file.
        index: the images that are predicted.
        classes: names in the order of the probabilities.
    """

    def __init__(self, out: Path, index: Index, classes: list[str]) -> None:
        self.out, self.index, self.classes = out, index, classes
        self._rows: list[Tensor] = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        probabilities, classes = outputs.topk(min(5, outputs.shape[-1]))
        rows = torch.stack([classes.double(), probabilities.double()], -1).flatten(1)
        self._rows.append(torch.cat([batch[2].double()[:, None], rows], 1).cpu())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = torch.cat(gather(trainer, self._rows))
        if not trainer.is_global_zero:
            return
        rows = rows[rows[:, 0].argsort()]
        head = ["path", "class", "probability"]
        head += [f"{name}_{k}" for k in range(2, rows.shape[1] // 2 + 1) for name in ("class", "probability")]
        self.out.parent.mkdir(parents=True, exist_ok=True)
        partial = self.out.with_name(self.out.name + ".partial")
        with partial.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(head)
            for index, *pairs in rows.tolist():
                cells = [self.classes[int(v)] if i % 2 == 0 else f"{v:.6f}" for i, v in enumerate(pairs)]
                table.writerow([self.index.path(int(index)), *cells])
        os.replace(partial, self.out)


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
    """Progress where there is no terminal: a plain line after a validation, at most one a minute."""

    def __init__(self) -> None:
        self._last = 0.0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or trainer.state.fn != "fit":
            return
        last = trainer.global_step >= trainer.estimated_stepping_batches
        if last or time.monotonic() - self._last >= 60:
            self._last = time.monotonic()
            metrics = "  ".join(f"{name} {value}" for name, value in progress(trainer).items())
            print(f"step {trainer.global_step:,} of {trainer.estimated_stepping_batches:,}  {metrics}", flush=True)


def progress(trainer: Trainer) -> dict[str, str]:
    """The figures that a user watches, as they are printed."""
    metrics = trainer.progress_bar_metrics
    shown = {}
    if "train/loss" in metrics:
        shown["loss"] = f"{metrics['train/loss']:.4f}"
    if "val/top1" in metrics:
        shown["top-1"] = f"{100 * float(metrics['val/top1']):.2f} %"
    if "train/images_per_second" in metrics:
        shown["images/s"] = f"{float(metrics['train/images_per_second']):,.0f}"
    return shown
