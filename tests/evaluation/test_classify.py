"""Accuracy and calibration against torchmetrics and scikit-learn."""

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, recall_score
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from vitlit.evaluation import classify
from vitlit.evaluation.classify import per_class


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
