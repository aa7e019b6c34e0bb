"""Views of a training image, cropped on the host; their colours change on the device, by numbers drawn on the host."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from vitlit.data.transforms import Transform, check_scale, train_transform
from vitlit.errors import UserError, check_range, check_types
from vitlit.images.preprocess import Preprocess
from vitlit.seeds import PHOTOMETRIC, mix

CACHED, MOST = 1 << 16, 1 << 23  # pixels changed at once, in a core's cache or in half a gigabyte of a device
# What parts the areas of global and local views, how many are local, and (blur, solarise) of the first, second, local.
PRESETS = {
    "dino": (0.4, 8, (1.0, 0.0), (0.1, 0.2), (0.5, 0.0)),  # facebookresearch/dino, main_dino.py
    "dinov2": (0.32, 8, (1.0, 0.0), (0.1, 0.2), (0.5, 0.0)),  # facebookresearch/dinov2, ssl_default_config.yaml
    "lejepa": (0.3, 6, (0.5, 0.2), (0.5, 0.2), (0.5, 0.2)),  # rbalestr-lab/lejepa, README.md
}
Preset = Literal["dino", "dinov2", "lejepa"]


@dataclass(frozen=True, kw_only=True)
class Photometric:
    """How the colours of images change, in this order, on the device: jitter, grey, blur and solarise of torchvision.

    Numbers out of range raise UserError.

    Args:
        jitter: the probability that brightness, contrast, saturation and hue change, in random order.
        strength: of these: three are multiplied by 1 - strength to 1 + strength, hue turns by up to this share of 360°.
        grey: the probability of grey.
        blur: the probability of a Gaussian blur.
        sigma: the range of its standard deviation, pixels.
        solarise: the probability that values from 128 on are inverted.
    """

    jitter: float = 0.0
    strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    grey: float = 0.0
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarise: float = 0.0

    def __post_init__(self) -> None:
        where = "data.photometric." if type(self) is Photometric else "data.views: "
        check_types(type(self), vars(self), where)
        for name in ("jitter", "strength", "grey", "blur", "solarise"):
            if not 0 <= np.min(given := getattr(self, name)) <= np.max(given) <= 1:
                raise UserError(f"{where}{name} {given} is not between 0 and 1")
        if not 0 < self.sigma[0] <= self.sigma[1] < np.inf:
            raise UserError(f"{where}sigma {list(self.sigma)} is not a range above 0")

    @property
    def on(self) -> bool:
        return max(self.jitter, self.grey, self.blur, self.solarise) > 0

    def draw(self, keys: np.ndarray, view: int) -> np.ndarray:
        """Of images by their keys, the numbers of seven `STEPS` in turn (-1: none) and what each takes: (B, 2, 7)."""
        uniform = (mix(PHOTOMETRIC, keys[:, None], view, np.arange(13)) >> np.uint64(11)) * 2.0**-53  # [0, 1)
        strength, order = np.array(self.strength), uniform[:, :4].argsort(1)
        factors = np.take_along_axis((1, 1, 1, 0) + strength * (2 * uniform[:, 4:8] - 1), order, 1)
        sigma = self.sigma[0] + (self.sigma[1] - self.sigma[0]) * uniform[:, 8]
        jittered = (uniform[:, 9:10] < self.jitter) & (strength[order] > 0)
        drawn = np.column_stack([jittered, uniform[:, 10:] < (self.grey, self.blur, self.solarise)])
        steps = np.column_stack([order, np.tile((2, 4, 5), (len(keys), 1))])  # grey has a saturation of 0
        return np.stack([np.where(drawn, steps, -1), np.column_stack([factors, 0 * sigma, sigma, 0 * sigma])], axis=1)


@dataclass(frozen=True)
class Views(Photometric):
    """Views of one kind: random_resized crops, flipped and augmented like the first view, with colours of their own.

    Numbers out of range raise UserError.

    Args:
        count: how many.
        size: pixels, an int or (height, width).
        scale: the range of the crop's area, as a share of the image's.
    """

    count: int
    size: int | tuple[int, int]
    scale: tuple[float, float] = (0.05, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("data.views", 1, count=self.count, size=min(self.pixels))
        check_scale("data.views: scale", self.scale)

    @property
    def pixels(self) -> tuple[int, int]:
        return (self.size, self.size) if isinstance(self.size, int) else (self.size[0], self.size[1])

    def transform(self, preprocess: Preprocess, flip: float, augment: Sequence[Transform]) -> Transform:
        preprocess = replace(preprocess, image_size=self.pixels)
        return train_transform(preprocess, "random_resized", self.scale, flip, augment)


def all_views(first: Views, given: Preset | Sequence[Views], local: int | None, patch: int) -> list[Views]:
    """The kind of each view. Those of a preset follow from the first's size, its scale if one was given, and the patch.

    Local views have 3/7 of a side: 96 of 224 pixels, 98 if patches are 14. Blur shrinks with sides below 224.
    """
    if not isinstance(given, str):
        if local is not None:
            raise UserError(f"data.local_views is for data.views {', '.join(PRESETS)}; leave it out")
        return [first, *(kind for kind in given for _ in range(kind.count))]
    if first.on:
        raise UserError(f"data.views {given} says how colours change; leave data.photometric out")
    parting, count, *chances = PRESETS[given]
    (height, width), scale = first.pixels, (parting, 1.0) if first.scale == Views.scale else first.scale
    small = (max(1, round(height * 3 / 7 / patch)) * patch, max(1, round(width * 3 / 7 / patch)) * patch)
    sigma = (0.1, max(0.1, min(2.0, height / 112, width / 112)))
    make = partial(Views, 1, jitter=0.8, grey=0.2, sigma=sigma)
    places = zip((first.size, first.size, small), (scale, scale, (0.05, scale[0])), chances, strict=True)
    kinds = [make(size=size, scale=area, blur=blur, solarise=solarise) for size, area, (blur, solarise) in places]
    return [*kinds[:2], *kinds[2:] * (count if local is None else local)]


def check_raw(preprocess: Preprocess, given: Mapping[str, object], kinds: Sequence[Photometric], cache: str) -> None:
    """UserError for options that are for RGB of 8 bits, where images are read as they are."""
    wrong = {
        "ground": "ground" in given,
        "cache": cache != "none",
        "photometric, or data.views, with jitter, grey or solarise": any(
            max(kind.jitter, kind.grey, kind.solarise) > 0 for kind in kinds
        ),
    }
    if preprocess.range and (found := [name for name, there in wrong.items() if there]):
        raise UserError(f"data.{found[0]} is for RGB of 8 bits, not for data.range; leave it out")


def change_colours(views: list[Tensor], kinds: Sequence[Photometric], keys: np.ndarray | None = None) -> list[Tensor]:
    """Views, (B, C, H, W), changed as their kinds ask: float32 of the same scale. The others stay as they are."""
    changed = list(views)
    for (_, on), same in groupby(range(len(views)), lambda view: (views[view].shape, kinds[view].on)):
        if keys is None or not on:
            continue
        group = list(same)
        draws = np.concatenate([kinds[view].draw(keys, view) for view in group])
        images = torch.cat([views[view] for view in group])
        new = torch.empty(images.shape, device=images.device)
        share = max(1, (CACHED if images.device.type == "cpu" else MOST) // images[0, 0].numel())
        for part in (slice(first, first + share) for first in range(0, len(images), share)):
            _change(new[part].copy_(images[part]), draws[part])
        changed[group[0] : group[-1] + 1] = new.chunk(len(group))
    return changed


def _change(images: Tensor, draws: np.ndarray) -> None:
    """In place. Which images a step takes is known here, so nothing waits for the device."""
    for steps, numbers in draws.transpose(2, 1, 0):
        for step in np.unique(steps[steps >= 0]).astype(int):
            those = np.flatnonzero(steps == step)
            rows = torch.from_numpy(those).to(images.device, non_blocking=True)
            part = images if len(those) == len(images) else images[rows]
            STEPS[step](part, numbers[those])
            if part is not images:
                images.index_copy_(0, rows, part)


def _each(images: Tensor, numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(numbers.astype(np.float32)).to(images.device, non_blocking=True).view(-1, 1, 1, 1)


# Steps change images, float32 (B, 3, H, W), in place by a number for each. Every operation is rounded by itself, and a
# sum is exact or has an order, so that an image's bits do not depend on those beside it.


def blend(images: Tensor, factors: np.ndarray, towards: int) -> None:
    """With black, the mean grey, or each pixel's grey: brightness, contrast, saturation."""
    red, green, blue = images.split(1, dim=1)
    others = (red * 0.2989).add_(green * 0.587).add_(blue * 0.114) if towards else torch.zeros((), device=images.device)
    if towards == 1:
        others = (others.round_().sum(-1).sum(-1, dtype=torch.int64) / images[0, 0].numel())[..., None, None]
    images.mul_(_each(images, factors)).add_(others * _each(images, 1 - factors)).clamp_(0, 255)


def hue(images: Tensor, turns: np.ndarray) -> None:
    """A channel is full within a sixth of the circle of its own hue, and falls in another sixth on both sides."""
    red, green, blue = images.split(1, dim=1)
    low = torch.minimum(red, green).minimum(blue)
    chroma = torch.maximum(red, green).maximum(blue).sub_(low)
    # The sixths from red are 1 + green + blue - red, of channels without grey and at full chroma; green is ahead.
    place = (green + blue).sub_(red).sub_(low).div_(chroma.clamp(min=1e-3)).add_(1).copysign_(green - blue).mul_(1 / 6)
    place.add_(_each(images, turns))
    for channel, own in ((red, 0.0), (green, 1 / 3), (blue, 2 / 3)):
        off = place - own
        off.sub_(off.round()).abs_()
        channel.copy_(off.sub_(1 / 3).mul_(-6).clamp_(0, 1).mul_(chroma).add_(low))


def blur(images: Tensor, sigmas: np.ndarray) -> None:
    """Within 3 sigma, mirrored at the border. On a CPU it takes half the time of a grouped convolution."""
    sigma, sides = sigmas[:, None], images.shape[2:]
    reach = np.minimum(np.ceil(3 * sigma), min(sides) - 1)
    distance = np.arange(int(reach.max()) + 1)
    weights = np.exp(-0.5 * (distance / sigma) ** 2) * (distance <= reach)
    weights /= (weights * np.where(distance, 2, 1)).cumsum(1)[:, -1:]  # in order: zeros at the end add nothing
    centre, *beside = (_each(images, each) for each in weights.T)
    most, pair = len(beside), torch.empty_like(images)
    for dim, around in ((2, (0, 0, most, most)), (3, (most, most, 0, 0))):
        padded = pad(images, around, mode="reflect")
        images.mul_(centre)
        for away, weight in enumerate(beside, start=1):
            before, after = (padded.narrow(dim, most + far, sides[dim - 2]) for far in (-away, away))
            images.add_(torch.add(before, after, out=pair).mul_(weight))


def solarise(images: Tensor, _: np.ndarray) -> None:
    images.copy_(torch.minimum(images, 255 - images))


STEPS: tuple[Callable[[Tensor, np.ndarray], None], ...] = (
    *(partial(blend, towards=towards) for towards in range(3)),
    hue,
    blur,
    solarise,
)
