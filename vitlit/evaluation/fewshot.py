"""Classification by ridge regression on a few images of each class."""

from typing import Any

import numpy as np

from vitlit.errors import UserError

BIAS = 100.0  # the constant feature: so large that its weight is hardly regularised
L2 = 2.0 ** np.arange(-10, 20)


def check_shots(train_labels: Any, shots: int) -> None:
    """UserError unless a class has training images besides the few."""
    if shots >= (most := int(np.bincount(train_labels).max())):
        further = f"no class has more than {most} training images, and l2 is chosen on further ones"
        raise UserError(f"few-shot: shots are {shots}, but {further}; give fewer")


def fewshot(train_features: Any, train_labels: Any, features: Any, shots: int = 5, seed: int = 0) -> np.ndarray:
    """The classes (M,) that ridge regression on a few of the training images (N, D) gives to features (M, D).

    `shots` images of each class are drawn by the seed, all of a smaller class. As big_vision's fewshot_lsr.py does for
    2010.11929, section 4.1, features are standardised, targets -1 and 1, and thirty l2 strengths tried. It reports the
    best on the test images; here it is the best on further training images, as many again and at least ten of a class.
    UserError if there are none.
    """
    check_shots(train_labels, shots)
    from sklearn.linear_model import Ridge

    bank, features = (np.asarray(each, np.float64) for each in (train_features, features))
    labels, drawn = np.asarray(train_labels), np.random.default_rng(seed).permutation(len(bank))
    order, counts = drawn[np.argsort(labels[drawn], kind="stable")], np.bincount(labels)
    place = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # in its class, as drawn
    few, further = order[place < shots], order[(place >= shots) & (place < shots + max(shots, 10))]
    mean, std, targets = bank[few].mean(0), bank[few].std(0) + 1e-5, 2.0 * np.eye(len(counts))[labels[few]] - 1
    whitened = ((part - mean) / std for part in (bank[few], bank[further], features))
    train, held, test = (np.pad(part, ((0, 0), (0, 1)), constant_values=BIAS) for part in whitened)
    models = [Ridge(alpha=l2, fit_intercept=False).fit(train, targets) for l2 in L2]
    right = [(model.predict(held).argmax(1) == labels[further]).mean() for model in models]
    found: np.ndarray = models[int(np.argmax(right))].predict(test).argmax(1)
    return found
