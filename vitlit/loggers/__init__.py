"""Loggers of a run. Imported lazily: `vitlit doctor` needs the mode of W&B, but not Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitlit.loggers.metrics_csv import CSV
    from vitlit.loggers.mlflow import MLflow
    from vitlit.loggers.tensorboard import TensorBoard
    from vitlit.loggers.trackio import Trackio
    from vitlit.loggers.wandb import Wandb

__all__ = ["CSV", "MLflow", "TensorBoard", "Trackio", "Wandb"]
MODULES = {"CSV": "metrics_csv", "MLflow": "mlflow", "TensorBoard": "tensorboard", "Trackio": "trackio"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"vitlit.loggers.{MODULES.get(name, 'wandb')}"), name)
    raise AttributeError(f"module 'vitlit.loggers' has no attribute {name!r}")
