"""What a ViT learns: a `Batch` in, a `Step` out."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitlit.errors import UserError
from vitlit.model import ViT


class Batch(NamedTuple):
    """A batch of images, normalised and on the device.

    Attributes:
        views: one tensor of images (B, C, H, W) per view; plain training has one view.
        labels: class numbers (B,), int64, shares of classes (B, classes), float, or numbers (B,), float32; -1 for none.
        indices: positions of the images in their split, (B,), int64.
        draws: what an objective's random draws for each image follow, (B,), int64: in training the row of the global
            batch, hashed with seed and step, so that they are the same on any number of devices; else the indices.
    """

    views: list[Tensor]
    labels: Tensor
    indices: Tensor
    draws: Tensor

    @classmethod
    def of(cls, batch: Any, first_draw: int = 0) -> "Batch":
        """A batch from any loader: images, (images, labels) or (images, labels, indices), else UserError.

        Its draws are the indices plus `first_draw`, which is to change from step to step of a training.
        """
        if isinstance(batch, Batch):
            return batch
        parts = list(batch) if isinstance(batch, list | tuple) else [batch]
        if not 1 <= len(parts) <= 3 or not all(isinstance(part, Tensor) for part in parts):
            raise UserError("a loader must yield images, (images, labels) or (images, labels, indices), all tensors")
        images = parts[0]
        labels = parts[1] if len(parts) > 1 else torch.full((len(images),), -1, device=images.device)
        indices = parts[2] if len(parts) > 2 else torch.arange(len(images), device=images.device)
        return cls([images], labels, indices, indices + first_draw)


class Step(NamedTuple):
    """What an objective computes from a batch.

    Attributes:
        loss: the mean over the batch, a scalar.
        logits: what `Objective.metrics` compare with the targets, such as (B, classes); None if nothing is compared.
        logs: further scalars by name, means over the batch: logged in training, validation and test.
        features: pooled features of the first view, (B, D), detached, for probes; outside of training of whole images.
        targets: what the logits should be, if not the batch's labels.
    """

    loss: Tensor
    logits: Tensor | None = None
    logs: dict[str, Tensor] = {}  # noqa: RUF012
    features: Tensor | None = None
    targets: Tensor | None = None


class Objective(nn.Module, ABC):
    """Base class of the objectives.

    The constructor receives the headless ViT, to give it a head or to size its own parts. It must not keep it: the
    stage owns the ViT and passes it to every call, so a parameter has one name in a checkpoint.

    Attributes:
        views: how many views of an image a batch must have: exactly 1, or at least 2.
        needs_labels: whether every image must have a label.
        numbers: whether labels are numbers, not classes.
        mixes: whether it learns from labels that data.mixing has mixed.
        loss_ranks: whether a lower val/loss means better weights; else best.ckpt is the last, unless more is measured.
        whole_batch: whether its loss is not a mean over images, so that gradients must not be accumulated.
        teacher: what `vitlit.load` makes the teacher of, if it learns from one.
    """

    views = 1
    needs_labels = numbers = mixes = whole_batch = False
    loss_ranks = True
    teacher: str | None = None

    def __init__(self, vit: ViT) -> None:
        super().__init__()

    def metrics(self) -> dict[str, Any]:
        """What validation and test measure besides loss and logs, by name, from a step's logits and targets.

        A value is a torchmetrics.Metric, or the number of outputs for vitlit's own: top1, top1_macro and top5 of logits
        (B, classes), map of several classes an image, mae and r2 of numbers (B,). best.ckpt follows the first.
        """
        return {}

    def predictions(self, logits: Tensor) -> Tensor | None:
        """The ViT's output as class probabilities (B, classes) or numbers (B,), float32; None if it is neither."""
        return None

    def set_teacher(self, teacher: ViT) -> None:
        """Receives the network that `teacher` names, before `prepare`."""

    def prepare(self, data: Any) -> None:
        """Called once before training with the data module or None; UserError if it cannot learn from this data."""

    @abstractmethod
    def forward(self, vit: ViT, batch: Batch, progress: float) -> Step:
        """The loss, in training or not; `progress` in [0, 1), a tensor with CUDA graphs, is step / total steps."""

    def collapse(self, logs: dict[str, float]) -> str:
        """What has collapsed by the logs of a step, in a training that has settled, and what to try; else empty."""
        return ""

    def pictures(self, vit: ViT, batch: Batch) -> dict[str, Tensor]:
        """Rows to draw below images, by name: (B, C, H, W), normalised alike, or maps in [0, 1], (B, rows, columns).

        Every rank calls it, without gradients.
        """
        return {}

    def begin(self, vit: ViT) -> None:
        """Called when the ViT has got the weights that a training starts from, e.g. to make a teacher of them."""

    def after_step(self, vit: ViT, progress: float) -> None:
        """Called after every optimiser step with the updated ViT and that step's progress, e.g. to move a teacher."""


def grouped(views: list[Tensor]) -> list[list[Tensor]]:
    """Views (B, C, H, W) by their size: first those of the first one's, the global views."""
    groups: dict[torch.Size, list[Tensor]] = {}
    for view in views:
        groups.setdefault(view.shape, []).append(view)
    return list(groups.values())


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """For what must be computed in the precision of x; a tensor without values has no autocast to leave."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def at_least_float32(x: Tensor) -> Tensor:
    """Losses are not computed in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
