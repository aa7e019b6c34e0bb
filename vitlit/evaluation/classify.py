"""Classification, measured on logits."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from vitlit.evaluation.calibration import calibration_error, confidences


def classify(logits: Any, labels: Any, real: Sequence[Sequence[int]] | None = None) -> dict[str, float]:
    """Numbers by name, of logits (N, C) and class numbers (N,), arrays or tensors.

    top1, top5; balanced, the mean over classes of their top-1; nll, the mean negative log-likelihood; brier, the mean
    squared distance to the one-hot label (at most 2); ece, the expected calibration error in 15 bins (1706.04599).
    With `real`, the class numbers that fit each image: real, the share of images whose first class is one of them,
    without the images that none fits (2006.07159). For labels (N, C) of several classes an image only map, the mean
    over classes of the average precision.
    """
    return {name: float(statistic(*values)) for name, (statistic, values) in measures(logits, labels, real).items()}


def measures(logits: Any, labels: Any, real: Sequence[Sequence[int]] | None = None) -> dict[str, Any]:
    """What `classify` counts: statistics and their values of each image, as `interval` and `compare` take them."""
    logits, labels = torch.as_tensor(logits).double(), torch.as_tensor(labels)
    if labels.ndim == 2:
        return {"map": (mean_precision, (logits.numpy(), labels.numpy()))}
    likelihoods, numbers = logits.log_softmax(1), labels.numpy()
    confidence, right = confidences(logits, labels)
    five = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).any(1)
    distance = (likelihoods.exp() - F.one_hot(labels, logits.shape[1])).square().sum(1)
    found = {
        "top1": (np.mean, (right,)),
        "top5": (np.mean, (five.double().numpy(),)),
        "balanced": (balanced, (right, numbers)),
        "nll": (np.mean, (F.nll_loss(likelihoods, labels, reduction="none").numpy(),)),
        "brier": (np.mean, (distance.numpy(),)),
        "ece": (calibration_error, (confidence, right)),
    }
    if real is not None:
        fits = [number in fitting for number, fitting in zip(logits.argmax(1).tolist(), real, strict=True) if fitting]
        found["real"] = np.mean, (np.array(fits, float),)
    return found


def per_class(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean of values (N,) over the images of each class, (C,); NaN for a class without."""
    counts = np.bincount(labels)
    means: np.ndarray = np.bincount(labels, values) / np.where(counts, counts, np.nan)
    return means


def balanced(right: np.ndarray, labels: np.ndarray) -> float:
    return float(np.nanmean(per_class(right, labels)))


def precisions(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The average precision of each class, (C,), of scores and labels (N, C); NaN for a class without images.

    As scikit-learn's, in a fiftieth of the time: the mean over a class's images of the precision among all that score
    as high.
    """
    order, places = np.argsort(-scores, 0), np.arange(len(scores))[:, None]
    scores, labels = (np.take_along_axis(each, order, 0) for each in (scores, labels))
    ends = np.where(np.diff(scores, axis=0, append=np.nan) != 0, places, len(scores))  # of images that score alike
    last = np.minimum.accumulate(ends[::-1])[::-1]
    precision, counts = np.cumsum(labels, 0) / (places + 1), labels.sum(0)
    sums: np.ndarray = (np.take_along_axis(precision, last, 0) * labels).sum(0)
    return sums / np.where(counts, counts, np.nan)


def mean_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    return float(np.nanmean(precisions(scores, labels)))
