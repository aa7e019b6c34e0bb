"""The pretraining stage."""

from collections.abc import Callable

from vitlit.model import ViT
from vitlit.objectives import Objective
from vitlit.optim import Groups, OptimizerFactory, Schedule
from vitlit.stages.stage import Stage


class Pretrain(Stage):
    """Train a ViT from its initialisation on an objective.

    Args:
        vit: the headless ViT; the objective gives it a head if it needs one.
        objective: makes the objective from the ViT, such as partial(Supervised, num_classes=10).
        optimizer: makes the optimizer from parameter groups, such as partial(AdamW, lr=1e-3); its lr is the peak.
        schedule: the learning rate by optimiser step.
        groups: how learning rate and weight decay differ between parameters.
    """

    def __init__(
        self,
        vit: ViT,
        objective: Callable[[ViT], Objective],
        optimizer: OptimizerFactory,
        schedule: Schedule = Schedule(),
        groups: Groups = Groups(),
    ) -> None:
        super().__init__(vit, objective, optimizer, schedule, groups)
