"""Classification."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitlit.errors import UserError, check_range, check_types
from vitlit.model import ViT
from vitlit.objectives.objective import Batch, Objective, Step, at_least_float32


class Supervised(Objective):
    """Cross entropy on labels (2010.11929, section 3.1), hard or soft.

    softmax is the usual loss. sigmoid is binary cross entropy per class, summed over the classes (2106.10270). bce is
    its mean over the classes, with every class of a mixed label counted in full (2110.00476, section 3; DeiT III).
    Label smoothing and class weights act in training only. Options out of range or in contradiction raise UserError.

    Args:
        vit: the headless ViT; it gets its head here.
        num_classes: by default that of the ViT's head; the command line fills it from the data.
        head: pretrain is Linear, tanh, Linear; finetune is one Linear. By default the stage decides.
        hidden_dim: hidden units of the pretraining head; by default the ViT's width.
        head_std: standard deviation of the output layer's initial weights, normal, cut at +-2 as timm's; 0 for zeros.
        head_bias: initial bias of the output layer; about -log(classes) suits sigmoid, where most targets are 0.
        loss: softmax, sigmoid or bce.
        label_smoothing: the share of each label that is spread over all classes (1512.00567, section 7).
        class_weights: balanced multiplies an image's loss by N / (classes x images of its class), scikit-learn's
            formula. The mean over the training images is 1.
        multi_label: whether an image may have several classes; the command line fills it from the data.
    """

    needs_labels = mixes = True

    def __init__(
        self,
        vit: ViT,
        num_classes: int | None = None,
        head: Literal["pretrain", "finetune"] | None = None,
        hidden_dim: int | None = None,
        head_std: float = 0.0,
        head_bias: float = 0.0,
        loss: Literal["softmax", "sigmoid", "bce"] = "softmax",
        label_smoothing: float = 0.0,
        class_weights: Literal["balanced"] | None = None,
        multi_label: bool = False,
    ) -> None:
        check_types(Supervised.__init__, locals(), "model.objective.")
        super().__init__(vit)
        num_classes = vit.config.num_classes if num_classes is None else num_classes
        if num_classes < 2:
            raise UserError(f"a supervised objective needs num_classes of at least 2, not {num_classes}")
        if not 0 <= label_smoothing < 1:
            raise UserError(f"Supervised: label_smoothing is {label_smoothing}; give from 0 to 1, but not 1 itself")
        check_range("Supervised", 0, head_std=head_std)
        if multi_label and (loss == "softmax" or class_weights is not None):
            wrong = "loss softmax" if loss == "softmax" else "class_weights"
            remedy = "give --model.objective.loss sigmoid or bce" if loss == "softmax" else "leave it out"
            raise UserError(f"{wrong} needs one label an image, but the data has several; {remedy}")
        if vit.config.num_classes != num_classes or head is not None:
            vit.set_head(head or "pretrain", num_classes, hidden_dim)
        vit.activation = "softmax" if loss == "softmax" else "sigmoid"
        if hidden_dim not in (None, vit.config.hidden_dim):
            raise UserError(f"hidden_dim {hidden_dim} is the pretraining head's, but the head is one linear layer")
        for name, output in vit.named_modules():
            if name in ("head", "head.out", "head_dist", "head_dist.out") and isinstance(output, nn.Linear):
                if head_std:
                    nn.init.trunc_normal_(output.weight, std=head_std)
                nn.init.constant_(output.bias, head_bias)
        self.num_classes, self.loss, self.label_smoothing = num_classes, loss, label_smoothing
        self.multi_label, self.class_weights = multi_label, class_weights
        self.weights: Tensor | None
        self.register_buffer("weights", None, persistent=False)

    def prepare(self, data: Any) -> None:
        """Compute class weights from the number of training images per class; UserError if the classes do not fit."""
        found, several = len(getattr(data, "classes", range(self.num_classes))), getattr(data, "multi_label", None)
        if found != self.num_classes:
            raise UserError(f"num_classes is {self.num_classes}, but the data has {found} classes; leave it out")
        if data is not None and bool(several) != self.multi_label:
            has = "several labels" if several else "one label"
            raise UserError(f"the data has {has} an image; give the objective multi_label={bool(several)}")
        if self.class_weights is None:
            return
        counts = getattr(data, "class_counts", None)
        if counts is None:
            raise UserError("class_weights balanced needs a data module that counts its classes (ImageFolderData)")
        if not all(counts):
            raise UserError(f"class_weights balanced: the training set has no image of class {list(counts).index(0)}")
        images = torch.as_tensor(counts, dtype=torch.float64)
        self.weights = (images.sum() / (len(images) * images)).float()

    def forward(self, vit: ViT, batch: Batch, progress: float) -> Step:
        logits, features = vit.outputs(batch.views[0])
        return Step(self.error(logits, batch.labels), logits, features=features.detach())

    def error(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of logits (B, classes) on labels (B,) or shares of classes (B, classes), a scalar."""
        logits = at_least_float32(logits)
        shares = F.one_hot(labels, self.num_classes).to(logits.dtype) if labels.ndim == 1 else labels
        targets = (shares > 0).to(shares.dtype) if self.loss == "bce" else shares
        if self.training and self.label_smoothing:
            targets = targets * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
        if self.loss == "softmax":
            errors = F.cross_entropy(logits, targets, reduction="none")
        else:
            errors = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1)
            errors = errors / self.num_classes if self.loss == "bce" else errors
        if self.training and self.weights is not None:
            errors = errors * (shares.float() @ self.weights)
        return errors.mean()

    def metrics(self) -> dict[str, Any]:
        """map with several labels an image, else top1, top1_macro and, above five classes, top5."""
        names = ["map"] if self.multi_label else ["top1", "top1_macro", *(["top5"] if self.num_classes > 5 else [])]
        return dict.fromkeys(names, self.num_classes)

    def predictions(self, logits: Tensor) -> Tensor:
        """Class probabilities (B, classes), float32: softmax, or a sigmoid per class for sigmoid and bce."""
        return logits.float().softmax(-1) if self.loss == "softmax" else logits.float().sigmoid()
