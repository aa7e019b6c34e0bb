"""Positions: a learned table and its resampling, fixed sines and cosines, rotary embeddings."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Resampling = Literal["antialias", "bicubic", "offset"]


def resample(
    table: Tensor,
    source: tuple[int, int],
    target: tuple[int, int],
    prefix: int = 1,
    resampling: Resampling = "antialias",
) -> Tensor:
    """Resample a learned position table to another patch grid (2010.11929, section 3.2).

    The prefix positions (class token) are kept; the rest is interpolated as an image, bicubic in float32.

    Args:
        table: positions, (1, prefix + source height * source width, D).
        source: (height, width) of the table's grid, in patches.
        target: (height, width) of the wanted grid, in patches.
        prefix: the number of leading positions that belong to no patch.
        resampling: antialias is timm's convention; bicubic is the same without antialiasing (transformers' DINOv2);
            offset scales by (target + 0.1) / source, without antialiasing, too (facebookresearch/dinov2,
            `vision_transformer.py`).

    Returns:
        (1, prefix + target height * target width, D), of the table's dtype.

    Raises:
        ValueError: the table's length is not prefix + source height * source width.
    """
    if table.shape[1] != prefix + source[0] * source[1]:
        raise ValueError(
            f"a position table of length {table.shape[1]} is not {prefix} + {source[0]} x {source[1]} positions"
        )
    if source == target:
        return table
    kept, grid = table[:, :prefix], table[:, prefix:]
    grid = grid.float().reshape(1, *source, -1).permute(0, 3, 1, 2)
    if resampling == "offset":
        scale = ((target[0] + 0.1) / source[0], (target[1] + 0.1) / source[1])
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
    else:
        grid = F.interpolate(grid, size=target, mode="bicubic", antialias=resampling == "antialias")
    return torch.cat([kept, grid.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def sincos2d(grid: tuple[int, int], width: int, convention: str) -> Tensor:
    """Fixed positions [sin x, cos x, sin y, cos y] of a patch grid (2205.01580, section 3.1).

    With D / 4 frequencies 10000^-e, e runs over i / (D / 4 - 1) in big_vision (sincos2d) and over i / (D / 4) in MAE
    (sincos2d_mae; 2111.06377, `util/pos_embed.py`); the two tables differ by up to 0.05.

    Args:
        grid: (height, width) in patches.
        width: D, divisible by 4.
        convention: whose frequencies, sincos2d or sincos2d_mae.

    Returns:
        (1, grid height * grid width, D), float32.
    """
    quarter = width // 4
    steps = quarter - 1 if convention == "sincos2d" else quarter
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / max(1, steps))
    y, x = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (x, y)]
    return torch.cat([f(axis) for axis in angles for f in (torch.sin, torch.cos)], dim=1).float()[None]


def rotary2d(
    grid: tuple[int, int], head_width: int, prefix: int, like: Tensor, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the axial rotary embedding of DINOv3 (2508.10104, section 3.2; its base is 100).

    A patch's centre is (y, x) in [-1, 1]; half of a head's channel pairs turn with y, half with x. Prefix tokens
    do not turn.

    Args:
        grid: (height, width) in patches.
        head_width: channels of a head, divisible by 4.
        prefix: the number of tokens before the patches.
        like: a tensor whose device and dtype the result gets.
        keep: indices of the only patches there are, (B, K), int64.

    Returns:
        two tensors (prefix + grid height * grid width, head_width), or (B, 1, prefix + K, head_width) with `keep`, for
        `rotate`.
    """
    device = like.device
    frequencies = 100.0 ** -(torch.arange(head_width // 4, dtype=torch.float32, device=device) * (4 / head_width))
    sides = [2 * (torch.arange(side, dtype=torch.float32, device=device) + 0.5) / side - 1 for side in grid]
    centres = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).reshape(-1, 2)
    angles = (2 * math.pi * centres[:, :, None] * frequencies).flatten(1).repeat(1, 2)
    if keep is not None:
        angles = angles[keep][:, None]
    angles = F.pad(angles, (0, 0, prefix, 0))  # an angle of zero turns nothing
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn queries or keys (B, heads, tokens, channels), channel i together with channel i + channels / 2."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
