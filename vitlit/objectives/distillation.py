"""Learning from another ViT."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitlit.errors import UserError, check_range, check_types, first_difference
from vitlit.model import ViT
from vitlit.objectives.objective import Batch, Step
from vitlit.objectives.supervised import Supervised


class Distillation(Supervised):
    """Cross entropy on labels, plus a loss on a teacher's predictions for the same images.

    hard: cross entropy on the teacher's most probable class (2012.12877, equation 3). soft: the Kullback-Leibler
    divergence of the softened probabilities, times temperature^2 (1503.02531, section 2). A ViT with `distilled: true`
    learns from the teacher with its distillation token and from the labels with its class token; any other ViT learns
    both with its one head. Options out of range raise UserError.

    Args:
        vit: the headless ViT; it gets its head here.
        teacher: a run folder, a file of any known format, or hf:OWNER/NAME, with a head for the same classes. It sees
            the student's images, mixing and erasing included, in its own normalisation. It is read when training
            starts and is not part of a checkpoint.
        kind: hard or soft.
        share: weight of the teacher's loss; the labels' loss has the rest.
        temperature: temperature of soft.
        **options: those of `Supervised`.
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
        check_types(Distillation.__init__, locals(), "model.objective.")
        check_range("Distillation", 0, 1, share=share)
        check_range("Distillation", 1e-6, temperature=temperature)
        if self.multi_label:
            raise UserError("distillation needs one label an image, but the data has several")
        self.teacher, self.kind, self.share, self.temperature = teacher, kind, share, temperature
        self._teacher: list[ViT] = []  # a list hides its parameters from this module's
        # Factor and summand of an image's channels.
        self.to_teacher = nn.Buffer(torch.ones(2, 1, vit.config.in_channels, 1, 1), persistent=False)

    def set_teacher(self, teacher: ViT) -> None:
        self._teacher = [teacher.requires_grad_(False).eval()]

    def prepare(self, data: Any) -> None:
        """Adapt the teacher to the data's normalisation; UserError if it has other classes or cannot see the images."""
        super().prepare(data)
        teacher = self._teacher[0]
        classes = teacher.config.num_classes
        if not classes:
            raise UserError(f"the teacher {self.teacher} has no head; finetune it first")
        if classes != self.num_classes:
            raise UserError(f"the teacher {self.teacher} has {classes} classes, the data {self.num_classes}")
        if difference := first_difference(teacher.classes, list(getattr(data, "classes", []))):
            raise UserError(f"the teacher {self.teacher} has other class names than the data: {difference}")
        scale, shift = torch.ones(1), torch.zeros(1)
        theirs: Any = teacher.preprocess
        ours: Any = getattr(data, "preprocess", None)
        if ours is not None:
            try:
                teacher.grid_of(*ours.image_size)
            except UserError as error:
                raise UserError(f"the teacher {self.teacher} cannot see the student's images: {error}") from error
        if ours is not None and theirs is not None:
            if (ours.range, len(ours.mean)) != (theirs.range, len(theirs.mean)):
                raise UserError(f"the teacher {self.teacher} sees other channels, or another data.range, than the data")
            std = torch.tensor(theirs.std)
            scale, shift = torch.tensor(ours.std) / std, (torch.tensor(ours.mean) - torch.tensor(theirs.mean)) / std
        self.to_teacher.copy_(torch.stack([scale, shift]).view(2, 1, -1, 1, 1))

    def forward(self, vit: ViT, batch: Batch, progress: float) -> Step:
        if not self.training:
            return super().forward(vit, batch, progress)
        images = batch.views[0]
        logits, distilled, features = vit.heads(vit.features(images, pooled=True))
        by_labels = self.error(logits, batch.labels)
        by_teacher = self._teacher_loss(logits if distilled is None else distilled, images)
        loss = (1 - self.share) * by_labels + self.share * by_teacher
        if distilled is not None:
            logits = (logits + distilled) / 2
        logs = {"loss_labels": by_labels.detach(), "loss_teacher": by_teacher.detach()}
        return Step(loss, logits, logs, features.detach())

    def _teacher_loss(self, logits: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            target = self._teacher[0](images.float() * self.to_teacher[0] + self.to_teacher[1])
        if self.kind == "hard":
            return F.cross_entropy(logits, target.argmax(-1))
        logits, target = (F.log_softmax(x / self.temperature, -1) for x in (logits, target))
        return F.kl_div(logits, target, reduction="batchmean", log_target=True) * self.temperature**2
