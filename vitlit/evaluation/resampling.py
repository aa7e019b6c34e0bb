"""Images drawn anew: folds, how sure a number is, and whether two differ."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from vitlit.errors import UserError

Statistic = Callable[..., Any]


def folds(labels: Any, count: int, groups: Any = None, seed: int = 0) -> np.ndarray:
    """The fold of each image, (N,), from 0: each has its share of every class, and the images of a group are together.

    UserError if there are fewer than two, no class has an image for each, or there are fewer groups.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    labels, found, most = np.asarray(labels), np.empty(len(labels), np.int64), most_folds(labels, groups)
    if not 2 <= count <= most:
        raise UserError(f"{count} folds: give from 2 to {most}, the images of the largest class or the groups")
    kind = (StratifiedKFold if groups is None else StratifiedGroupKFold)(count, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")  # which some folds then lack
        for fold, (_, rows) in enumerate(kind.split(labels, labels, groups)):
            found[rows] = fold
    return found


def most_folds(labels: Any, groups: Any = None) -> int:
    """The images of the largest class, or if that is less the groups."""
    return min(int(np.bincount(labels).max()), len(labels if groups is None else np.unique(groups)))


def tenth(labels: Any, groups: Any = None, seed: int = 0) -> np.ndarray:
    """A tenth of the images, or a larger fold where there are fewer than ten of a class, bool (N,), to choose on."""
    return folds(labels, min(10, most_folds(labels, groups)), groups, seed) == 0


def interval(statistic: Statistic, *values: np.ndarray, seed: int = 0, draws: int = 1000) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a statistic of values, arrays with a row for each image.

    It says how the number would vary with other images of this kind, not with other trainings.
    """
    draw, images = np.random.default_rng(seed), len(values[0])
    drawn = (draw.integers(0, images, images) for _ in range(draws))
    low, high = np.quantile([statistic(*(each[rows] for each in values)) for rows in drawn], [0.025, 0.975]).tolist()
    return low, high


def compare(statistic: Statistic, one: Any, other: Any, seed: int = 0) -> tuple[float, float, float]:
    """How much higher a statistic is for the second of two models, and its interval by the paired bootstrap.

    Both models' values are of the same images, which are drawn for both: without 0 in it, they differ at the 5 % level.
    """

    def apart(*both: np.ndarray) -> float:
        return float(statistic(*both[len(one) :]) - statistic(*both[: len(one)]))

    return apart(*one, *other), *interval(apart, *one, *other, seed=seed)
