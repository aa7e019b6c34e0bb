"""What the supervised objective computes, against timm's and scikit-learn's formulas and the papers'."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomized
from sklearn.utils.class_weight import compute_class_weight
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.objectives import Batch, Objective, Step, Supervised

TINY: dict[str, Any] = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 2, "heads": 2, "mlp_dim": 32}
CLASSES = 5


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def made(**options: Any) -> tuple[ViT, Supervised]:
    vit = ViT(**TINY)
    objective = Supervised(vit, CLASSES, **options)
    return randomized(vit, 0.3).train(), objective.train()


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, 16, 16), torch.arange(size) % CLASSES


def step_of(objective: Objective, vit: ViT, images: Tensor, labels: Tensor) -> Step:
    step: Step = objective(vit, Batch.of((images, labels)), 0.0)
    return step


def shares(size: int = 6) -> Tensor:
    return torch.rand(size, CLASSES).softmax(-1)


def test_hard_labels_are_softmax_cross_entropy() -> None:
    vit, objective = made()
    images, labels = batch()
    step = step_of(objective, vit, images, labels)
    assert step.loss.item() == pytest.approx(F.cross_entropy(vit(images), labels).item(), rel=1e-6)
    assert step.logits is not None
    assert torch.equal(step.logits, vit(images))


def test_soft_labels_are_timms_soft_target_loss() -> None:
    vit, objective = made()
    images, _ = batch()
    targets = shares()
    expected = SoftTargetCrossEntropy()(vit(images), targets)
    assert step_of(objective, vit, images, targets).loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_label_smoothing_is_timms_and_acts_in_training_alone() -> None:
    vit, objective = made(label_smoothing=0.1)
    images, labels = batch()
    expected = LabelSmoothingCrossEntropy(0.1)(vit(images), labels)
    assert step_of(objective, vit, images, labels).loss.item() == pytest.approx(expected.item(), rel=1e-6)
    plain = F.cross_entropy(vit(images), labels)
    assert step_of(objective.eval(), vit, images, labels).loss.item() == pytest.approx(plain.item(), rel=1e-6)


def test_sigmoid_sums_over_classes() -> None:
    # big_vision, utils.py sigmoid_xent: the sum over classes, the mean over images
    vit, objective = made(loss="sigmoid")
    images, labels = batch()
    logits, targets = vit(images), F.one_hot(labels, CLASSES).float()
    by_hand = -(targets * F.logsigmoid(logits) + (1 - targets) * F.logsigmoid(-logits)).sum(-1).mean()
    assert step_of(objective, vit, images, labels).loss.item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_bce_is_timms_on_whole_classes() -> None:
    vit, objective = made(loss="bce")
    images, labels = batch()
    expected = BinaryCrossEntropy(smoothing=0.0)(vit(images), labels)
    assert step_of(objective, vit, images, labels).loss.item() == pytest.approx(expected.item(), rel=1e-6)
    mixed = 0.3 * F.one_hot(labels, CLASSES).float() + 0.7 * F.one_hot(labels.flip(0), CLASSES).float()
    expected = BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)(vit(images), mixed)
    assert step_of(objective, vit, images, mixed).loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_probabilities_are_the_losses_own() -> None:
    logits = torch.randn(3, CLASSES)
    assert torch.equal(made()[1].predictions(logits), logits.softmax(-1))
    assert torch.equal(made(loss="sigmoid")[1].predictions(logits), logits.sigmoid())


def test_class_weights_are_scikit_learns_and_average_to_one_so_that_slices_add_up() -> None:
    labels = np.array([0] * 7 + [1] * 2 + [2] * 4 + [3] + [4] * 6)
    counts = np.bincount(labels)
    vit, objective = made(class_weights="balanced")
    objective.prepare(SimpleNamespace(class_counts=counts.tolist()))
    weights = compute_class_weight("balanced", classes=np.arange(CLASSES), y=labels)
    images = torch.randn(len(labels), 3, 16, 16)
    targets = torch.from_numpy(labels)
    with torch.no_grad():
        errors = F.cross_entropy(vit(images), targets, reduction="none")
        expected = (errors * torch.from_numpy(weights)[targets]).mean().item()
        whole = step_of(objective, vit, images, targets).loss.item()
        parts = [step_of(objective, vit, images[i : i + 5], targets[i : i + 5]).loss.item() for i in range(0, 20, 5)]
        plain = step_of(objective.eval(), vit, images, targets).loss.item()
    assert whole == pytest.approx(expected, rel=1e-5)
    assert sum(parts) / 4 == pytest.approx(whole, rel=1e-5)
    assert weights[labels].mean() == pytest.approx(1)
    assert plain == pytest.approx(errors.mean().item(), rel=1e-5)


def test_mixed_labels_weigh_by_their_shares() -> None:
    vit, objective = made(class_weights="balanced")
    objective.prepare(SimpleNamespace(class_counts=[1, 2, 3, 4, 10]))
    images, labels = batch()
    targets = F.one_hot(labels, CLASSES).float()
    assert torch.equal(step_of(objective, vit, images, labels).loss, step_of(objective, vit, images, targets).loss)


def test_the_heads_initial_weights_and_bias() -> None:
    images, _ = batch()
    vit = ViT(**TINY)
    Supervised(vit, CLASSES, head_bias=-6.9)
    torch.testing.assert_close(vit(images), torch.full((6, CLASSES), -6.9))
    vit = ViT(**{**TINY, "width": 512})
    Supervised(vit, 1000, head="finetune", head_std=0.02)
    assert isinstance(vit.head, nn.Linear)
    assert vit.head.weight.abs().max() > 0.06  # of half a million: no cut at two deviations, which timm has none of
    assert vit.head.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert vit.head.bias.abs().max() == 0


def test_an_existing_head_stays_unless_another_kind_is_given() -> None:
    vit = ViT(**TINY)
    vit.set_head("finetune", CLASSES)
    Supervised(vit, CLASSES)
    assert isinstance(vit.head, nn.Linear)
    Supervised(vit, CLASSES, head="pretrain")
    assert not isinstance(vit.head, nn.Linear)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.1}, "label_smoothing is 1.1; give from 0 to 1"),
        ({"loss": "hinge"}, r"loss is 'hinge' \(str\); give Literal\['softmax', 'sigmoid', 'bce'\]"),
        (
            {"multi_label": True},
            "but the data has several; give --model.objective.loss sigmoid or bce",
        ),
        ({"multi_label": True, "loss": "bce", "class_weights": "balanced"}, "class_weights needs one label an image"),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(**options)


def test_class_weights_need_counts() -> None:
    with pytest.raises(UserError, match="needs a data module that counts its classes"):
        made(class_weights="balanced")[1].prepare(None)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid", "bce"])
def test_losses_of_bfloat16_logits_are_computed_in_float32(loss: Any) -> None:
    objective = Supervised(ViT(**TINY), 1000, loss=loss, label_smoothing=0.1)
    logits, labels = torch.randn(8, 1000).bfloat16(), torch.arange(8)
    found = objective.error(logits, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, objective.error(logits.double(), labels).float())


def test_a_class_without_images_has_no_weight() -> None:
    objective = Supervised(ViT(**TINY), 3, class_weights="balanced")
    with pytest.raises(UserError, match="the training set has no image of class 1"):
        objective.prepare(SimpleNamespace(class_counts=[5, 0, 6]))


def test_hidden_units_are_the_pretraining_heads() -> None:
    with pytest.raises(UserError, match="hidden_dim 8 is the pretraining head's"):
        Supervised(ViT(**TINY), CLASSES, head="finetune", hidden_dim=8)
