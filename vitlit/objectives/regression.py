"""Learning numbers."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitlit.errors import UserError, check_types
from vitlit.model import ViT
from vitlit.objectives.objective import Batch, Objective, Step, at_least_float32


class Regression(Objective):
    """Predict a number for each image, such as an age or a score, with a head of one output.

    The head learns labels standardised by the mean and standard deviation of the training labels, in whose units the
    loss is. The metrics mae and r2, predictions, and what `vitlit.load` gives are in the units of the labels. An
    unknown loss raises UserError, and so do labels that are all equal, before training.

    Args:
        vit: the headless ViT; it gets its head here.
        loss: squared is the mean squared error, absolute the mean absolute one, which outliers move less.
    """

    needs_labels = numbers = True

    def __init__(self, vit: ViT, loss: Literal["squared", "absolute"] = "squared") -> None:
        super().__init__(vit)
        check_types(Regression.__init__, locals(), "model.objective.")
        vit.set_head("finetune", 1)
        self.loss = loss
        self.label_mean = nn.Buffer(torch.zeros(()))  # `vitlit.load` reads both
        self.label_std = nn.Buffer(torch.ones(()))

    def metrics(self) -> dict[str, Any]:
        return {"mae": 1, "r2": 1}

    def predictions(self, logits: Tensor) -> Tensor:
        """Numbers (B,), float32, in the units of the labels."""
        return logits.float()[:, 0] * self.label_std + self.label_mean

    def prepare(self, data: Any) -> None:
        """Measure the training labels; without a data module they are learnt as they are."""
        if not getattr(data, "numbers", False):
            return
        std, mean = torch.std_mean(torch.as_tensor(data.split("train").labels), correction=0)
        if not std > 0:
            raise UserError(f"every training label is {mean:g}; there is nothing to learn")
        self.label_mean.copy_(mean)
        self.label_std.copy_(std)

    def forward(self, vit: ViT, batch: Batch, progress: float) -> Step:
        if batch.labels.ndim != 1:
            raise UserError(f"Regression learns one number an image, not labels {list(batch.labels.shape)}")
        logits, features = vit.outputs(batch.views[0])
        logits = at_least_float32(logits)
        targets = (batch.labels - self.label_mean) / self.label_std
        error = F.mse_loss if self.loss == "squared" else F.l1_loss
        loss = error(logits[:, 0], targets.to(logits.dtype))
        return Step(loss, self.predictions(logits), {}, features.detach())
