"""The loggers of a run: W&B unless the config says otherwise, and always metrics.csv."""

from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.loggers.logger import Logger

from vitlit.loggers import CSV, Wandb
from vitlit.run.folder import RunFolder


def fill_loggers(config: Namespace, folder: RunFolder) -> None:
    """Make W&B loggers (one unless the config says otherwise) keep their files in the run's folder."""
    trainer = config.trainer
    if trainer.logger in (None, True):
        trainer.logger = Namespace(class_path="vitlit.loggers.Wandb", init_args=Namespace())
    for logger in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
        if logger and logger.class_path.endswith(".Wandb"):
            options = logger.init_args
            options.save_dir = options.get("save_dir") or str(folder.path)
            options.name = options.get("name") or folder.name
            options.id = options.get("id") or (folder.wandb_id() if config.ckpt_path else None)


def run_loggers(given: Any, folder: RunFolder) -> list[Logger]:
    """The loggers that a config gave, and the run's own."""
    loggers = given if isinstance(given, list) else [given] if given else []
    return [*loggers, CSV(folder.path)]


def keep_wandb_id(loggers: list[Logger], folder: RunFolder) -> None:
    """Remember the W&B run in the run's folder, so that it is continued with it; for rank 0."""
    for logger in loggers:
        if isinstance(logger, Wandb):
            folder.keep_wandb_id(str(logger.version))
