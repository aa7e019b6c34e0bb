"""Folds that keep groups together, intervals that cover at their rate, and compare two models."""

import numpy as np
import pytest
from conftest import user_error

from vitlit.evaluation import compare, folds, interval


def test_folds_share_out_each_class_and_split_no_group() -> None:
    draw = np.random.default_rng(0)
    groups = draw.integers(0, 60, 400)
    labels = (groups % 3 + draw.integers(0, 2, 400)) % 3
    found = folds(labels, 5, groups)
    assert all(len(np.unique(found[groups == group])) == 1 for group in np.unique(groups))
    counts = np.array([np.bincount(labels[found == fold], minlength=3) for fold in range(5)])
    assert np.abs(counts / counts.mean(0) - 1).max() < 0.4
    alone = folds(labels, 5)
    counts = np.array([np.bincount(labels[alone == fold], minlength=3) for fold in range(5)])
    assert np.ptp(counts, axis=0).max() <= 1
    assert not np.array_equal(alone, folds(labels, 5, seed=1))
    assert set(folds([0, 0, 0, 1], 3)) == {0, 1, 2}  # where a class is too small for all of them
    user_error("9 folds: .* 4", folds, [0, 1] * 4, 9)
    user_error("3 folds: .* 2", folds, [0, 1] * 4, 3, [0, 1] * 4)
    user_error("1 folds", folds, [0, 1], 1)


def test_an_interval_covers_the_truth_at_its_rate() -> None:
    draw = np.random.default_rng(0)
    truth, covered = 0.7, 0
    for number in range(1000):
        right = (draw.random(300) < truth).astype(float)
        low, high = interval(lambda values: values.sum() / 300, right, seed=number, draws=250)
        covered += low <= truth <= high
    assert covered / 1000 == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(("better", "worse"), [(45, 30), (20, 18), (60, 20)])
def test_the_interval_of_a_difference_is_of_pairs(better: int, worse: int) -> None:
    one, other = np.ones(400), np.ones(400)
    one[:better] = other[better : better + worse] = 0
    difference, low, high = compare(np.mean, (one,), (other,))
    assert difference == pytest.approx((better - worse) / 400)
    spread = ((better + worse) / 400 - difference**2) ** 0.5 / 20
    assert (low, high) == pytest.approx((difference - 1.96 * spread, difference + 1.96 * spread), abs=0.006)


def test_two_that_are_the_same_do_not_differ() -> None:
    values = np.random.default_rng(0).random(50)
    assert compare(np.mean, (values,), (values,)) == (0, 0, 0)
