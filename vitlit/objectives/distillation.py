"""Learning from another ViT."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vitlit.errors import UserError, first_difference
from vitlit.model import ViT
from vitlit.objectives.objective import Batch, Step
from vitlit.objectives.supervised import Supervised


class Distillation(Supervised):
    """Cross entropy on labels, and on what a teacher says of the same images.

    hard: cross entropy on the teacher's most probable class (2012.12877, equation 3). soft: the Kullback-Leibler
    divergence of the softened probabilities, times temperature^2 (1503.02531, section 2). A ViT with `distilled: true`
    learns the teacher's answer by its distillation token and the labels by its class token, another by its one head.

    Args:
        vit: the headless ViT; it is given its head here.
        teacher: a run folder, a file of any known format, or hf:OWNER/NAME, with a head for the same classes. It sees
            the student's images, mixed and erased as they are, normalised as it is used to. A stage reads it when
            training starts; it is no part of a checkpoint.
        kind: hard or soft.
        share: of the loss that is the teacher's; the rest is the labels'.
        temperature: of soft.
        **options: as `Supervised` takes them.

    Raises:
        UserError: as `Supervised`, or a number is out of range.
    """

    def __init__(
        self,
        vit: ViT,
        teacher: str,
        kind: Literal["hard", "soft"] = "hard",
        share: float = 0.5,
        temperature: float = 3.0,
        **options: Any,
    ) -> None:
        super().__init__(vit, **options)
        if kind not in ("hard", "soft"):
            raise UserError(f"distillation {kind!r} is neither hard nor soft")
        if not 0 <= share <= 1:
            raise UserError(f"distillation's share {share} is not between 0 and 1")
        if temperature <= 0:
            raise UserError(f"distillation's temperature {temperature} is not above 0")
        if self.multi_label:
            raise UserError("distillation needs one label an image, but the data has several")
        self.teacher, self.kind, self.share, self.temperature = teacher, kind, share, temperature
        self._teacher: list[Any] = []  # in a list, so that its parameters are none of this module's

    def set_teacher(self, teacher: ViT) -> None:
        """Hand over the network that `teacher` names; a stage does so before training."""
        self._teacher = [teacher.requires_grad_(False).eval()]

    def prepare(self, data: Any) -> None:
        """Compare the teacher with the data.

        Raises:
            UserError: it has other classes than the data, or cannot see images of this size.
        """
        super().prepare(data)
        (teacher, *_) = self._teacher
        classes, own = teacher.config.num_classes, list(getattr(data, "classes", []))
        if not classes:
            raise UserError(f"the teacher {self.teacher} has no head; finetune it first")
        if classes != self.num_classes:
            raise UserError(f"the teacher {self.teacher} has {classes} classes, the data {self.num_classes}")
        if teacher.classes and own and teacher.classes != own:
            raise UserError(
                f"the teacher {self.teacher} has other class names than the data, or in another order: "
                f"{first_difference(teacher.classes, own)}"
            )
        sees: Any = teacher.preprocess
        gets: Any = getattr(data, "preprocess", None)
        if gets is not None:
            try:
                teacher.grid_of(*gets.image_size)
            except UserError as error:
                raise UserError(f"the teacher {self.teacher} cannot see the student's images: {error}") from error
        scale, shift = torch.ones(1), torch.zeros(1)
        if sees is not None and gets is not None:
            mean, std = torch.tensor(gets.mean), torch.tensor(gets.std)
            scale, shift = std / torch.tensor(sees.std), (mean - torch.tensor(sees.mean)) / torch.tensor(sees.std)
        self._teacher = [teacher, scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)]

    @torch.no_grad()
    def _taught(self, images: Tensor) -> Tensor:
        """The teacher's logits (B, classes)."""
        self._teacher = [part.to(images.device) for part in self._teacher]
        teacher, scale, shift = self._teacher
        logits: Tensor = teacher(images * scale + shift)
        return logits

    def forward(self, vit: ViT, batch: Batch, progress: float) -> Step:
        if not self.training:
            return super().forward(vit, batch, progress)
        images, labels = batch.views[0], batch.labels
        own, follower = vit.heads(vit.features(images))
        by_labels = self.error(own, labels)
        by_teacher = self._disagreement(own if follower is None else follower, self._taught(images))
        loss = (1 - self.share) * by_labels + self.share * by_teacher
        logits = own if follower is None else (own + follower) / 2
        return Step(loss, logits, {"loss_labels": by_labels.detach(), "loss_teacher": by_teacher.detach()})

    def _disagreement(self, logits: Tensor, taught: Tensor) -> Tensor:
        if self.kind == "hard":
            return F.cross_entropy(logits, taught.argmax(-1))
        softened = F.log_softmax(logits / self.temperature, -1)
        target = F.log_softmax(taught / self.temperature, -1)
        return F.kl_div(softened, target, reduction="batchmean", log_target=True) * self.temperature**2
