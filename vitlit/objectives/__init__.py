"""What a ViT learns, one idea per file. Torch only."""

from vitlit.objectives.distillation import Distillation
from vitlit.objectives.mae import MAE
from vitlit.objectives.objective import Batch, Objective, Step
from vitlit.objectives.regression import Regression
from vitlit.objectives.supervised import Supervised

__all__ = ["MAE", "Batch", "Distillation", "Objective", "Regression", "Step", "Supervised"]
