"""Crops of many images at once, on any device: two matrix products each, with the weights of torch's uint8 resize."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vitlit.images.crops import BoxCrop, Cut, PadCrop

MOST_PIXELS = 1 << 24  # of the boxes that are resized at once, which bounds the memory


def cut_all(pixels: Tensor, places: Sequence[tuple[int, int]], cuts: Sequence[Cut], crop: BoxCrop | PadCrop) -> Tensor:
    """Cuts that `crop` planned, of images in pixels, uint8 (P, 3): uint8 (B, height, width, 3), on the pixels' device.

    `places` are the first pixel of each image and its width. No value differs from the crop's own by more than a level.
    """
    most = max(cut.box[2] for cut in cuts) * max(cut.box[3] for cut in cuts)
    share = max(1, MOST_PIXELS // most)
    parts = [slice(first, first + share) for first in range(0, len(cuts), share)]
    return torch.cat([_cut(pixels, places[part], cuts[part], crop) for part in parts])


def _cut(pixels: Tensor, places: Sequence[tuple[int, int]], cuts: Sequence[Cut], crop: BoxCrop | PadCrop) -> Tensor:
    rows = [(*place, *cut.box, *cut.resized, *cut.begin, cut.flip) for place, cut in zip(places, cuts, strict=True)]
    _, _, _, _, most_high, most_wide, tallest, broadest, *_ = map(max, zip(*rows, strict=True))  # without a wait
    numbers = torch.tensor(rows).to(pixels.device, non_blocking=True)
    start, stride, top, left, high, wide, tall, broad, y, x, flip = numbers.view(len(rows), 11, 1, 1).unbind(1)
    cubic, mirrored = crop.interpolation.value == "bicubic", crop.mode == "reflect"
    down = _weights(high, most_high, tall, tallest, y, crop.size[0], cubic, mirrored)
    across = _weights(wide, most_wide, broad, broadest, x, crop.size[1], cubic, mirrored)
    across = torch.where(flip > 0, across.flip(1), across)
    # Columns first: a product over an image's width, rounded, then one over its height, as torch does it.
    row = torch.arange(most_high, device=pixels.device).minimum(high - 1)  # (B, 1, rows); what is beyond has no weight
    column = torch.arange(most_wide, device=pixels.device)[:, None].minimum(wide - 1)  # (B, columns, 1)
    boxes = pixels[start + (top + row) * stride + left + column]  # (B, columns, rows, 3)
    wide_enough = _rounded(across @ boxes.flatten(2).float()).unflatten(2, (-1, 3))  # (B, width, rows, 3)
    found = _rounded(down @ wide_enough.transpose(1, 2).flatten(2))  # (B, height, width * 3)
    return found.unflatten(2, (-1, 3)).to(torch.uint8)


def _rounded(levels: Tensor) -> Tensor:
    return levels.add_(0.5).floor_().clamp_(0, 255)


def _weights(
    inner: Tensor, most: int, outer: Tensor, last: int, begin: Tensor, count: int, cubic: bool, mirrored: bool
) -> Tensor:
    """Of `inner` pixels for `count` pixels of their resize to `outer`, from `begin` on: float32 (B, count, most).

    Of torch's antialiased interpolate on uint8 (aten's UpSampleKernel.cpp, compute_index_ranges_int16_weights), which
    are multiples of a power of 2 so that they fit into 16 bits. Products with pixels are exact in float32.
    """
    scale = inner.double() / outer
    stretch = scale.clamp(min=1)
    reach = stretch * (2 if cubic else 1)
    row = torch.arange(last, device=inner.device)[:, None].minimum(outer - 1)
    centre = scale * (row + 0.5)
    place = torch.arange(most, device=inner.device)
    near = (place >= (centre - reach + 0.5).trunc()) & (place < (centre + reach + 0.5).trunc().minimum(inner))
    off = ((place - centre + 0.5) * (1 / stretch)).abs()
    if cubic:
        close, far = (1.5 * off - 2.5) * off * off + 1, ((-0.5 * off + 2.5) * off - 4) * off + 2
        weights = torch.where(off < 1, close, torch.where(off < 2, far, 0))
    else:
        weights = (1 - off).clamp_(min=0)
    weights = torch.where(near, weights, 0)
    weights = weights / weights.sum(-1, keepdim=True)
    largest = weights.amax((1, 2), keepdim=True)
    step = torch.exp2((torch.log2((2**15 - 0.5) / largest).ceil() - 1).clamp(0, 22))
    weights = (weights.sign() * (weights.abs() * step + 0.5).floor() / step).float()
    wanted = begin + torch.arange(count, device=inner.device)[:, None]  # (B, count, 1)
    if mirrored:
        wanted = outer - 1 - (outer - 1 - wanted.abs()).abs()
    inside = (wanted >= 0) & (wanted < outer)
    return weights.gather(1, wanted.clamp(0, last - 1).expand(-1, -1, most)) * inside
