"""Classification and calibration, measured on logits."""

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

BINS = 15  # of the calibration error


def classify(logits: Any, labels: Any) -> dict[str, float]:
    """Numbers by name, of logits (N, C) and class numbers (N,), arrays or tensors.

    top1, top5; balanced, the mean over classes of their top-1; nll, the mean negative log-likelihood; brier, the mean
    squared distance to the one-hot label (at most 2); ece, the expected calibration error in 15 bins (1706.04599).
    """
    return {name: float(statistic(*values)) for name, (statistic, values) in measures(logits, labels).items()}


def measures(logits: Any, labels: Any) -> dict[str, Any]:
    """What `classify` counts: statistics and their values of each image, as `interval` and `compare` take them."""
    logits, labels = torch.as_tensor(logits).double(), torch.as_tensor(labels)
    likelihoods, numbers = logits.log_softmax(1), labels.numpy()
    confidence, first = likelihoods.exp().max(1)
    right = (first == labels).double().numpy()
    five = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).any(1)
    distance = (likelihoods.exp() - F.one_hot(labels, logits.shape[1])).square().sum(1)
    return {
        "top1": (np.mean, (right,)),
        "top5": (np.mean, (five.double().numpy(),)),
        "balanced": (balanced, (right, numbers)),
        "nll": (np.mean, (F.nll_loss(likelihoods, labels, reduction="none").numpy(),)),
        "brier": (np.mean, (distance.numpy(),)),
        "ece": (calibration_error, (confidence.numpy(), right)),
    }


def per_class(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean of values (N,) over the images of each class, (C,); NaN for a class without."""
    counts = np.bincount(labels)
    means: np.ndarray = np.bincount(labels, values) / np.where(counts, counts, np.nan)
    return means


def balanced(right: np.ndarray, labels: np.ndarray) -> float:
    return float(np.nanmean(per_class(right, labels)))


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return float(np.abs(np.bincount(bins, confidence - right)).sum() / len(bins))
