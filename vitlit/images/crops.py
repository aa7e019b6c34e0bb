"""Random crops for training: uint8 (3, H, W) -> uint8 (3, height, width), drawn from torch's global generator."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from vitlit.errors import UserError

Params = dict[str, int]
RATIO = (3 / 4, 4 / 3)  # width / height, of torchvision's crop
LOG_RATIO = torch.log(torch.tensor(RATIO, device="cpu")).tolist()  # rounded as there


@dataclass(frozen=True)
class Crop(ABC):
    """A transform of one image with torchvision's two steps, draw and crop, but not its search for images among the
    arguments, which takes as long as half a resize.

    Args:
        size: (height, width) of the result, pixels.
    """

    size: tuple[int, int]

    def __call__(self, image: Tensor) -> Tensor:
        return self.transform(image, self.make_params([image]))

    @abstractmethod
    def make_params(self, flat_inputs: list[Any]) -> Params:
        """Draw for an image, the first of the list."""

    @abstractmethod
    def transform(self, inpt: Tensor, params: Params) -> Tensor:
        """Crop an image by what was drawn."""


@dataclass(frozen=True)
class BoxCrop(Crop):
    """Crop a box of random area and aspect, then resize it with antialiasing.

    Args:
        scale: the box's area as a share of the image's, between these two.
        interpolation: of the resize.
    """

    scale: tuple[float, float] = (0.05, 1.0)
    interpolation: InterpolationMode = InterpolationMode.BILINEAR

    def transform(self, inpt: Tensor, params: Params) -> Tensor:
        # torch resizes a dense uint8 copy with its channels last in three quarters of the time that a view takes.
        # torchvision would end in the same call, and with AVX2 in the same bits, after as long again as the copy takes.
        rows = slice(params["top"], params["top"] + params["height"])
        columns = slice(params["left"], params["left"] + params["width"])
        box = inpt[None, :, rows, columns].clone(memory_format=torch.channels_last)
        return interpolate(box, self.size, mode=self.interpolation.value, align_corners=False, antialias=True)[0]


@dataclass(frozen=True)
class InceptionCrop(BoxCrop):
    """The crop of big_vision and of Google's ViTs.

    The draw is that of TensorFlow's `tf.image.sample_distorted_bounding_box` (GenerateRandomCrop in
    tensorflow/core/kernels/image/sample_distorted_bounding_box_op.cc), called as `inception_crop` and
    `decode_jpeg_and_inception_crop` in big_vision/pp/ops_image.py call it: with no boxes, and no object to cover.
    torchvision's RandomResizedCrop draws otherwise: here the aspect is uniform, not its logarithm; the height is
    uniform among those that area and aspect allow, not the area; and a box never touches the image's last row or column
    unless it has all of them. big_vision's resize is not antialiased by default, which its ImageNet configs leave as it
    is.

    Args:
        ratio: width / height of the box, between these two. TensorFlow and big_vision write 1.33, not 4/3.
        attempts: draws until one has an area within `scale`; after them the whole image is taken.
    """

    ratio: tuple[float, float] = (0.75, 1.33)
    attempts: int = 100

    def make_params(self, flat_inputs: list[Any]) -> Params:
        rows, columns = flat_inputs[0].shape[-2:]
        boxes = (self._draw(rows, columns) for _ in range(self.attempts))
        return next(filter(None, boxes), {"top": 0, "left": 0, "height": rows, "width": columns})

    def _draw(self, rows: int, columns: int) -> Params | None:
        """One attempt at a box in an image of so many rows and columns."""
        aspect = self.ratio[0] + torch.rand(()).item() * (self.ratio[1] - self.ratio[0])
        least, most = (share * rows * columns for share in self.scale)

        # round() is half to even, as C's lrintf is.
        tallest = round((most / aspect) ** 0.5)
        if round(tallest * aspect) > columns:
            tallest = int((columns + 0.5 - 1e-7) / aspect)
            tallest -= round(tallest * aspect) > columns
        tallest = min(tallest, rows)
        shortest = min(round((least / aspect) ** 0.5), tallest)
        height = shortest + _below(tallest - shortest + 1)

        # Rounding may have left the range of areas by one row.
        if height * round(height * aspect) < least:
            height += 1
        if height * round(height * aspect) > most:
            height -= 1
        width = round(height * aspect)
        if not (least <= height * width <= most and 0 < height <= rows and 0 < width <= columns):
            return None
        # Without + 1, as in the source: the last position is never drawn.
        top, left = _below(max(1, rows - height)), _below(max(1, columns - width))
        return {"top": top, "left": left, "height": height, "width": width}


@dataclass(frozen=True)
class RandomResizedCrop(BoxCrop):
    """torchvision's: the same draws bit for bit, and the same pixels on processors with AVX2, in less time."""

    def make_params(self, flat_inputs: list[Any]) -> Params:
        rows, columns = flat_inputs[0].shape[-2:]
        draw = torch.empty(1)
        for _ in range(10):
            area = rows * columns * draw.uniform_(*self.scale).item()
            aspect = draw.uniform_(*LOG_RATIO).exp_().item()
            width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < width <= columns and 0 < height <= rows:
                top, left = _below(rows - height + 1), _below(columns - width + 1)
                return {"top": top, "left": left, "height": height, "width": width}
        height, width = min(rows, round(columns / RATIO[0])), min(columns, round(rows * RATIO[1]))
        return {"top": (rows - height) // 2, "left": (columns - width) // 2, "height": height, "width": width}


@dataclass(frozen=True)
class PadCrop(Crop):
    """Resize an image of another size, pad it with black, crop: the CIFAR crop (1512.03385, section 4.2).

    Args:
        interpolation: of the antialiased resize, which does not keep the aspect.
        padding: pixels on each side.
    """

    interpolation: InterpolationMode = InterpolationMode.BICUBIC
    padding: int = 4
    mode: ClassVar = "constant"

    def resized(self, image: Tensor) -> tuple[int, int]:
        """The (height, width) to which an image (3, H, W) is resized."""
        return self.size

    def make_params(self, flat_inputs: list[Any]) -> Params:
        sides = zip(self.resized(flat_inputs[0]), self.size, strict=True)
        top, left = (_below(side + 2 * self.padding - inner + 1) for side, inner in sides)
        return {"top": top, "left": left}

    def transform(self, inpt: Tensor, params: Params) -> Tensor:
        image = F.resize(inpt, list(self.resized(inpt)), self.interpolation, antialias=True)
        image = F.pad(image, [self.padding], padding_mode=self.mode)
        return F.crop(image, params["top"], params["left"], *self.size)


@dataclass(frozen=True)
class SimpleCrop(PadCrop):
    """Resize until the image covers the result, mirror its border, crop: DeiT III's simple random crop.

    2204.07118, section 3, "Simple Random Crop"; `--src` of facebookresearch/deit, augment.py. The image keeps its
    aspect; the resize is antialiased, as Pillow's is there.

    Raises:
        UserError: the padding is not below the sides of `size`, so it cannot be mirrored.
    """

    mode: ClassVar = "reflect"

    def __post_init__(self) -> None:
        if self.padding >= min(self.size):
            raise UserError(f"padding {self.padding} must be below the sides of size {self.size}, to be mirrored")

    def resized(self, image: Tensor) -> tuple[int, int]:
        return cover(self.size, image)


def cover(size: tuple[int, int], image: Tensor) -> tuple[int, int]:
    """The (height, width) at which an image (..., H, W) just covers a size, its aspect kept.

    The side that does not bind is rounded down, as torchvision's Resize does.
    """
    (rows, columns), (height, width) = image.shape[-2:], size
    if rows * width <= columns * height:
        return height, max(width, height * columns // rows)
    return max(height, width * rows // columns), width


def _below(count: int) -> int:
    """A uniform draw from range(count)."""
    return int(torch.randint(count, ()))
