"""Position embeddings: resampling a learned table to another grid."""

import torch
from torch import Tensor
from torch.nn import functional as F


def resample(table: Tensor, source: tuple[int, int], target: tuple[int, int], prefix: int = 1) -> Tensor:
    """Resample a learned position table to another patch grid (2010.11929, section 3.2).

    The prefix positions (class token) are kept; the rest is interpolated as an image, bicubic and antialiased in
    float32, which is timm's convention.

    Args:
        table: positions, (1, prefix + source height * source width, D).
        source: (height, width) of the table's grid, in patches.
        target: (height, width) of the wanted grid, in patches.
        prefix: the number of leading positions that belong to no patch.

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
    grid = F.interpolate(grid, size=target, mode="bicubic", antialias=True)
    return torch.cat([kept, grid.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)
