"""RandAugment as timm has it: timm/data/auto_augment.py, with the same pixels for the same draws."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from PIL import ImageEnhance, ImageOps
from PIL.Image import Image, Resampling, Transform
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from vitlit.errors import check_range

_RESAMPLING = {"bilinear": Resampling.BILINEAR, "bicubic": Resampling.BICUBIC}


class Draw(NamedTuple):
    """Of one op: level is magnitude / 10, sign is 1 or -1."""

    level: float
    sign: int
    resample: Resampling
    fill: tuple[int, int, int]
    increasing: bool

    def moved(self, most: float) -> float:
        return self.sign * most * self.level

    def kept(self, most: int) -> int:
        """How much of `most` an op keeps, bits or values: more at a higher level, or less if increasing."""
        share = int(most * self.level)
        return most - share if self.increasing else share

    @property
    def factor(self) -> float:
        """Of an enhancement: 0.1 to 1.9 by level, or away from 1 to either side if increasing."""
        return max(0.1, 1 + self.sign * 0.9 * self.level) if self.increasing else 0.1 + 1.8 * self.level


class TimmRandAugment(v2.Transform):
    """RandAugment (1909.13719) as timm does it; with the defaults, DeiT's `rand-m9-mstd0.5-inc1`.

    Each of `ops` is one of 15, with replacement, and is applied with probability `prob` at a magnitude of its own, a
    Gaussian clipped to [0, 10]. Translations are up to 0.45 of a side: timm's `translate_const` has no effect on them.
    A Posterize that keeps no bits (increasing, at magnitude 10) gives black, also where Pillow 13 refuses it.
    Numbers out of range raise UserError.

    Args:
        magnitude: the mean strength, in [0, 10].
        ops: the number of ops drawn for an image, applied in turn.
        std: the standard deviation of the magnitude; 0 fixes it.
        increasing: whether a higher magnitude is more change in every op; timm's `inc1`.
        prob: of applying an op that was drawn.
        interpolation: of ops that move the image; "random" draws bilinear or bicubic for each op.
        fill: RGB in [0, 255] of what moves into view; timm's is 255 times the normalisation's mean, here ImageNet's.
    """

    def __init__(
        self,
        magnitude: float = 9,
        ops: int = 2,
        std: float = 0.5,
        increasing: bool = True,
        prob: float = 0.5,
        interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic",
        fill: tuple[int, int, int] = (124, 116, 104),
    ) -> None:
        super().__init__()
        check_range("TimmRandAugment", 0, 10, magnitude=magnitude)
        check_range("TimmRandAugment", 1, ops=ops)
        check_range("TimmRandAugment", 0, 100, std=std)  # above it timm means another distribution
        check_range("TimmRandAugment", 0, 1, prob=prob)
        self.magnitude, self.ops, self.std, self.increasing, self.prob = magnitude, ops, std, increasing, prob
        self.interpolation, self.fill = interpolation, fill

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        names = [list(OPS)[index] for index in torch.randint(len(OPS), (self.ops,))]
        return {"ops": [(name, self._draw()) for name in names if torch.rand(()) < self.prob]}

    def _draw(self) -> Draw:
        magnitude = self.magnitude + self.std * torch.randn(()).item()
        sign, mode = torch.randint(2, (2,)).tolist()
        name = list(_RESAMPLING)[mode] if self.interpolation == "random" else self.interpolation
        return Draw(min(max(magnitude, 0), 10) / 10, 2 * sign - 1, _RESAMPLING[name], self.fill, self.increasing)

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        if not params["ops"]:
            return inpt
        image = F.to_pil_image(inpt)
        for name, draw in params["ops"]:
            image = OPS[name](image, draw)
        return F.pil_to_tensor(image)


def affine(image: Image, draw: Draw, *matrix: float) -> Image:
    """The pixel at (x, y) comes from (a x + b y + c, d x + e y + f), pixel centres being at halves."""
    return image.transform(image.size, Transform.AFFINE, matrix, resample=draw.resample, fillcolor=draw.fill)


def posterize(image: Image, bits: int) -> Image:
    """Keep the highest bits, or none, which Pillow's own function refuses."""
    shift = 8 - bits
    return image.point([value >> shift << shift for value in range(256)] * 3)


def solarize_add(image: Image, addition: int) -> Image:
    return image.point([min(255, value + addition) if value < 128 else value for value in range(256)] * 3)


OPS: dict[str, Callable[[Image, Draw], Image]] = {
    "AutoContrast": lambda image, draw: ImageOps.autocontrast(image),
    "Equalize": lambda image, draw: ImageOps.equalize(image),
    "Invert": lambda image, draw: ImageOps.invert(image),
    "Rotate": lambda image, draw: image.rotate(draw.moved(30), draw.resample, fillcolor=draw.fill),
    "Posterize": lambda image, draw: posterize(image, draw.kept(4)),
    "Solarize": lambda image, draw: ImageOps.solarize(image, draw.kept(256)),
    "SolarizeAdd": lambda image, draw: solarize_add(image, int(110 * draw.level)),
    "Color": lambda image, draw: ImageEnhance.Color(image).enhance(draw.factor),
    "Contrast": lambda image, draw: ImageEnhance.Contrast(image).enhance(draw.factor),
    "Brightness": lambda image, draw: ImageEnhance.Brightness(image).enhance(draw.factor),
    "Sharpness": lambda image, draw: ImageEnhance.Sharpness(image).enhance(draw.factor),
    "ShearX": lambda image, draw: affine(image, draw, 1, draw.moved(0.3), 0, 0, 1, 0),
    "ShearY": lambda image, draw: affine(image, draw, 1, 0, 0, draw.moved(0.3), 1, 0),
    "TranslateXRel": lambda image, draw: affine(image, draw, 1, 0, draw.moved(0.45) * image.width, 0, 1, 0),
    "TranslateYRel": lambda image, draw: affine(image, draw, 1, 0, 0, 0, 1, draw.moved(0.45) * image.height),
}
