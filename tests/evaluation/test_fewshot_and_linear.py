"""Few-shot regression against big_vision's closed form, logistic against scikit-learn's, the probe against SGD."""

import importlib

import numpy as np
import pytest
import torch
from conftest import user_error
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_knn import features

from vitlit.evaluation import fewshot, folds, linear, logistic


def big_visions(train: np.ndarray, labels: np.ndarray, l2: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard deviation and weights, as `_precompute_cache` of its evaluators/fewshot_lsr.py has them."""
    mean, std = train.mean(0), train.std(0) + 1e-5
    x = np.hstack([(train - mean) / std, np.full((len(train), 1), 100.0)])
    y = 2.0 * np.eye(labels.max() + 1)[labels] - 1
    if len(x) >= x.shape[1]:
        values, vectors = np.linalg.eigh(x.T @ x)
        left, right = vectors, vectors.T @ (x.T @ y)
    else:
        values, vectors = np.linalg.eigh(x @ x.T)
        left, right = x.T @ vectors, vectors.T @ y
    return mean, std, (left / (values + l2)) @ right


@pytest.mark.parametrize("shots", [1, 5, 10, 25])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_regression_is_big_visions(shots: int, seed: int) -> None:
    (train, labels), (images, _) = features(1, 400), features(2, 200)
    drawn = np.random.default_rng(seed).permutation(len(labels))
    by_class = [[row for row in drawn if labels[row] == number] for number in range(7)]
    few = np.concatenate([rows[:shots] for rows in by_class])
    held = np.concatenate([rows[shots : shots + max(shots, 10)] for rows in by_class])

    def classes(part: np.ndarray, power: int) -> np.ndarray:
        mean, std, weights = big_visions(train[few], labels[few], 2.0**power)
        found: np.ndarray = (np.hstack([(part - mean) / std, np.full((len(part), 1), 100.0)]) @ weights).argmax(1)
        return found

    best = max(range(-10, 20), key=lambda power: (classes(train[held], power) == labels[held]).sum())
    assert np.array_equal(fewshot(train, labels, images, shots, seed), classes(images, best))


def test_other_shots_are_other_classes() -> None:
    (train, labels), (images, truth) = features(1, 400), features(2, 200)
    right = [(fewshot(train, labels, images, shots) == truth).mean() for shots in (1, 25)]
    assert 1 / 7 < right[0] < right[1]
    assert not np.array_equal(fewshot(train, labels, images, 5, 0), fewshot(train, labels, images, 5, 1))
    user_error(
        "shots are 100, but no class has more than 70 training images.*; give fewer",
        fewshot,
        train,
        labels,
        images,
        100,
    )


@pytest.mark.parametrize("grouped", [False, True])
def test_logistic_regression_is_the_best_of_a_grid_on_a_tenth(grouped: bool) -> None:
    (train, labels), (images, truth) = features(1, 300), features(2, 200)
    groups = np.arange(300) // 3 if grouped else None
    tenth = np.where(folds(labels, 10, groups, 5) == 0, 0, -1)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    grid = {"logisticregression__C": [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100]}
    best = GridSearchCV(model, grid, cv=PredefinedSplit(tenth)).fit(train, labels)
    found = logistic(train, labels, images, 5, groups)
    assert np.array_equal(found, best.predict(images))
    assert 0.5 < (found == truth).mean() < 0.95


def test_the_layers_learn_by_sgd_with_a_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("vitlit.evaluation.linear")
    x, labels = (torch.as_tensor(part) for part in features(1, 150))
    inputs, rates, steps = x.float(), (1e-3, 0.1), 9
    for name, value in (("RATES", rates), ("STEPS", steps), ("EPOCHS", 0)):
        monkeypatch.setattr(module, name, value)
    found = module.train_layers(inputs, labels, 7, 3)
    draw = torch.Generator().manual_seed(3)
    first = 0.01 * torch.randn(24, 7, generator=draw).T.double()
    order = torch.cat([torch.randperm(150, generator=draw)[:128] for _ in range(steps)]).split(128)
    for layer, rate in zip(found.unbind(1), rates, strict=True):
        weights, bias, speed = (
            first.clone(),
            torch.zeros(7).double(),
            [torch.zeros(7, 24).double(), torch.zeros(7).double()],
        )
        for step, rows in enumerate(order):
            slopes = (x[rows] @ weights.T + bias).softmax(1) - torch.eye(7).double()[labels[rows]]
            speed = [0.9 * speed[0] + slopes.T @ x[rows] / 128, 0.9 * speed[1] + slopes.mean(0)]
            now = rate * 128 / 256 * (1 + np.cos(np.pi * step / steps)) / 2
            weights, bias = weights - now * speed[0], bias - now * speed[1]
        torch.testing.assert_close(layer[:-1].T.double(), weights, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer[-1].double(), bias, atol=1e-4, rtol=1e-4)


def test_the_best_features_and_rate_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a look at the test images: those of the features that tell nothing are never the best."""
    monkeypatch.setattr(importlib.import_module("vitlit.evaluation.linear"), "STEPS", 50)
    (train, labels), (images, truth) = features(1, 400), features(2, 200)
    noise = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    told, seen = ({"noise": noise[: len(part)], "told": torch.from_numpy(part).float()} for part in (train, images))
    found = linear(told, labels, seen)
    assert (found.numpy() == truth).mean() > 0.5
    assert torch.equal(found, linear(told, labels, seen))
