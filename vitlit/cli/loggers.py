"""The loggers of a run: W&B unless the config says otherwise, and always metrics.csv."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.loggers.logger import Logger

from vitlit.errors import UserError
from vitlit.loggers import CSV, Wandb
from vitlit.run.folder import RunFolder
from vitlit.run.interrupt import Interrupted


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
    for logger in loggers:
        harmless(logger)
    return [*loggers, CSV(folder.path)]


METHODS = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint")


def harmless(logger: Any) -> None:
    """Make a logger's first failure in training a warning, after which it is left out: metrics.csv has the numbers."""
    failed: list[Exception] = []

    def guard(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if failed:
                return None
            try:
                return method(*args, **kwargs)
            except (UserError, Interrupted):  # a mistake in its settings, or a signal
                raise
            except Exception as error:
                failed.append(error)
                name, why = type(logger).__name__, " ".join(f"{type(error).__name__}: {error}".split())
                print(f"vitlit: warning: {name} failed ({why}) and is left out from here", flush=True)

        return guarded

    for name in (*METHODS, "log_config", "log_classes", "log_mistakes", "close"):
        if hasattr(type(logger), name):
            setattr(logger, name, guard(getattr(logger, name)))


def keep_wandb_id(loggers: list[Logger], folder: RunFolder) -> None:
    """Remember the W&B run in the run's folder, so that it is continued with it; for rank 0."""
    for logger in loggers:
        if isinstance(logger, Wandb):
            folder.keep_wandb_id(str(logger.version))
