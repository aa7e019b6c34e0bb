"""Loggers whose failure does not end a training."""

from collections.abc import Callable
from functools import partial
from typing import Any

from vitlit.errors import UserError
from vitlit.run.interrupt import Interrupted

METHODS = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint")
OURS = ("log_config", "log_classes", "log_mistakes", "log_image", "close")  # Wandb's further ones


def harmless(logger: Any) -> Any:
    """A logger whose first failure is a warning, after which it is left out: metrics.csv has the numbers."""
    failed: list[Exception] = []

    def guarded(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
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

    for name in (*METHODS, *OURS):
        if hasattr(logger, name):
            setattr(logger, name, partial(guarded, getattr(logger, name)))
    return logger
