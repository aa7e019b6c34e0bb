"""RandAugment as big_vision has it: big_vision/pp/archive/{randaug,autoaugment}.py, forked from TensorFlow's tpu."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from vitlit.errors import check_range

_FILL = 128
_VALUES = torch.arange(256, dtype=torch.uint8, device="cpu")  # of a pixel


class Draw(NamedTuple):
    level: float  # magnitude / 10
    sign: int  # 1 or -1
    centre: tuple[int, int]  # (row, column) of a pixel

    @property
    def factor(self) -> float:
        return 0.1 + 1.8 * self.level


class BigVisionRandAugment(v2.Transform):
    """RandAugment (1909.13719) as big_vision's `randaug(ops, magnitude)` does it.

    Each of `ops` is one of 16, with replacement, and is always applied. What moves into view is grey (128). A
    translation is 10 pixels times the magnitude and a cutout 8 pixels square times it, at any image size.

    Two known mistakes of the source stay, since the published results have them (big_vision issues 109 and 110).
    Contrast blends with a grey of height * width / 256 (196 at 224 pixels), not with the image's mean. Solarize's
    threshold of 25.6 times the magnitude wraps around at 256: at 10 it inverts the image, at 15 it is the usual 128.

    Two ops differ from the source. Sharpness rounds its mean of 3 x 3 pixels down exactly, where the source's floats
    fall short for up to 1.5 % of pixels, and leaves images below 3 pixels. Posterize does nothing above magnitude 22.
    Numbers out of range raise UserError.

    Args:
        ops: the number of ops applied to an image, in turn.
        magnitude: their strength, at least 0. Color, Contrast, Brightness and Sharpness change nothing at 5, and
            Posterize is strongest at 0.
    """

    def __init__(self, ops: int = 2, magnitude: int = 10) -> None:
        super().__init__()
        check_range("BigVisionRandAugment", 1, ops=ops)
        check_range("BigVisionRandAugment", 0, magnitude=magnitude)
        self.ops, self.magnitude = ops, magnitude

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        sides = flat_inputs[0].shape[-2:]
        ops = []
        for index in torch.randint(len(OPS), (self.ops,)):
            sign, row, column = (int(torch.randint(count, ())) for count in (2, *sides))
            ops.append((list(OPS)[index], Draw(self.magnitude / 10, 2 * sign - 1, (row, column))))
        return {"ops": ops}

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        if inpt.dtype != torch.uint8:
            raise ValueError("it is for RGB of 8 bits")
        for name, draw in params["ops"]:
            inpt = OPS[name](inpt, draw)
        return inpt


def look_up(table: Tensor, image: Tensor) -> Tensor:
    """Replace each value of an image (C, H, W) by its entry in a table (256,), four times as fast as arithmetic."""
    pixels = image.permute(1, 2, 0).contiguous()
    replaced = bytearray(pixels.numpy().data).translate(table.numpy().tobytes())
    return torch.frombuffer(replaced, dtype=torch.uint8).view(pixels.shape).permute(2, 0, 1)


def autocontrast(image: Tensor) -> Tensor:
    """Stretch each channel to [0, 255]; a channel of one value stays."""
    image = image.contiguous()
    low, high = image.amin((-2, -1))[:, None], image.amax((-2, -1))[:, None]
    scale = torch.tensor(255.0) / (high.float() - low)  # a number / a tensor would be rounded twice
    stretched = (_VALUES * scale - low * scale).clamp(0, 255)
    tables = torch.where(high > low, stretched, _VALUES).to(torch.uint8)
    return torch.cat([look_up(table, channel[None]) for table, channel in zip(tables, image, strict=True)])


def solarize(image: Tensor, threshold: int) -> Tensor:
    """Invert values from the threshold on, which wraps around at 256."""
    return look_up(torch.where(threshold % 256 > _VALUES, _VALUES, 255 - _VALUES), image)


def solarize_add(image: Tensor, addition: int) -> Tensor:
    added = (_VALUES.int() + addition).clamp(max=255).to(torch.uint8)
    return look_up(torch.where(_VALUES < 128, added, _VALUES), image)


def grey(image: Tensor) -> Tensor:
    """The luma of each pixel in all channels, with the weights and the rounding of tf.image.rgb_to_grayscale."""
    weights = torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)
    luma = (image.contiguous() * (1 / 255) * weights).sum(-3, keepdim=True) * 255.5
    return luma.to(torch.uint8).expand_as(image)


def smooth(image: Tensor) -> Tensor:
    """Mean of 3 x 3 pixels, the central one weighted by 5; the border stays."""
    wide = image.short()
    rows = wide[..., :-2, :] + wide[..., 1:-1, :] + wide[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide[..., 1:-1, 1:-1]
    smoothed = image.clone()
    smoothed[..., 1:-1, 1:-1] = total / 13  # truncated, in half the time of //
    return smoothed


def contrast(image: Tensor, factor: float) -> Tensor:
    """Blend with a grey of height * width / 256, which should be the image's mean."""
    height, width = image.shape[-2:]
    return look_up(blend(torch.tensor(min(height * width // 256, 255)), _VALUES, factor), image)


def blend(start: Tensor, end: Tensor, factor: float) -> Tensor:
    """start at factor 0, end at factor 1; extrapolated beyond, clipped, and rounded down."""
    return (start + factor * (end.float() - start)).clamp(0, 255).to(torch.uint8)


def affine(image: Tensor, x: tuple[float, float, float], y: tuple[float, float, float]) -> Tensor:
    """The pixel at (column, row) is the nearest to (x, y) . (column, row, 1), or grey outside the image."""
    channels, height, width = image.shape
    framed = torch.full((height + 2, width + 2, channels), _FILL, dtype=torch.uint8)
    framed[1:-1, 1:-1] = image.permute(1, 2, 0)
    rows = torch.arange(height, dtype=torch.float32).view(-1, 1)
    columns = torch.arange(width, dtype=torch.float32)

    def nearest(a: float, b: float, c: float, side: int) -> Tensor:
        position = (a * columns + b * rows + c).clamp(-1, side)  # to the frame, if outside
        return (position + 0.5 * position.sign()).int() + 1  # halves away from zero, as C++'s std::round does

    places = (nearest(*y, height) * (width + 2) + nearest(*x, width)).view(-1)
    return framed.view(-1, channels).index_select(0, places).view(height, width, channels).permute(2, 0, 1)


def rotate(image: Tensor, degrees: float) -> Tensor:
    """Rotate about the centre; counter-clockwise if degrees are above 0."""
    height, width = image.shape[-2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = (width - 1) / 2, (height - 1) / 2
    return affine(image, (cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y))


def cutout(image: Tensor, reach: int, centre: tuple[int, int]) -> Tensor:
    """Grey out the pixels from centre - reach to centre + reach - 1, rows and columns."""
    rows, columns = (slice(max(0, middle - reach), middle + reach) for middle in centre)
    image = image.clone()
    image[..., rows, columns] = _FILL
    return image


OPS: dict[str, Callable[[Tensor, Draw], Tensor]] = {
    "AutoContrast": lambda image, draw: autocontrast(image),
    "Equalize": lambda image, draw: F.equalize(image),
    "Invert": lambda image, draw: 255 - image,
    "Rotate": lambda image, draw: rotate(image, draw.sign * 30 * draw.level),
    # TensorFlow shifts a byte by 7 at most, so that one bit is left.
    "Posterize": lambda image, draw: F.posterize(image, min(max(int(4 * draw.level), 1), 8)),
    "Solarize": lambda image, draw: solarize(image, int(256 * draw.level)),
    "Color": lambda image, draw: blend(grey(image), image.contiguous(), draw.factor),
    "Contrast": lambda image, draw: contrast(image, draw.factor),
    "Brightness": lambda image, draw: look_up(blend(torch.tensor(0), _VALUES, draw.factor), image),
    "Sharpness": lambda image, draw: blend(smooth(image), image, draw.factor),
    "ShearX": lambda image, draw: affine(image, (1, draw.sign * 0.3 * draw.level, 0), (0, 1, 0)),
    "ShearY": lambda image, draw: affine(image, (1, 0, 0), (draw.sign * 0.3 * draw.level, 1, 0)),
    "TranslateX": lambda image, draw: affine(image, (1, 0, draw.sign * 100 * draw.level), (0, 1, 0)),
    "TranslateY": lambda image, draw: affine(image, (1, 0, 0), (0, 1, draw.sign * 100 * draw.level)),
    "Cutout": lambda image, draw: cutout(image, int(40 * draw.level), draw.centre),
    "SolarizeAdd": lambda image, draw: solarize_add(image, int(110 * draw.level)),
}
