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
    rows = [(*place, *cut.box, *cut.resized, *cut.begin, cut.flip) for place, cut in zip(places, cuts, strict=True)]
    numbers = torch.tensor(rows).to(pixels.device, non_blocking=True)
    start, stride, top, left, high, wide, tall, broad, y, x, flip = numbers.view(len(rows), 11, 1, 1).unbind(1)
    cubic, mirrored = crop.interpolation.value == "bicubic", crop.mode == "reflect"
    # What shapes depend on is known here, so that nothing waits for the device.
    down = _weights(high, tall, y, [(row[4], row[6]) for row in rows], crop.size[0], cubic, mirrored)
    across = _weights(wide, broad, x, [(row[5], row[7]) for row in rows], crop.size[1], cubic, mirrored)
    across = torch.where(flip > 0, across.flip(1), across)
    # Columns first: a product over an image's width, rounded, then one over its height, as torch does it.
    row = torch.arange(down.shape[2], device=pixels.device).minimum(
        high - 1
    )  # (B, 1, rows); what is beyond has no weight
    column = torch.arange(across.shape[2], device=pixels.device)[:, None].minimum(wide - 1)  # (B, columns, 1)
    boxes = pixels[start + (top + row) * stride + left + column]  # (B, columns, rows, 3)
    wide_enough = _rounded(across @ boxes.flatten(2).float()).unflatten(2, (-1, 3))  # (B, width, rows, 3)
    found = _rounded(down @ wide_enough.transpose(1, 2).flatten(2))  # (B, height, width * 3)
    return found.unflatten(2, (-1, 3)).to(torch.uint8)


def _rounded(levels: Tensor) -> Tensor:
    return levels.add_(0.5).floor_().clamp_(0, 255)


def _weights(
    inner: Tensor,
    outer: Tensor,
    begin: Tensor,
    sides: list[tuple[int, int]],
    count: int,
    cubic: bool,
    mirrored: bool,
) -> Tensor:
    """Of `inner` pixels for `count` pixels of their resize to `outer`, from `begin` on: float32 (B, count, most inner).

    Those of torch's antialiased interpolate on uint8 (aten's UpSampleKernel.cpp, compute_index_ranges_int16_weights):
    multiples of a power of 2, so that the sum of their products with pixels is exact in float32. `sides` are inner and
    outer as numbers.
    """
    scale = inner.double() / outer
    stretch = scale.clamp(min=1)
    reach = stretch * (2 if cubic else 1)

    def weigh(row: Tensor, taps: int, every: bool = False) -> Tensor:
        """The weights (B, rows, taps) of every pixel, or of those from the first that has one."""
        centre = scale * (row.clamp(min=0).minimum(outer - 1) + 0.5)
        first = (centre - reach + 0.5).trunc().clamp_(min=0)
        place = torch.arange(taps, device=row.device) + (0 if every else first)
        near = (place >= first) & (place < (centre + reach + 0.5).trunc().minimum(inner))
        off = ((place - centre + 0.5) * (1 / stretch)).abs()
        found = (1 - off).clamp_(min=0)
        if cubic:
            close, far = (1.5 * off - 2.5) * off * off + 1, ((-0.5 * off + 2.5) * off - 4) * off + 2
            found = torch.where(off < 1, close, torch.where(off < 2, far, 0))
        found = torch.where(near, found, 0)
        return found / found.sum(-1, keepdim=True)

    widest = max(math.ceil((2 if cubic else 1) * max(1, one / other)) for one, other in sides)
    rows = torch.arange(max(other for _, other in sides), device=inner.device)[:, None]
    largest = weigh(rows, 2 * widest + 1).amax((1, 2), keepdim=True)  # also of rows outside of the crop
    step = torch.exp2((torch.log2((2**15 - 0.5) / largest).ceil() - 1).clamp(0, 22))  # so that it fits into 16 bits
    row = begin + torch.arange(count, device=inner.device)[:, None]  # (B, count, 1)
    if mirrored:
        row = outer - 1 - (outer - 1 - row.abs()).abs()
    weights = weigh(row, max(one for one, _ in sides), every=True)
    weights = weights.sign() * (weights.abs() * step + 0.5).floor_() / step
    return weights.float() * ((row >= 0) & (row < outer))  # black around it
