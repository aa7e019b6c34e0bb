"""Classification with softmax cross entropy."""

from typing import Any, Literal

from torch.nn import functional as F

from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.objectives.objective import Objective, Step


class Supervised(Objective):
    """Softmax cross entropy on labels (2010.11929, section 3.1).

    Args:
        vit: the headless ViT; it is given its head here.
        num_classes: the command line fills it from the data.
        head: pretrain is Linear, tanh, Linear; finetune is one zero-initialised Linear.
        hidden_dim: hidden units of the pretraining head; the ViT's width unless given.
    """

    def __init__(
        self,
        vit: ViT,
        num_classes: int | None = None,
        head: Literal["pretrain", "finetune"] = "pretrain",
        hidden_dim: int | None = None,
    ) -> None:
        super().__init__(vit)
        if num_classes is None or num_classes < 2:
            raise UserError(f"a supervised objective needs num_classes of at least 2, not {num_classes}")
        vit.set_head(head, num_classes, hidden_dim)

    def forward(self, vit: ViT, batch: Any) -> Step:
        images, labels, *_ = batch
        logits = vit(images)
        return Step(F.cross_entropy(logits, labels), logits)
