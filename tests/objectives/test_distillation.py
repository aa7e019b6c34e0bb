"""Distillation, against DeiT's and Hinton's formulas."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import randomized
from test_supervised import CLASSES, TINY, batch, step_of
from torch import Tensor
from torch.nn import functional as F

from vitlit.data import Preprocess
from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.objectives import Distillation
from vitlit.weights import load, save_weights


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def teacher(tmp_path: Path) -> tuple[ViT, str]:
    vit = randomized(ViT(**TINY, num_classes=CLASSES), 0.5)
    vit.classes = list("abcde")
    vit.preprocess = Preprocess((16, 16), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    save_weights(vit, tmp_path / "teacher.safetensors")
    return vit, str(tmp_path / "teacher.safetensors")


def data(classes: str = "abcde") -> Any:
    return SimpleNamespace(classes=list(classes), preprocess=Preprocess((16, 16)))


def student(teacher: str, distilled: bool, **options: Any) -> tuple[ViT, Distillation]:
    vit = ViT(**TINY, distilled=distilled)
    objective = Distillation(vit, teacher, num_classes=CLASSES, **options)
    objective.set_teacher(load(teacher))
    objective.prepare(data())
    return randomized(vit, 0.3).train(), objective.train()


def as_teacher_sees(images: Tensor) -> Tensor:
    """Images normalised by 0.5 and 0.5, normalised as the teacher is used to."""
    pixels = images * 0.5 + 0.5
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    return (pixels - mean) / std


def test_hard_distillation_is_deits(teacher: tuple[ViT, str]) -> None:
    vit, objective = student(teacher[1], distilled=True)
    images, labels = batch()
    logits, distilled, _ = vit.heads(vit.features(images))
    assert distilled is not None
    answers = teacher[0](as_teacher_sees(images)).argmax(-1)
    assert len(answers.unique()) > 1
    expected = 0.5 * F.cross_entropy(logits, labels) + 0.5 * F.cross_entropy(distilled, answers)  # equation 3
    step = step_of(objective, vit, images, labels)
    assert step.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(step.logits, (logits + distilled) / 2)


def test_soft_distillation_is_hintons(teacher: tuple[ViT, str]) -> None:
    vit, objective = student(teacher[1], distilled=False, kind="soft", share=0.3, temperature=2.0)
    images, labels = batch()
    logits = vit(images)
    target = (teacher[0](as_teacher_sees(images)) / 2).softmax(-1)
    divergence = (target * (target.log() - (logits / 2).log_softmax(-1))).sum(-1).mean() * 4
    expected = 0.7 * F.cross_entropy(logits, labels) + 0.3 * divergence
    assert step_of(objective, vit, images, labels).loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_teacher_is_neither_trained_nor_stored(teacher: tuple[ViT, str]) -> None:
    vit, objective = student(teacher[1], distilled=True)
    assert list(objective.parameters()) == []
    assert objective.state_dict() == {}
    step_of(objective, vit, *batch()).loss.backward()
    assert all(parameter.grad is not None for parameter in vit.parameters())


def test_evaluation_uses_only_the_student(teacher: tuple[ViT, str]) -> None:
    vit, objective = student(teacher[1], distilled=True)
    images, labels = batch()
    step = step_of(objective.eval(), vit.eval(), images, labels)
    assert step.loss.item() == pytest.approx(F.cross_entropy(vit(images), labels).item(), rel=1e-6)


def test_a_teacher_of_other_classes_is_refused(teacher: tuple[ViT, str]) -> None:
    objective = Distillation(ViT(**TINY), teacher[1], num_classes=CLASSES)
    objective.set_teacher(teacher[0])
    with pytest.raises(UserError, match=r"other class names than the data.*: 'e' instead of 'x'$"):
        objective.prepare(data("abcdx"))
    objective = Distillation(ViT(**TINY), teacher[1], num_classes=4)
    objective.set_teacher(teacher[0])
    with pytest.raises(UserError, match="has 5 classes, the data 4"):
        objective.prepare(data("abcd"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "medium"}, r"kind is 'medium' \(str\); give Literal"),
        ({"share": 1.5}, "Distillation: share is 1.5; give from 0 to 1"),
        ({"temperature": 0.0}, "Distillation: temperature is 0.0; give at least 1e-06"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Distillation(ViT(**TINY), "nowhere", num_classes=CLASSES, **options)
