"""What a ViT is asked to learn: a batch in, a `Step` out."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitlit.errors import UserError
from vitlit.model import ViT


class Batch(NamedTuple):
    """A batch of images, normalised and on the device.

    Attributes:
        views: one tensor of images (B, C, H, W) a view; plain training has one view.
        labels: class numbers (B,), int64, or shares of classes (B, classes), float. -1 where there are no labels.
        indices: positions of the images in their split, (B,), int64.
    """

    views: list[Tensor]
    labels: Tensor
    indices: Tensor

    @classmethod
    def of(cls, batch: Any) -> "Batch":
        """Of what a loader of one's own yields: images, (images, labels) or (images, labels, indices).

        Raises:
            UserError: it is none of these.
        """
        if isinstance(batch, Batch):
            return batch
        parts = [batch] if isinstance(batch, Tensor) else list(batch) if isinstance(batch, list | tuple) else []
        if not 1 <= len(parts) <= 3 or not all(isinstance(part, Tensor) for part in parts):
            raise UserError("a loader yields images, (images, labels) or (images, labels, indices), all tensors")
        images = parts[0]
        labels = parts[1] if len(parts) > 1 else torch.full((len(images),), -1, device=images.device)
        indices = parts[2] if len(parts) > 2 else torch.arange(len(images), device=images.device)
        return cls([images], labels, indices)


class Step(NamedTuple):
    """What an objective computes from one batch.

    Attributes:
        loss: the mean over the batch, a scalar.
        logits: (B, classes) from an objective that classifies, else None.
        logs: further scalars to log, by name.
        features: (B, D) pooled features of the first view, detached, where the objective has them; probes use them.
    """

    loss: Tensor
    logits: Tensor | None = None
    logs: dict[str, Tensor] = {}  # noqa: RUF012
    features: Tensor | None = None


class Objective(nn.Module, ABC):
    """Base class of the objectives.

    The constructor receives the headless ViT, to give it a head or to size parts of its own. It must not keep it:
    the stage owns the ViT and passes it at every call, so that a parameter has one name in a checkpoint.

    Attributes:
        views: how many views of an image a batch must have: exactly 1, or at least 2.
        needs_labels: whether every image must have a label.
    """

    views = 1
    needs_labels = False

    def __init__(self, vit: ViT) -> None:
        super().__init__()

    def prepare(self, data: Any) -> None:
        """Called once before training with the data module, None where training has none.

        Raises:
            UserError: the objective cannot learn from this data.
        """

    @abstractmethod
    def forward(self, vit: ViT, batch: Batch, progress: float) -> Step:
        """Compute the loss of a batch.

        Args:
            vit: that learns.
            batch: of training (`self.training`) or of validation.
            progress: the share of training that is done, step / total steps, in [0, 1), for schedules.
        """

    def after_step(self, vit: ViT, progress: float) -> None:
        """Called once after every optimiser step, as for a teacher that follows the ViT.

        Args:
            vit: with the weights of after the step.
            progress: of that step, as in `forward`.
        """
