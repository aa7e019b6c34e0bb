"""Positions of a grid (rows, columns) of patches: a learned table, fixed sines and cosines, rotary embeddings."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vitlit.model.config import Resampling

Rotary = tuple[Tensor, Tensor]
Grid = tuple[int, int]


def resample(
    table: Tensor, source: Grid, target: Grid, prefix: int = 1, resampling: Resampling = "antialias"
) -> Tensor:
    """Resample a learned position table to another grid (2010.11929, section 3.2), in float32.

    The table is (1, prefix + rows * columns, D); its first `prefix` positions (class token) are kept. antialias is
    timm's convention, bicubic. bicubic does not antialias (transformers' DINOv2). offset does not either, and scales by
    (target + 0.1) / source (facebookresearch/dinov2, `vision_transformer.py`). bilinear keeps the corners in place
    (scipy.ndimage.zoom of order 1, which google-research's vision_transformer and big_vision call).
    """
    if table.shape[1] != prefix + math.prod(source):
        raise ValueError("a table of length {} is not {} + {} x {} positions".format(table.shape[1], prefix, *source))
    if source == target:
        return table
    grid = table[:, prefix:].float().reshape(1, *source, -1).permute(0, 3, 1, 2)
    if resampling == "offset":
        scale = ((target[0] + 0.1) / source[0], (target[1] + 0.1) / source[1])
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
    elif resampling == "bilinear":
        grid = F.interpolate(grid, size=target, mode="bilinear", align_corners=True)
    else:
        grid = F.interpolate(grid, size=target, mode="bicubic", antialias=resampling == "antialias")
    return torch.cat([table[:, :prefix], grid.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def sincos2d(grid: Grid, width: int, convention: str) -> Tensor:
    """Fixed positions [sin x, cos x, sin y, cos y] (2205.01580, section 3.1): (1, rows * columns, D), float32.

    The conventions space the D / 4 frequencies 10000^-e differently: e is i / (D / 4 - 1) in big_vision (sincos2d),
    i / (D / 4) in MAE (sincos2d_mae; 2111.06377, `util/pos_embed.py`). The tables differ by up to 0.05.
    """
    quarter = width // 4
    steps = quarter - 1 if convention == "sincos2d" else quarter
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / max(1, steps))
    y, x = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (x, y)]
    return torch.cat([f(axis) for axis in angles for f in (torch.sin, torch.cos)], dim=1).float()[None]


def rotary2d(grid: Grid, head_width: int, prefix: int, like: Tensor, keep: Tensor | None = None) -> Rotary:
    """Cosines and sines of DINOv3's axial rotary embedding, base 100 (2508.10104, section 3.2).

    A patch's centre is (y, x) in [-1, 1]. Half of a head's channel pairs rotate with y, half with x; the `prefix`
    tokens before the patches do not. `keep` (B, K) are the indices of the only patches present.
    Both are (prefix + rows * columns, head_width), or (B, 1, prefix + K, head_width) with `keep`.
    """
    device = like.device
    frequencies = 100.0 ** -(torch.arange(head_width // 4, dtype=torch.float32, device=device) * (4 / head_width))
    sides = [2 * (torch.arange(side, dtype=torch.float32, device=device) + 0.5) / side - 1 for side in grid]
    centres = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).reshape(-1, 2)
    angles = (2 * math.pi * centres[:, :, None] * frequencies).flatten(1).repeat(1, 2)
    if keep is not None:
        angles = angles[keep][:, None]
    angles = F.pad(angles, (0, 0, prefix, 0))  # an angle of zero does not rotate
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate queries or keys (B, heads, tokens, channels); channel i pairs with channel i + channels / 2."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
