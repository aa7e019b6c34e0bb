"""The confusion matrix and the worst mistakes of the last validation."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from vitlit.callbacks.predictions import gather
from vitlit.loggers import Mistake, Wandb

WORST = 32


class Mistakes(Callback):
    """At the end of a run, log to W&B the last validation's confusion matrix and its WORST most confident mistakes."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rows.clear()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        if outputs is not None and batch.labels.ndim == 1:  # one class an image
            probability, prediction = outputs["probabilities"].max(-1)
            columns = (batch.indices, batch.labels, prediction, probability)
            self._rows.append(torch.stack([column.cpu().double() for column in columns], 1))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = gather(trainer, self._rows)
        loggers = [logger for logger in trainer.loggers if isinstance(logger, Wandb)]
        if not trainer.is_global_zero or not loggers or not len(rows):
            return
        wrong = rows[rows[:, 1] != rows[:, 2]]
        wrong = wrong[wrong[:, 3].argsort(descending=True, stable=True)][:WORST]
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        index = data.split("val")
        worst = [Mistake(index.path(int(i)), int(label), int(guess), p) for i, label, guess, p in wrong.tolist()]
        for logger in loggers:
            logger.log_mistakes(data.classes, rows[:, 1].int().tolist(), rows[:, 2].int().tolist(), worst)
