"""What a ViT is asked to learn, one idea a file. Torch only."""

from vitlit.objectives.distillation import Distillation
from vitlit.objectives.objective import Batch, Objective, Step
from vitlit.objectives.supervised import Supervised

__all__ = ["Batch", "Distillation", "Objective", "Step", "Supervised"]
