"""What a ViT is asked to learn, one idea a file. Torch only."""

from vitlit.objectives.distillation import Distillation
from vitlit.objectives.objective import Objective, Step
from vitlit.objectives.supervised import Supervised

__all__ = ["Distillation", "Objective", "Step", "Supervised"]
