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
    """Images (N, D) whose labels (N,), class numbers, are likely wrong: confident learning (1911.00068, section 3).

    Probabilities are those that logistic regression gives to images out of its fold of five, groups (N,) kept together.
    An image is listed if another class is more probable than its label (C_confusion there), and ranked by the label's
    probability (self-confidence). UserError if no class has two images, or there are fewer groups than folds.
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    inputs, labels = np.asarray(features, np.float64), np.asarray(labels)
    counts = np.bincount(labels)
    fold = folds(labels, max(2, min(5, counts.max())), groups, seed)
    found = np.zeros((len(labels), len(counts)))
    for test in (fold == part for part in range(fold.max() + 1)):
        several = len(np.unique(labels[~test])) > 1  # else all that is left is sure to be of one class
        kind = LogisticRegression(C=REGULARISATION, max_iter=1000) if several else DummyClassifier()
        model = make_pipeline(StandardScaler(), kind).fit(inputs[~test], labels[~test])
        found[np.ix_(test, model.classes_)] = model.predict_proba(inputs[test])
    own, guesses = found[np.arange(len(labels)), labels], found.argmax(1)
    order = np.argsort(own, kind="stable")
    rows = order[own[order] < found.max(1)[order]]
    return LabelErrors(rows, guesses[rows], np.stack([own[rows], found[rows, guesses[rows]]], 1))
