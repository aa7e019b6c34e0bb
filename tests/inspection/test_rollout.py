"""Rollout and attention distance, against their definitions written out."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomized

from vitlit.inspection import attention, attention_distance, rollout
from vitlit.model import ViT

TINY: dict[str, Any] = {"image_size": (24, 40), "patch_size": 8, "width": 24, "depth": 3, "heads": 3, "mlp_dim": 48}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("options", [{}, {"registers": 2, "qk_norm": True}, {"pool": "gap"}, {"distilled": True}])
def test_rollout_is_the_product_of_its_paper(options: dict[str, Any]) -> None:
    """2005.00928, section 3: the rollout of layer i is A(i) times that of layer i - 1, A = 0.5 W + 0.5 I."""
    vit, images = randomized(ViT(**TINY, **options), 0.3), torch.randn(2, 3, 24, 40)
    found = rollout(vit, images)
    tokens = vit.prefix + 15
    for image in range(2):
        rolled = np.eye(tokens)
        for block in range(3):
            weights = attention(vit, images, block)[image].double().numpy()
            added = 0.5 * weights.mean(axis=0) + 0.5 * np.eye(tokens)
            rolled = added / added.sum(axis=-1, keepdims=True) @ rolled
        assert np.abs(rolled - np.eye(tokens)).max() > 0.5
        np.testing.assert_allclose(found[image].numpy(), rolled, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, tokens))


def test_a_rollout_of_the_residual_alone_is_the_identity() -> None:
    vit = ViT(**TINY).eval()
    torch.testing.assert_close(rollout(vit, torch.randn(1, 3, 24, 40), residual=1)[0], torch.eye(16))


def mean_distance(rows: int, columns: int) -> float:
    """Between two points of a grid drawn at random: (R - |y|)(C - |x|) of the (RC)^2 pairs are (y, x) apart."""
    y, x = np.mgrid[1 - rows : rows, 1 - columns : columns]
    return float(((rows - abs(y)) * (columns - abs(x)) * np.hypot(y, x)).sum() / (rows * columns) ** 2)


@pytest.mark.parametrize("options", [{}, {"registers": 2}, {"pool": "gap"}])
def test_the_distance_of_uniform_attention_is_the_mean_distance_of_patches(options: dict[str, Any]) -> None:
    assert mean_distance(1, 2) == 0.5
    assert mean_distance(2, 2) == pytest.approx((2 + 2**0.5) / 4)
    vit = randomized(ViT(**TINY, **options), 0.3)
    blocks: Any = vit.blocks
    with torch.no_grad():
        for block in blocks:
            block.attn.qkv.weight[:24] = 0  # queries of 0 like all keys
            block.attn.qkv.bias[:24] = 0
    found = attention_distance(vit, torch.randn(2, 3, 24, 40))
    torch.testing.assert_close(found, torch.full((3, 3), 8 * mean_distance(3, 5)))
    other = attention_distance(vit, torch.randn(1, 3, 16, 16))
    torch.testing.assert_close(other, torch.full((3, 3), 8 * mean_distance(2, 2)))


def test_the_distance_is_the_mean_over_queries_weighted_by_attention_among_patches() -> None:
    vit, images = randomized(ViT(**TINY, registers=1), 0.5), torch.randn(2, 3, 24, 40)
    found = attention_distance(vit, images)
    for block in range(3):
        weights = attention(vit, images, block).double().numpy()[:, :, 2:, 2:]
        total = np.zeros(3)
        for i in range(15):
            for j in range(15):
                apart = 8 * np.hypot(i // 5 - j // 5, i % 5 - j % 5)
                total += (weights[:, :, i, j] / weights[:, :, i].sum(-1)).mean(0) * apart / 15
        np.testing.assert_allclose(found[block].numpy(), total, rtol=1e-5)
    assert found.std() > 0.1
