"""Labels that are likely wrong."""

from typing import Any, NamedTuple

import numpy as np

from vitlit.evaluation.resampling import folds

REGULARISATION = 0.01  # sklearn's C, of standardised features: strong, since some labels are wrong


class LabelErrors(NamedTuple):
    rows: np.ndarray  # (E,), the likeliest first
    guesses: np.ndarray  # (E,), the classes that they may be
    probabilities: np.ndarray  # (E, 2): of the label and of the guess


def label_errors(features: Any, labels: Any, groups: Any = None, seed: int = 0) -> LabelErrors:
    """Images (N, D) whose labels (N,), class numbers, are likely wrong: confident learning (1911.00068).

    Probabilities are those that logistic regression gives to images out of its fold of five, groups (N,) kept together.
    An image is listed if another class is the most probable of those that reach their threshold, which is the mean
    probability of a class over the images labelled so (equation 2). They are ranked by their label's probability.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    inputs, labels = np.asarray(features, np.float64), np.asarray(labels)
    counts, everyone = np.bincount(labels), np.arange(len(labels))
    fold = folds(labels, min(5, counts.max()), groups, seed)
    found = np.zeros((len(labels), len(counts)))
    for test in (fold == part for part in range(fold.max() + 1)):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=REGULARISATION, max_iter=1000))
        model.fit(inputs[~test], labels[~test])
        found[np.ix_(test, model.classes_)] = model.predict_proba(inputs[test])
    own = found[everyone, labels]
    thresholds = np.bincount(labels, own) / np.maximum(counts, 1)
    sure = np.where((found >= thresholds) & (counts > 0), found, 0)
    guesses = sure.argmax(1)
    wrong = np.flatnonzero((sure.max(1) > 0) & (guesses != labels))
    rows = wrong[np.argsort(own[wrong], kind="stable")]
    return LabelErrors(rows, guesses[rows], np.stack([own[rows], found[rows, guesses[rows]]], 1))
