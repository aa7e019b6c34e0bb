"""Temperature and reliability against scipy's and scikit-learn's."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import user_error
from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV, calibration_curve
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import log_loss
from test_classify import made

from vitlit.evaluation import classify, reliability, temperature


class Logits(ClassifierMixin, BaseEstimator):
    """A classifier whose features are its logits."""

    classes_ = np.arange(8)

    def fit(self, *_: Any) -> "Logits":
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def predict(self, logits: np.ndarray) -> np.ndarray:
        return logits.argmax(1)

    def decision_function(self, logits: np.ndarray) -> np.ndarray:
        return logits


@pytest.mark.parametrize("sharper", [0.3, 1.0, 3.0])
def test_the_temperature_is_scikit_learns_and_has_the_least_loss(sharper: float) -> None:
    logits, labels = made(3000, sharper=sharper)
    labels[:10] = 7  # scikit-learn wants an image of each class
    found = temperature(logits.numpy(), labels.numpy())
    assert found == pytest.approx(sharper, rel=0.2)
    scaled = CalibratedClassifierCV(FrozenEstimator(Logits()), method="temperature").fit(logits.numpy(), labels.numpy())
    np.testing.assert_allclose((logits / found).softmax(1), scaled.predict_proba(logits.numpy()), atol=1e-6)
    loss = lambda exponent: log_loss(labels, (logits / np.exp(exponent)).softmax(1))  # noqa: E731
    least = minimize_scalar(loss, bounds=(-4, 4), method="bounded", options={"xatol": 1e-9})
    assert loss(np.log(found)) <= least.fun + 1e-12
    for scale in (7, 1e-4):  # the network of a short training has small logits
        assert temperature(scale * logits, labels) == pytest.approx(scale * found, rel=1e-9)


def test_a_temperature_changes_no_class_and_lowers_the_loss_of_others() -> None:
    logits, labels = made(4000)
    found = temperature(logits[:2000], labels[:2000])
    before, after = (classify(each[2000:], labels[2000:]) for each in (logits, logits / found))
    assert after["nll"] < before["nll"] - 0.1
    assert after["ece"] < before["ece"] / 2
    assert [after[name] for name in ("top1", "top5")] == [before[name] for name in ("top1", "top5")]


def test_where_no_temperature_is_best_it_is_refused() -> None:
    logits = made(50)[0]
    user_error("50 images.*all are right.*more images", temperature, logits, logits.argmax(1))
    user_error("tell too little", temperature, logits, logits.argmin(1))


@pytest.mark.parametrize("bins", [5, 15])
def test_reliability_is_scikit_learns(bins: int) -> None:
    logits, labels = made()
    found = reliability(logits, labels, bins)
    confidence, first = logits.softmax(1).max(1)
    right = (first == labels).numpy()
    accuracies, confidences = calibration_curve(right, confidence, n_bins=bins)
    some = found.images > 0
    assert not some.all()  # the most likely of eight classes has at least an eighth
    np.testing.assert_allclose(found.accuracy[some], accuracies, atol=1e-12)
    np.testing.assert_allclose(found.confidence[some], confidences, atol=1e-12)
    assert np.isnan(found.accuracy[~some]).all()
    assert found.images.sum() == len(labels)
    again: Any = reliability(logits.log_softmax(1), labels, bins)
    assert all(np.allclose(one, other, equal_nan=True) for one, other in zip(found, again, strict=True))
    if bins == 15:
        error = np.nansum(found.images * np.abs(found.accuracy - found.confidence)) / len(labels)
        assert error == pytest.approx(classify(logits, labels)["ece"], abs=1e-12)


def test_a_probability_of_one_is_in_the_last_bin() -> None:
    found = reliability(torch.tensor([[1000.0, 0.0], [0.0, 1000.0]]), torch.tensor([0, 0]), 4)
    assert found.images.tolist() == [0, 0, 0, 2]
    assert (found.confidence[3], found.accuracy[3]) == (1, 0.5)
