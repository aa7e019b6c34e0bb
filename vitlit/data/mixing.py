"""mixup and cutmix of rows 2k and 2k + 1, drawn once a global batch, of which any device mixes its slice of pairs."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitlit.errors import check_range, check_types
from vitlit.seeds import MIXING, mix


class Box(NamedTuple):
    """A part of an image, in pixels; bottom and right are excluded."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)

    @property
    def slices(self) -> tuple[slice, slice]:
        return slice(self.top, self.bottom), slice(self.left, self.right)


@dataclass(frozen=True)
class Mixing:
    """mixup (1710.09412, section 2) and cutmix (1905.04899, section 3.1), one draw a global batch.

    big_vision does the same; timm (mode "batch") and torchvision draw for each device's batch. Partners are mixed both
    ways, so lam and 1 - lam give the same images and targets, and big_vision's max(lam, 1 - lam) would change nothing.
    Numbers out of range raise UserError.

    Args:
        mixup: lam is drawn from Beta(mixup, mixup); 0 for no mixup.
        cutmix: lam is drawn from Beta(cutmix, cutmix); the box's area before clipping is 1 - lam; 0 for no cutmix.
        prob: the probability that a batch is mixed.
        switch: the probability of cutmix rather than mixup, if both are on.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    prob: float = 1.0
    switch: float = 0.5

    def __post_init__(self) -> None:
        check_types(type(self), vars(self), "data.mixing.")
        check_range("data.mixing", 0, 1e6, mixup=self.mixup, cutmix=self.cutmix)
        check_range("data.mixing", 0, 1, prob=self.prob, switch=self.switch)

    @property
    def on(self) -> bool:
        return self.prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    def draw(self, seed: int, step: int, height: int, width: int) -> float | Box | None:
        """mixup's lam or cutmix's box, of a step's images of height x width pixels; None to leave them."""
        # RandomState, since its numbers are the same in every version of numpy (NEP 19).
        random = np.random.RandomState(mix(MIXING, seed, step).view(np.uint32))
        if not self.on or random.random_sample() >= self.prob:
            return None
        cut = self.cutmix > 0 and (self.mixup == 0 or random.random_sample() < self.switch)
        alpha = self.cutmix if cut else self.mixup
        lam = random.beta(alpha, alpha)
        if not cut:
            return lam
        edges: list[int] = []
        for side in (height, width):
            length, centre = int(side * math.sqrt(1 - lam)), random.randint(side)
            edges += [max(0, centre - length // 2), min(side, centre + (length + 1) // 2)]
        return Box(*edges)

    def __call__(self, images: Tensor, targets: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Mix a step's images (B, C, H, W) and targets (B, classes), or whole pairs of them."""
        drawn = self.draw(seed, step, *images.shape[-2:])
        if drawn is None:
            return images, targets
        return cutmix(images, targets, drawn) if isinstance(drawn, Box) else mixup(images, targets, drawn)


def mixup(images: Tensor, targets: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """lam * row i + (1 - lam) * row i ^ 1, of images (B, C, H, W) and targets (B, classes), float; B is even."""
    return _blend(images, lam), _blend(targets, lam)


def cutmix(images: Tensor, targets: Tensor, box: Box) -> tuple[Tensor, Tensor]:
    """Row i of images (B, C, H, W) with the box of row i ^ 1, and targets (B, classes) by shares of the pixels."""
    mixed = images.clone()
    mixed[..., *box.slices] = _partners(images[..., *box.slices])
    return mixed, _blend(targets, 1 - box.area / (images.shape[-2] * images.shape[-1]))


def soft_targets(labels: Tensor, num_classes: int) -> Tensor:
    """One-hot float (B, num_classes) from class numbers, int64 (B,); float (B, num_classes) stay as they are."""
    if labels.is_floating_point():
        return labels
    # Not one_hot, which waits for the device to check the numbers.
    return torch.zeros(len(labels), num_classes, device=labels.device).scatter_(1, labels[:, None], 1.0)


def _partners(rows: Tensor) -> Tensor:
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _blend(rows: Tensor, lam: float) -> Tensor:
    return _partners(rows).mul_(1 - lam).add_(rows * lam)
