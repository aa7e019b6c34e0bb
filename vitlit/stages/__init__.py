"""How a ViT is trained: the two LightningModules."""

from vitlit.stages.finetune import Finetune
from vitlit.stages.pretrain import Pretrain
from vitlit.stages.stage import Stage

__all__ = ["Finetune", "Pretrain", "Stage"]
