"""Nearest neighbours and the rank of features, against scikit-learn and their formulas."""

import importlib

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from vitlit.evaluation import deviation, effective_rank, knn


def features(seed: int, images: int, classes: int = 7, width: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Classes that overlap, of features of any length."""
    centres = np.random.default_rng(0).normal(size=(classes, width))
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, images)
    lengths = draw.uniform(0.1, 10, (images, 1))
    return (centres[labels] + 2.5 * draw.normal(size=(images, width))) * lengths, labels


@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (1, 0.07), (50, 1.0), (500, 0.02)])
def test_the_accuracy_is_scikit_learns(k: int, temperature: float) -> None:
    train, labels = features(1, 300)
    images, truth = features(2, 200)
    of_scikit = KNeighborsClassifier(
        min(k, 300), metric="cosine", algorithm="brute", weights=lambda apart: np.exp((1 - apart) / temperature)
    )
    expected = of_scikit.fit(train, labels).score(images, truth)
    assert 0.3 < expected < 0.99
    assert knn(train, labels, images, truth, k, temperature) == pytest.approx(expected, abs=1e-12)
    half = [torch.from_numpy(part).float() for part in (train, images)]
    assert knn(half[0], labels, half[1], truth, k, temperature) == pytest.approx(expected, abs=0.006)  # an image


def test_neighbours_vote_by_their_similarity() -> None:
    """Two that are near win over three that are not, until a temperature makes all count alike."""
    angles = torch.tensor([0.1, -0.1, 1.0, 1.1, -1.0])
    train, labels = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 0, 1, 1, 1])
    image = torch.tensor([[3.0, 0.0]])
    assert knn(train, labels, image, [0], k=5) == 1
    assert knn(train, labels, image, [1], k=5, temperature=100.0) == 1
    assert knn(train, labels, image, [0], k=2, temperature=100.0) == 1


def test_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    (train, labels), (images, truth) = features(1, 300), features(2, 200)
    whole = knn(train, labels, images, truth)
    monkeypatch.setattr(importlib.import_module("vitlit.evaluation.knn"), "SIMILARITIES", 1000)  # three images
    assert knn(train, labels, images, truth) == whole


def with_singular_values(values: list[float], rows: int, width: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64))[0] for n in (rows, width))
    return left[:, : len(values)] @ torch.tensor(values, dtype=torch.float64).diag() @ right[: len(values)]


def test_the_rank_is_the_entropy_of_the_singular_values() -> None:
    values = [5.0, 2.0, 1.0, 0.25, 1e-3]
    shares = np.array(values) / sum(values)
    expected = np.exp(-(shares * np.log(shares)).sum())
    for rows, width in ((40, 12), (9, 30)):
        made = with_singular_values(values, rows, width)
        assert effective_rank(made).item() == pytest.approx(expected, rel=1e-12)
        assert effective_rank(1000 * made.float()).item() == pytest.approx(expected, rel=1e-4)
    assert effective_rank(with_singular_values([3.0] * 8, 40, 12)).item() == pytest.approx(8)
    assert effective_rank(torch.ones(40, 12)).item() == pytest.approx(1, rel=1e-3)
    assert effective_rank(torch.tensor([[1.0, torch.inf], [0.0, 1.0]])).isnan()


def test_the_deviation_is_one_of_features_in_all_directions_and_zero_of_one() -> None:
    draw = np.random.default_rng(0).normal(size=(20_000, 32))
    assert deviation(torch.from_numpy(draw)).item() == pytest.approx(1, abs=0.01)
    lengths = np.random.default_rng(1).uniform(0.1, 10, (50, 1))
    assert deviation(torch.from_numpy(draw[:1] * lengths)).item() == pytest.approx(0, abs=1e-7)
    shifted = draw + 2
    unit = shifted / np.linalg.norm(shifted, axis=1, keepdims=True)
    assert deviation(torch.from_numpy(shifted)).item() == pytest.approx(unit.std(0).mean() * 32**0.5, rel=1e-12)
