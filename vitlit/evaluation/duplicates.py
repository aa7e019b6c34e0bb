"""Images that show the same picture."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vitlit.evaluation.knn import SIMILARITIES

SIDE = 32  # of a thumbnail, pixels
ROWS = 256  # images at a time, at most
LUMA = (0.299, 0.587, 0.114)  # of ITU-R BT.601, as in JPEG
COLOUR = 0.2  # the weight of colour beside luma: JPEG keeps it at half the resolution
SPREAD = 0.4  # how much of a local difference one level that the whole picture differs by explains
LOCAL, WHOLE = 3.2, 14.0  # levels of 255 by which the same picture differs at most: in one place, and all over


def duplicates(thumbnails: Any, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (P, 2) of images that show the same picture, resized, compressed or mirrored, and their differences (P,).

    Thumbnails are whole images squeezed to uint8 (N, 3, 32, 32). Each is compared with the k that are nearest at 8 x 8
    pixels, also mirrored. Compression and resizing change a picture everywhere, while two drawings of one kind differ
    in some places: the difference is the largest of the means over 4 x 4 pixels, in proportion to 1 + 0.4 times that of
    all pixels. Crops and rotations are not found. Pairs come with the lower row first, the smallest difference first.
    """
    small = torch.as_tensor(thumbnails)
    bank = torch.cat([F.adaptive_avg_pool2d(part.float(), 8) for part in small.split(ROWS)])
    both = torch.cat([bank, bank.flip(3)]).flatten(1) - 128
    count, squares, found = len(small), both.square().sum(1), dict[tuple[int, ...], float]()
    for rows in torch.arange(count).split(max(1, min(ROWS, SIMILARITIES // len(both)))):
        far = squares - 2 * both[rows] @ both.T  # but for what is the same for all of a row
        far.scatter_(1, torch.stack([rows, rows + count], 1), torch.inf)
        near = far.topk(min(k, count - 1), largest=False).indices
        ones, others = rows.repeat_interleave(near.shape[1]), near.flatten()
        mirrored = (others >= count)[:, None, None, None]
        others = others % count
        pictures = torch.where(mirrored, small[others].flip(3), small[others])
        apart = difference(small[ones].float(), pictures.float())
        for one, other, each in zip(ones.tolist(), others.tolist(), apart.tolist(), strict=True):
            if each < LOCAL:
                pair = min(one, other), max(one, other)
                found[pair] = min(each, found.get(pair, each))
    pairs = sorted(found, key=lambda pair: (found[pair], pair))
    return np.array(pairs, np.int64).reshape(-1, 2), np.array([found[pair] for pair in pairs])


def difference(ones: Tensor, others: Tensor) -> Tensor:
    """How much pictures (B, 3, 32, 32) differ in one place, (B,); infinite if they differ much all over."""
    apart, luma = ones - others, torch.tensor(LUMA)[:, None, None]
    local = F.avg_pool2d(apart, 4, 2)
    grey = (local * luma).sum(1, keepdim=True)
    most = torch.maximum(grey.abs().amax((1, 2, 3)), COLOUR * (local - grey).abs().amax((1, 2, 3)))
    mean = (apart * luma).sum(1).abs().mean((1, 2))
    whole = F.avg_pool2d(apart, 2).square().mean((1, 2, 3)).sqrt()
    return torch.where(whole <= WHOLE, most / (1 + SPREAD * mean), torch.inf)
