"""Accuracy and calibration against torchmetrics and scikit-learn."""

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, recall_score
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multilabel_average_precision,
)

from vitlit.evaluation import classify
from vitlit.evaluation.classify import per_class, precisions


def made(images: int = 500, classes: int = 8, sharper: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are so many times too large, and labels by the right probabilities; of the last class, none."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(images, classes, generator=draw, dtype=torch.float64)
    labels = logits[:, :-1].softmax(1).multinomial(1, generator=draw)[:, 0]
    return sharper * logits, labels


def test_the_numbers_are_torchmetrics_and_scikit_learns() -> None:
    logits, labels = made()
    shares = logits.softmax(1)
    accuracy = partial(multiclass_accuracy, logits, labels, num_classes=8)
    brier = ((shares.numpy() - np.eye(8)[labels]) ** 2).sum(1).mean()
    expected = {
        "top1": accuracy(average="micro").item(),
        "top5": accuracy(average="micro", top_k=5).item(),
        "balanced": recall_score(labels, logits.argmax(1), labels=range(7), average="macro"),
        "nll": log_loss(labels, shares, labels=range(8)),
        "brier": brier,
        "ece": multiclass_calibration_error(shares, labels, num_classes=8, n_bins=15).item(),
    }
    assert classify(logits.numpy(), labels.numpy()) == pytest.approx(expected, abs=1e-6)
    of_class = recall_score(labels, logits.argmax(1), labels=range(7), average=None)
    assert per_class((logits.argmax(1) == labels).double().numpy(), labels.numpy()) == pytest.approx(of_class)


def test_the_map_of_several_classes_an_image_is_torchmetrics() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.rand(60, 5, generator=draw) < torch.tensor([0.5, 0.2, 0.1, 0.3, 0.0])
    logits = (labels + torch.randn(60, 5, generator=draw)).mul(4).round()  # some are equal
    with pytest.warns(UserWarning, match="No positive samples"):
        expected = multilabel_average_precision(logits, labels.long(), num_labels=5, average="none")
    assert precisions(logits.numpy(), labels.numpy())[:4] == pytest.approx(expected[:4].numpy(), abs=1e-6)
    assert np.isnan(precisions(logits.numpy(), labels.numpy())[4])  # a class without images counts for nothing
    assert classify(logits, labels) == pytest.approx({"map": expected[:4].mean().item()}, abs=1e-6)


def test_real_counts_images_with_labels_and_any_of_these_is_right() -> None:
    """2006.07159, section 3: images that no label fits are left out."""
    logits = torch.eye(4)[[0, 1, 2, 3, 0]]
    real = [[0], [0, 1], [0, 3], [], [2]]
    found = classify(logits, torch.zeros(5, dtype=torch.int64), real)
    assert found["real"] == 2 / 4
    assert found["top1"] == 2 / 5
