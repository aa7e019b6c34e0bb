"""Random erasing of training images, after normalisation, on their device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vitlit.data.mixing import Box
from vitlit.errors import UserError, check_range, check_types
from vitlit.seeds import ERASING, mix

ATTEMPTS = 10


@dataclass(frozen=True)
class Erasing:
    """Random erasing (1708.04896, section 3.2) as timm does it: the aspect is log-uniform, the area need not be met.

    Numbers out of range raise UserError.

    Args:
        prob: the probability that an image is erased.
        area: range of the box's area as a share of the image's.
        aspect: height / width of the box is drawn between this and its inverse.
        fill: noise is N(0, 1) by pixel and channel (timm's "pixel"), mean is 0 (timm's "const").
    """

    prob: float = 0.0
    area: tuple[float, float] = (0.02, 1 / 3)
    aspect: float = 0.3
    fill: Literal["noise", "mean"] = "noise"

    def __post_init__(self) -> None:
        check_types(type(self), vars(self), "data.erasing.")
        check_range("data.erasing", 0, 1, prob=self.prob)
        check_range("data.erasing", 1e-6, 1, aspect=self.aspect)
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise UserError(f"data.erasing.area {list(self.area)} must rise within (0, 1]")


def boxes(erasing: Erasing, seed: int, step: int, rows: Sequence[int], height: int, width: int) -> list[Box | None]:
    """The box erased in each of these rows of a step's global batch: the first that fits of `ATTEMPTS`, if any."""
    numbers = np.arange(4 * ATTEMPTS + 1)
    bits = mix(ERASING, seed, step, np.asarray(rows, np.int64)[:, None], numbers)
    uniform = (bits >> np.uint64(11)) * 2.0**-53  # [0, 1), (rows, numbers)
    chosen, drawn = uniform[:, 0] < erasing.prob, uniform[:, 1:].reshape(-1, 4, ATTEMPTS)
    area = (erasing.area[0] + (erasing.area[1] - erasing.area[0]) * drawn[:, 0]) * height * width
    aspect = np.exp(math.log(erasing.aspect) * (2 * drawn[:, 1] - 1))
    high, wide = (np.rint(np.sqrt(side)).astype(np.int64) for side in (area * aspect, area / aspect))
    fits = (high < height) & (wide < width)
    top, left = ((drawn[:, 2] * (height - high + 1)).astype(int), (drawn[:, 3] * (width - wide + 1)).astype(int))
    edges = np.stack([top, top + high, left, left + wide], axis=-1)[np.arange(len(fits)), fits.argmax(1)]
    erased = chosen & fits.any(1)
    return [Box(*box) if row else None for box, row in zip(edges.tolist(), erased.tolist(), strict=True)]


def erase(images: Tensor, erasing: Erasing, seed: int, step: int, rows: Sequence[int]) -> Tensor:
    """Erase normalised images (B, C, H, W), these rows of a step's global batch, in place; returns them."""
    # Seeded for each row, so that its noise is the same however the batch is sliced, if not on a CPU and a GPU.
    generator = torch.Generator(images.device) if erasing.fill == "noise" else None
    seeds = mix(ERASING, seed, step, np.asarray(rows, np.int64)).tolist()
    for image, box, row_seed in zip(images, boxes(erasing, seed, step, rows, *images.shape[-2:]), seeds, strict=True):
        if box is None:
            continue
        part = image[:, *box.slices]
        if generator is not None:
            # Not part.normal_(), whose numbers would depend on the memory layout.
            generator.manual_seed(row_seed)
            part.copy_(torch.randn(part.shape, generator=generator, dtype=part.dtype, device=part.device))
        else:
            part.zero_()
    return images
