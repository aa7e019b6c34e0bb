"""Resampling a learned position table, against timm."""

import pytest
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from vitlit.model.position import resample

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
