"""What a ViT learns, one idea per file. Torch only."""

from vitlit.objectives.dino import DINO
from vitlit.objectives.distillation import Distillation
from vitlit.objectives.lejepa import LeJEPA
from vitlit.objectives.mae import MAE
from vitlit.objectives.masked_patch import MaskedPatch
from vitlit.objectives.objective import Batch, Objective, Step
from vitlit.objectives.regression import Regression
from vitlit.objectives.supervised import Supervised

__all__ = ["DINO", "MAE", "Batch", "Distillation", "LeJEPA", "MaskedPatch", "Objective", "Regression", "Step"]
__all__ += ["Supervised"]
