"""Filters, positions, features and occlusion, against scikit-learn and by planted facts."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomized, user_error
from sklearn.decomposition import PCA
from torch import Tensor

from vitlit.inspection import filter_components, occlusion, patch_components, position_similarity
from vitlit.model import ViT

TINY: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 48, "depth": 2, "heads": 3, "mlp_dim": 48}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def up_to_sign(found: Tensor, expected: Any) -> None:
    """Each row of two matrices is the same, or its negative."""
    rows, others = found.flatten(1).numpy(), torch.as_tensor(expected).flatten(1).numpy()
    signs = np.sign((rows * others).sum(1, keepdims=True))
    np.testing.assert_allclose(rows, signs * others, rtol=0, atol=2e-4)


def test_the_components_of_the_filters_are_orthonormal_and_those_of_scikit_learn() -> None:
    vit = randomized(ViT(**TINY), 0.5)
    found = filter_components(vit)
    assert found.shape == (28, 3, 8, 8)
    torch.testing.assert_close(found.flatten(1) @ found.flatten(1).T, torch.eye(28), rtol=0, atol=1e-5)
    assert (found.flatten(1).max(1).values == found.flatten(1).abs().max(1).values).all()
    filters = vit.patch_embed.proj.weight.detach().flatten(1).numpy()
    up_to_sign(found, PCA(28).fit(filters).components_)
    small = ViT(image_size=4, patch_size=2, width=12, depth=1, heads=1, mlp_dim=4, in_channels=1)
    assert filter_components(small).shape == (4, 1, 2, 2)


def test_the_components_of_patches_are_those_of_all_images_together() -> None:
    vit, images = randomized(ViT(**TINY, registers=1), 0.3), torch.randn(2, 3, 32, 16)
    found = patch_components(vit, images)
    assert found.shape == (2, 4, 2, 3)
    with torch.no_grad():
        features = vit.features(images)[:, 2:].flatten(0, 1).numpy()
    up_to_sign(found.flatten(0, 2).T, PCA(3).fit_transform(features).T.copy())


@pytest.mark.parametrize("options", [{}, {"class_position": False}, {"distilled": True}, {"position": "sincos2d"}])
def test_positions_are_compared_by_their_cosine(options: dict[str, Any]) -> None:
    vit = ViT(**{**TINY, "image_size": (16, 32)}, **options)
    found = position_similarity(vit)
    assert found.shape == (2, 4, 2, 4)
    assert vit.pos_embed is not None
    table = vit.pos_embed[0, -8:].detach().double().numpy()
    for i in range(8):
        for j in range(8):
            cosine = table[i] @ table[j] / np.linalg.norm(table[i]) / np.linalg.norm(table[j])
            assert found[i // 4, i % 4, j // 4, j % 4] == pytest.approx(cosine, abs=1e-5)


@pytest.mark.parametrize("position", ["rope", "none"])
def test_without_positions_there_is_nothing_to_compare(position: str) -> None:
    user_error(f"position: {position}", position_similarity, ViT(**TINY, position=position))


def seeing(patch: int, channels: int) -> ViT:
    """A ViT whose first class is as probable as one patch of a grid of 4 x 4 is bright."""
    vit = ViT(**{**TINY, "depth": 1}, pool="gap", num_classes=channels, position="none").eval()
    row, column = divmod(patch, 4)

    def logits(images: Tensor) -> Tensor:
        bright = images[:, 0, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8].mean((1, 2))
        return torch.stack([bright, *[torch.zeros_like(bright)] * (channels - 1)], 1)

    vit.forward = logits  # type: ignore[method-assign]
    return vit


def test_occlusion_finds_what_the_prediction_needs() -> None:
    vit, images = seeing(6, 2), torch.ones(2, 3, 32, 32)
    images[1] *= 3
    lost, classes = occlusion(vit, images, window=1)
    assert lost.shape == (2, 4, 4)
    assert classes.tolist() == [0, 0]
    expected = torch.zeros(2, 4, 4)
    expected[:, 1, 2] = torch.tensor([1.0, 3.0]).sigmoid() - 0.5
    torch.testing.assert_close(lost, expected)
    wide, _ = occlusion(vit, images[:1])  # three patches wide, at the edge two
    assert (wide[0] > 0.1).nonzero().tolist() == [[i, j] for i in range(3) for j in range(1, 4)]
    coarse, _ = occlusion(vit, images[:1], window=1, stride=3)
    assert coarse.shape == (1, 2, 2)


def test_occlusion_needs_a_head_with_classes() -> None:
    for classes in (0, 1):
        user_error(
            "no head that tells classes apart", occlusion, ViT(**TINY, num_classes=classes), torch.ones(1, 3, 32, 32)
        )
