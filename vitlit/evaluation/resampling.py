"""Images drawn anew: folds, how sure a number is, and whether two differ."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vitlit.errors import UserError

Statistic = Callable[..., Any]


def folds(labels: Any, count: int, groups: Any = None, seed: int = 0) -> np.ndarray:
    """The fold of each image, (N,), from 0: each has its share of every class, and the images of a group are together.

    UserError if no class has an image for each fold, or there are fewer groups.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    labels, found = np.asarray(labels), np.empty(len(labels), np.int64)
    kind = (StratifiedKFold if groups is None else StratifiedGroupKFold)(count, shuffle=True, random_state=seed)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The least populated class")  # which some folds then lack
            for fold, (_, rows) in enumerate(kind.split(labels, labels, groups)):
                found[rows] = fold
    except ValueError as error:
        raise UserError(f"{count} folds of {len(labels)} images: {error}") from error
    return found


def held_part(labels: Any, groups: Any = None, seed: int = 0) -> np.ndarray:
    """The images, bool (N,), to choose settings on: a tenth, or where classes or groups are few a larger part."""
    most = int(np.bincount(labels).max()) if groups is None else len(np.unique(groups))
    return folds(labels, min(10, most), groups, seed) == 0


def interval(statistic: Statistic, *values: np.ndarray, seed: int = 0, draws: int = 1000) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a statistic of values, arrays with a row for each image.

    It says how the number would vary with other images of this kind, not with other trainings.
    """
    low, high = np.quantile(bootstrap(statistic, values, seed, draws), [0.025, 0.975]).tolist()
    return low, high


def compare(
    statistic: Statistic, one: Sequence[np.ndarray], other: Sequence[np.ndarray], seed: int = 0, draws: int = 1000
) -> tuple[float, float, float, float]:
    """How much higher a statistic is for the second of two models, its 95 % interval, and p, of values of each image.

    Both are of the paired bootstrap: p is twice the share of draws in which the difference has the other sign, or none.
    """

    def apart(*both: np.ndarray) -> float:
        return float(statistic(*both[len(one) :]) - statistic(*both[: len(one)]))

    drawn = bootstrap(apart, [*one, *other], seed, draws)
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    p = 2 * (1 + min((drawn <= 0).sum(), (drawn >= 0).sum())) / (1 + draws)
    return apart(*one, *other), low, high, min(1.0, float(p))


def bootstrap(statistic: Statistic, values: Sequence[np.ndarray], seed: int, draws: int) -> np.ndarray:
    """A statistic of images drawn with replacement, as many as there are: (draws,)."""
    draw, images = np.random.default_rng(seed), len(values[0])
    drawn = (draw.integers(0, images, images) for _ in range(draws))
    return np.array([statistic(*(each[rows] for each in values)) for rows in drawn])
