"""Whether a classifier is as often right as it is sure, and a temperature that brings it closer to that."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitlit.errors import UserError

BINS = 15  # of the calibration error


class Reliability(NamedTuple):
    """By bin, the mean confidence and the share that is right, NaN without images, and the number of images."""

    confidence: np.ndarray
    accuracy: np.ndarray
    images: np.ndarray


def temperature(logits: Any, labels: Any) -> float:
    """The T with the least negative log-likelihood of softmax(logits / T) (1706.04599, section 4.2).

    Logits (N, C) and class numbers (N,) are of images that the model has not learned from. At the best T the mean logit
    that the softmax expects is that of the labels. UserError if there is none: all are right, or right by chance alone.
    """
    from scipy.optimize import brentq  # type: ignore[import-untyped]

    logits, labels = torch.as_tensor(logits).double(), torch.as_tensor(labels)
    of_labels, unit = logits.gather(1, labels[:, None]).mean(), (logits - logits.mean(1, keepdim=True)).std()

    def apart(exponent: float) -> float:
        return float(of_labels - ((logits / (unit * 10**exponent)).softmax(1) * logits).sum(1).mean())

    if not apart(-3) < 0 < apart(3):
        why = "all are right" if apart(-3) >= 0 else "they tell too little of the labels"
        raise UserError(f"the logits of {len(labels)} images have no best temperature: {why}; give more images")
    return float(unit * 10 ** brentq(apart, -3, 3, xtol=1e-12))


def reliability(logits: Any, labels: Any, bins: int = BINS) -> Reliability:
    """The reliability diagram of logits (N, C), or log-probabilities, on class numbers (N,), in bins of equal width."""
    return binned(*confidences(torch.as_tensor(logits).double(), torch.as_tensor(labels)), bins)


def confidences(logits: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The probability of each image's most likely class, and whether it is right, 0 or 1, both (N,)."""
    probability, first = logits.softmax(1).max(1)
    return probability.numpy(), (first == labels).double().numpy()


def binned(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> Reliability:
    numbers = np.minimum((confidence * bins).astype(int), bins - 1)
    images = np.bincount(numbers, minlength=bins)
    means = [np.bincount(numbers, each, bins) / np.where(images, images, np.nan) for each in (confidence, right)]
    return Reliability(means[0], means[1], images)


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """The mean over images of the distance of confidence and accuracy in their bin (1706.04599, equation 3)."""
    found = binned(confidence, right)
    return float(np.nansum(found.images * np.abs(found.confidence - found.accuracy)) / len(right))
