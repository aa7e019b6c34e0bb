"""Resampling a learned position table, against timm."""

import itertools
import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import zoom  # type: ignore[import-untyped]
from test_family import TINY, tiny
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor
from torch.nn import functional as F

from vitlit.model import ViT
from vitlit.model.position import resample, rotary2d, rotate, sincos2d

WIDTH = 24


def table(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, length, WIDTH, generator=generator).to(dtype)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((7, 7), (12, 12)),
        ((12, 12), (7, 7)),
        ((7, 7), (14, 5)),
        ((4, 9), (10, 20)),
        ((10, 20), (9, 4)),
        ((4, 9), (9, 4)),
        ((3, 3), (1, 1)),
    ],
)
def test_equals_timm(source: tuple[int, int], target: tuple[int, int], prefix: int) -> None:
    positions = table(prefix + source[0] * source[1])
    expected = resample_abs_pos_embed(positions, list(target), list(source), num_prefix_tokens=prefix)
    resampled = resample(positions, source, target, prefix)
    assert resampled.shape == (1, prefix + target[0] * target[1], WIDTH)
    torch.testing.assert_close(resampled, expected, rtol=0, atol=1e-6)
    assert torch.equal(resampled[:, :prefix], positions[:, :prefix])


@pytest.mark.parametrize("source", [(7, 7), (4, 9), (24, 24)])
@pytest.mark.parametrize("target", [(12, 12), (5, 14), (3, 1)])
def test_bilinear_is_googles_zoom(source: tuple[int, int], target: tuple[int, int]) -> None:
    """`resample_posemb` of big_vision (models/vit.py), `interpolate_posembed` of vision_transformer (checkpoint.py)."""
    positions = table(1 + source[0] * source[1])
    grid = positions[0, 1:].reshape(*source, WIDTH).numpy()
    expected = torch.from_numpy(zoom(grid, (target[0] / source[0], target[1] / source[1], 1), order=1))
    resampled = resample(positions, source, target, resampling="bilinear")
    torch.testing.assert_close(resampled[0, 1:].reshape(*target, WIDTH), expected, rtol=0, atol=1e-5)
    assert torch.equal(resampled[:, :1], positions[:, :1])


def test_prefix_is_one_by_default() -> None:
    positions = table(1 + 9)
    assert torch.equal(resample(positions, (3, 3), (5, 5)), resample(positions, (3, 3), (5, 5), prefix=1))


def test_same_grid_changes_nothing() -> None:
    positions = table(1 + 4 * 9)
    assert torch.equal(resample(positions, (4, 9), (4, 9)), positions)


def test_rows_are_the_height() -> None:
    """A table that varies along the height only still does after resampling."""
    positions = torch.arange(3.0).reshape(1, 3, 1, 1).expand(1, 3, 5, WIDTH).reshape(1, 15, WIDTH)
    grid = resample(positions, (3, 5), (6, 10), prefix=0).reshape(6, 10, WIDTH)
    torch.testing.assert_close(grid, grid[:, :1].expand(6, 10, WIDTH))
    assert (grid[1:, 0, 0] > grid[:-1, 0, 0]).all()


def test_dtype_is_kept() -> None:
    positions = table(1 + 49, torch.bfloat16)
    resampled = resample(positions, (7, 7), (12, 12))
    assert resampled.dtype == torch.bfloat16
    assert torch.equal(resampled, resample(positions.float(), (7, 7), (12, 12)).bfloat16())  # one rounding, at the end


def test_differentiable() -> None:
    positions = table(1 + 49).requires_grad_()
    resample(positions, (7, 7), (12, 12)).square().sum().backward()
    assert positions.grad is not None
    assert (positions.grad != 0).all()


@pytest.mark.parametrize(("length", "prefix"), [(50, 0), (49, 1), (50, 2), (197, 1)])
def test_wrong_length(length: int, prefix: int) -> None:
    with pytest.raises(ValueError, match=rf"length {length} is not {prefix} \+ 7 x 7 positions"):
        resample(table(length), (7, 7), (14, 14), prefix)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def turned(x: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The rotary embedding of DINOv3 (2508.10104) of (patches, channels), as a product of complex numbers."""
    half = x.shape[1] // 2
    out = np.empty((len(x), half), complex)
    for row, column in itertools.product(range(grid[0]), range(grid[1])):
        patch = row * grid[1] + column
        for i in range(half):
            side, place = (grid[0], row) if i < half // 2 else (grid[1], column)
            period = 100 ** (i % (half // 2) / (half // 2))
            angle = 2 * math.pi * (2 * (place + 0.5) / side - 1) / period
            out[patch, i] = complex(x[patch, i], x[patch, i + half]) * np.exp(1j * angle)
    return np.concatenate([out.real, out.imag], axis=1)


@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (5, 1)])
@pytest.mark.parametrize("channels", [4, 16])
def test_rope_is_the_papers_formula(grid: tuple[int, int], channels: int) -> None:
    x = torch.randn(1, 1, math.prod(grid), channels)
    result = rotate(x, rotary2d(grid, channels, 0, like=x))[0, 0]
    expected = torch.from_numpy(turned(x[0, 0].double().numpy(), grid)).float()
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def scores(grid: tuple[int, int]) -> Tensor:
    """Products of one query and one key that stand at every patch: (rows, columns, rows, columns)."""
    generator = torch.Generator().manual_seed(1)
    patches = math.prod(grid)
    q, k = (torch.randn(1, 1, 1, 8, generator=generator).expand(1, 1, patches, 8) for _ in range(2))
    rotary = rotary2d(grid, 8, 0, like=q)
    return (rotate(q, rotary) @ rotate(k, rotary).transpose(-1, -2)).reshape(*grid, *grid)


def test_rope_scores_depend_on_the_displacement_only() -> None:
    found = defaultdict(list)
    product = scores((4, 5))
    for a, b, c, d in itertools.product(range(4), range(5), range(4), range(5)):
        found[c - a, d - b].append(product[a, b, c, d])
    assert len(found) == 7 * 9
    for values in found.values():
        torch.testing.assert_close(torch.stack(values), values[0].expand(len(values)), rtol=0, atol=1e-5)
    first = torch.stack([values[0] for values in found.values()])
    assert (first[:, None] - first).abs().triu(1).gt(1e-4).sum() == 63 * 62 // 2


def test_rope_places_are_relative_to_the_image() -> None:
    """Two patches of a grid of half the patch size are as far apart as one."""
    torch.testing.assert_close(scores((3, 4))[0, 0, 1, 1], scores((6, 8))[0, 0, 2, 2], rtol=0, atol=1e-5)
    assert (scores((3, 4))[0, 0, 1, 1] - scores((6, 8))[0, 0, 1, 1]).abs() > 1e-2


def test_rope_does_not_turn_the_prefix() -> None:
    x = torch.randn(2, 3, 5 + 6, 8)
    result = rotate(x, rotary2d((2, 3), 8, 5, like=x))
    assert torch.equal(result[:, :, :5], x[:, :, :5])
    assert torch.equal(result[:, :, 5:], rotate(x[:, :, 5:], rotary2d((2, 3), 8, 0, like=x)))
    assert (result[:, :, 5:] - x[:, :, 5:]).abs().amax(dim=-1).min() > 1e-2


def test_rope_keeps_lengths() -> None:
    x = torch.randn(2, 3, 12, 16)
    torch.testing.assert_close(rotate(x, rotary2d((3, 4), 16, 0, like=x)).norm(dim=-1), x.norm(dim=-1))


def test_encode_takes_the_grid_of_its_tokens() -> None:
    vit = tiny(position="rope", registers=2)
    images = torch.randn(2, 3, 16, 64)
    features = vit.features(images)
    assert torch.equal(vit.encode(vit.embed(images), (2, 8)), features)
    assert (vit.encode(vit.embed(images), (8, 2)) - features).abs().max() > 1e-3


@pytest.mark.parametrize("position", ["learned", "sincos2d", "sincos2d_mae", "rope", "none"])
def test_only_without_positions_is_the_order_of_the_patches_lost(position: str) -> None:
    vit = tiny(pool="gap", position=position)
    images = torch.randn(2, 3, 32, 32)
    patches = F.unfold(images, 8, stride=8)
    shuffled = F.fold(patches[:, :, torch.randperm(16)], (32, 32), 8, stride=8)
    difference = (vit(shuffled) - vit(images)).abs().max()
    assert difference < 1e-5 if position == "none" else difference > 1e-3


def big_vision(height: int, width: int, channels: int) -> np.ndarray:
    """`posemb_sincos_2d` of big_vision, models/vit.py."""
    rows, columns = np.mgrid[:height, :width]
    omega = 1 / 10_000.0 ** (np.arange(channels // 4) / (channels // 4 - 1))
    y, x = np.outer(rows.flatten(), omega), np.outer(columns.flatten(), omega)
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)


def mae(height: int, width: int, channels: int) -> np.ndarray:
    """`get_2d_sincos_pos_embed` of MAE, util/pos_embed.py: the first half is of the columns, whatever its name."""

    def one(places: np.ndarray) -> np.ndarray:
        omega = 1 / 10_000 ** (np.arange(channels // 4, dtype=float) / (channels / 4))
        return np.concatenate([np.sin(np.outer(places, omega)), np.cos(np.outer(places, omega))], axis=1)

    across, down = np.meshgrid(np.arange(width, dtype=float), np.arange(height, dtype=float))
    return np.concatenate([one(across.flatten()), one(down.flatten())], axis=1)


@pytest.mark.parametrize("grid", [(14, 14), (3, 9), (16, 2)])
@pytest.mark.parametrize(("convention", "formula"), [("sincos2d", big_vision), ("sincos2d_mae", mae)])
def test_sines_and_cosines_are_the_references(convention: Any, formula: Any, grid: tuple[int, int]) -> None:
    expected = torch.from_numpy(formula(*grid, 384)).float()[None]
    torch.testing.assert_close(sincos2d(grid, 384, convention), expected, rtol=0, atol=1e-6)
    vit = ViT(**{**TINY, "image_size": (8 * grid[0], 8 * grid[1]), "width": 384, "depth": 1}, position=convention)
    torch.testing.assert_close(vit.pos_embed, expected, rtol=0, atol=1e-6)


def test_the_two_conventions_differ_by_up_to_0_049() -> None:
    difference = (sincos2d((14, 14), 384, "sincos2d") - sincos2d((14, 14), 384, "sincos2d_mae")).abs().max()
    assert 0.045 < difference < 0.05


@pytest.mark.parametrize("position", ["sincos2d", "sincos2d_mae"])
def test_sines_and_cosines_are_added_to_the_patches_of_any_grid(position: Any) -> None:
    vit = tiny(position=position, registers=2)
    for height, width in ((32, 32), (24, 56)):
        images = torch.randn(2, 3, height, width)
        tokens = vit.embed(images)
        expected = vit.patch_embed(images) + sincos2d((height // 8, width // 8), 24, position)
        torch.testing.assert_close(tokens[:, 3:], expected)
        prefix = torch.cat([vit.get_parameter("cls_token"), vit.get_parameter("reg_token")], dim=1)
        assert torch.equal(tokens[:, :3], prefix.expand(2, -1, -1))


@pytest.mark.parametrize(
    ("resampling", "how"),
    [
        ("antialias", {"size": (3, 6), "antialias": True}),
        ("bicubic", {"size": (3, 6)}),
        ("offset", {"scale_factor": (3.1 / 4, 6.1 / 4)}),
    ],
)
def test_resampling_is_the_one_asked_for(resampling: str, how: dict[str, Any]) -> None:
    """The offset of 0.1 patches is DINOv2's (`interpolate_pos_encoding`), whose registers models have antialias."""
    vit = tiny(resampling=resampling)
    table = vit.get_parameter("pos_embed")
    grid = F.interpolate(table[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2), mode="bicubic", **how)
    expected = torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, 18, 24)], dim=1)
    torch.testing.assert_close(vit.positions((3, 6)), expected)


@pytest.mark.parametrize("position", ["sincos2d", "sincos2d_mae", "rope", "none"])
def test_only_learned_positions_are_saved_or_trained(position: str) -> None:
    vit = tiny(position=position)
    assert "pos_embed" not in vit.state_dict()
    assert "pos_embed" not in dict(vit.named_parameters())
    assert (vit.pos_embed is None) == (position in ("rope", "none"))
    assert "pos_embed" in tiny().state_dict()
