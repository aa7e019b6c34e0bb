"""The parameter groups printed, and the loggers prepared, as training starts."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from vitlit.loggers import CSV, Wandb
from vitlit.optim import table


class Tracking(Callback):
    """Print the parameter groups, log the resolved config and class names, and drop rows that will be logged again."""

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
