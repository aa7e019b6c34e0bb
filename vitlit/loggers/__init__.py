"""Where the numbers of a run go."""

from vitlit.loggers.metrics_csv import CSV
from vitlit.loggers.wandb import Mistake, Wandb, confusion_rows

__all__ = ["CSV", "Mistake", "Wandb", "confusion_rows"]
