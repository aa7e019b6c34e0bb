"""What a ViT is asked to learn: a batch in, a `Step` out."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor, nn

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
        soft_targets: whether labels may be (B, classes) shares, as mixup and cutmix make them.
        multi_label: whether an image may have several classes.
    """

    soft_targets = False
    multi_label = False

    def __init__(self, vit: ViT) -> None:
        super().__init__()

    def prepare(self, data: Any) -> None:
        """Called with the data module, None where there is none, before training and perhaps earlier besides."""

    @abstractmethod
    def forward(self, vit: ViT, batch: Any) -> Step:
        """Compute the loss of a batch (images (B, C, H, W), labels (B,) or (B, classes), ...)."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """Class probabilities (B, classes), float32, of logits."""
        return logits.float().softmax(-1)
