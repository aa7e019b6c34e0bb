"""Planted label errors come first, as by probabilities of scikit-learn's own cross-validation."""

import numpy as np
import pytest
from conftest import user_error
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vitlit.evaluation import label_errors


@pytest.fixture(scope="module")
def digits_() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """600 real digits, their labels of which 18 are wrong, which these are, and the truth."""
    features, truth = (part[:600] for part in load_digits(return_X_y=True))
    draw, labels = np.random.default_rng(0), truth.copy()
    wrong = draw.choice(len(labels), 18, replace=False)
    labels[wrong] = (labels[wrong] + draw.integers(1, 10, len(wrong))) % 10
    return features, labels, wrong, truth


def test_planted_errors_come_first(digits_: tuple[np.ndarray, ...]) -> None:
    features, labels, wrong, truth = digits_
    rows, guesses, probabilities = label_errors(features, labels)
    assert np.isin(wrong, rows[:36]).mean() >= 0.9
    assert (guesses == truth[rows])[np.isin(rows, wrong)].mean() >= 0.8
    assert (guesses != labels[rows]).all()
    assert (probabilities[:, 0] < probabilities[:, 1]).all()
    assert (np.diff(probabilities[:, 0]) >= 0).all()


def test_probabilities_are_those_of_scikit_learns_cross_validation(digits_: tuple[np.ndarray, ...]) -> None:
    features, labels, _, _ = digits_
    rows, guesses, probabilities = label_errors(features, labels)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    split = StratifiedKFold(5, shuffle=True, random_state=0)
    theirs = cross_val_predict(model, features, labels, cv=split, method="predict_proba")
    assert set(rows) == set(np.flatnonzero(theirs.argmax(1) != labels))
    assert guesses.tolist() == theirs.argmax(1)[rows].tolist()
    np.testing.assert_allclose(probabilities[:, 0], theirs[rows, labels[rows]], atol=1e-6)
    np.testing.assert_allclose(probabilities[:, 1], theirs[rows].max(1), atol=1e-6)


def test_a_copy_in_the_same_group_cannot_vouch_for_a_wrong_label() -> None:
    draw = np.random.default_rng(0)
    features = np.repeat(draw.normal(size=(60, 100)), 8, 0)  # images of no pattern, each there eight times
    labels = np.repeat(draw.integers(0, 2, 60), 8)
    apart = label_errors(features, labels)
    together = label_errors(features, labels, np.repeat(np.arange(60), 8))
    assert len(together.rows) > 5 * len(apart.rows)


def test_a_class_of_one_image_is_an_error_of_no_fold() -> None:
    features = np.random.default_rng(0).normal(size=(21, 4))
    labels = np.array([0] * 10 + [2] * 10 + [3])
    found = label_errors(features, labels)
    assert found.probabilities[list(found.rows).index(20), 0] == 0  # no model knows it
    assert len(label_errors(features[:11], [*labels[:10], 1]).rows) == 1  # no fold has two classes to learn
    user_error("2 folds: give from 2 to 1", label_errors, features[:2], np.array([0, 1]))
