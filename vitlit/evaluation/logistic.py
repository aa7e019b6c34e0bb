"""Classification by logistic regression."""

import warnings
from typing import Any

import numpy as np

from vitlit.evaluation.resampling import tenth

STRENGTHS = 10.0 ** np.arange(-5, 3)  # C, the inverse of the l2 regularisation


def logistic(train_features: Any, train_labels: Any, features: Any, seed: int = 0, groups: Any = None) -> np.ndarray:
    """The classes (M,) that logistic regression on training features (N, D) gives to features (M, D).

    It is scikit-learn's, on standardised features, with an l2 penalty and at most 1,000 iterations of L-BFGS
    (2103.00020, appendix A.3). Its C is the best on a tenth of the training images, which then are all learned from.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    bank, labels = np.asarray(train_features, np.float64), np.asarray(train_labels)
    held = tenth(labels, groups, seed)
    models = [make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000)) for c in STRENGTHS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        right = [model.fit(bank[~held], labels[~held]).score(bank[held], labels[held]) for model in models]
        best = models[int(np.argmax(right))].fit(bank, labels)
    found: np.ndarray = best.predict(np.asarray(features, np.float64))
    return found
