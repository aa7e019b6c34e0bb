"""Crops of many images at once, on any device: two matrix products each, with the weights of torch's uint8 resize."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vitlit.images.crops import BoxCrop, Cut, PadCrop

AT_ONCE = 1 << 23  # pixels, or weights, of a cut times the cuts made at once, which bounds the memory to a gigabyte


def cut_all(pixels: Tensor, places: Sequence[tuple[int, int]], cuts: Sequence[Cut], crop: BoxCrop | PadCrop) -> Tensor:
    """Cuts that `crop` planned, of images in pixels, uint8 (P, 3): uint8 (B, height, width, 3), on the pixels' device.

    `places` are the first pixel of each image and its width. No value differs from the crop's own by more than a level.
    """
    high, wide = max(cut.box[2] for cut in cuts), max(cut.box[3] for cut in cuts)
    share = max(1, AT_ONCE // max(high * wide, high * crop.size[0], wide * crop.size[1]))
    parts = [slice(first, first + share) for first in range(0, len(cuts), share)]
    return torch.cat([_cut(pixels, places[part], cuts[part], crop) for part in parts])


def _cut(pixels: Tensor, places: Sequence[tuple[int, int]], cuts: Sequence[Cut], crop: BoxCrop | PadCrop) -> Tensor:
    rows = [(*place, *cut.box, cut.flip) for place, cut in zip(places, cuts, strict=True)]
    start, stride, top, left, high, wide, flip = _columns(rows, pixels.device)
    down, across = (_weights(cuts, side, crop, pixels.device) for side in (0, 1))
    across = torch.where(flip > 0, across.flip(1), across)
    # Columns first: a product over an image's width, rounded, then one over its height, as torch does it.
    row = torch.arange(down.shape[2], device=pixels.device).minimum(high - 1)  # (B, 1, rows); those beyond weigh 0
    column = torch.arange(across.shape[2], device=pixels.device)[:, None].minimum(wide - 1)  # (B, columns, 1)
    boxes = pixels[start + (top + row) * stride + left + column]  # (B, columns, rows, 3)
    resized = (across @ boxes.flatten(2).float()).add_(0.5).floor_().clamp_(0, 255).unflatten(2, (-1, 3))
    resized = (down @ resized.transpose(1, 2).flatten(2)).add_(0.5).floor_().clamp_(0, 255)  # (B, height, width * 3)
    return resized.unflatten(2, (-1, 3)).to(torch.uint8)


def _columns(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, ...]:
    """Each column of numbers, int64 (B, 1, 1). Only copied to the device: nothing waits for it."""
    return torch.tensor(rows)[..., None, None].to(device, non_blocking=True).unbind(1)


def _weights(cuts: Sequence[Cut], side: int, crop: BoxCrop | PadCrop, device: torch.device) -> Tensor:
    """Of a box's pixels along a side for those of the crop: float32 (B, crop's, most of a box).

    Those of torch's antialiased interpolate on uint8 (aten's UpSampleKernel.cpp, compute_index_ranges_int16_weights):
    multiples of a power of 2, so that the sum of their products with pixels is exact in float32.
    """
    half = 2 if crop.interpolation.value == "bicubic" else 1
    sides = [(cut.box[2 + side], cut.resized[side], cut.begin[side]) for cut in cuts]
    inner, outer, begin = _columns(sides, device)
    scale = inner.double() / outer
    stretch = scale.clamp(min=1)

    def weigh(row: Tensor, taps: int, every: bool) -> Tensor:
        """The weights (B, rows, taps) of every pixel, or of those from the first that has one."""
        centre = scale * (row.clamp(min=0).minimum(outer - 1) + 0.5)
        first = (centre - half * stretch + 0.5).trunc().clamp_(min=0)
        place = torch.arange(taps, device=device) + (0 if every else first)
        near = (place >= first) & (place < (centre + half * stretch + 0.5).trunc().minimum(inner))
        off = ((place - centre + 0.5) * (1 / stretch)).abs()
        close, far = (1.5 * off - 2.5) * off * off + 1, ((-0.5 * off + 2.5) * off - 4) * off + 2
        found = torch.where(near, (1 - off if half == 1 else torch.where(off < 1, close, far)), 0)
        return found / found.sum(-1, keepdim=True)

    taps = 2 * max(math.ceil(half * max(1, one / other)) for one, other, _ in sides) + 1
    rows = torch.arange(max(other for _, other, _ in sides), device=device)[:, None]
    largest = weigh(rows, taps, every=False).amax((1, 2), keepdim=True)  # also of rows outside of the crop
    step = torch.exp2((torch.log2((2**15 - 0.5) / largest).ceil() - 1).clamp(0, 22))  # so that it fits into 16 bits
    row = begin + torch.arange(crop.size[side], device=device)[:, None]
    if crop.mode == "reflect":
        row = outer - 1 - (outer - 1 - row.abs()).abs()
    weights = weigh(row, max(one for one, _, _ in sides), every=True)
    weights = weights.sign() * (weights.abs() * step + 0.5).floor_() / step
    return weights.float() * ((row >= 0) & (row < outer))  # black around it
