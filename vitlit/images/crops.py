"""Random crops for training: uint8 (3, H, W) -> uint8 (3, height, width), drawn from torch's global generator."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

Box = tuple[int, int, int, int]  # top, left, height, width, pixels
RATIO = (3 / 4, 4 / 3)  # width / height of torchvision's crop
LOG_RATIO = torch.log(torch.tensor(RATIO, device="cpu")).tolist()  # rounded as torchvision rounds it


class Cut(NamedTuple):
    """What a crop takes of an image: a box, its size when resized, and where in that (or before it) the crop begins."""

    box: Box
    resized: tuple[int, int]
    begin: tuple[int, int] = (0, 0)
    flip: bool = False


@dataclass(frozen=True)
class BoxCrop(ABC):
    """Crop a box of random area (`scale`, shares of the image's) and aspect, then resize it with antialiasing."""

    # Not a torchvision transform, whose search for images among the arguments takes half as long as a resize.

    size: tuple[int, int]
    scale: tuple[float, float] = (0.05, 1.0)
    interpolation: InterpolationMode = InterpolationMode.BILINEAR
    mode: ClassVar = "constant"

    @abstractmethod
    def draw(self, rows: int, columns: int) -> Box:
        """A random box within an image."""

    def plan(self, rows: int, columns: int) -> Cut:
        """What a call would take of an image of this size, with the same draws."""
        return Cut(self.draw(rows, columns), self.size)

    def cut(self, image: Tensor, box: Box) -> Tensor:
        # torch resizes a dense channels-last uint8 copy in three quarters of the time that it needs for a view.
        # torchvision ends in the same call, with the same bits on AVX2, but takes longer to get there.
        top, left, height, width = box
        part = image[None, :, top : top + height, left : left + width].clone(memory_format=torch.channels_last)
        return interpolate(part, self.size, mode=self.interpolation.value, align_corners=False, antialias=True)[0]

    def __call__(self, image: Tensor) -> Tensor:
        return self.cut(image, self.draw(*image.shape[-2:]))


@dataclass(frozen=True)
class InceptionCrop(BoxCrop):
    """The crop of big_vision and of Google's ViTs.

    It draws as `inception_crop` in big_vision/pp/ops_image.py: TensorFlow's sample_distorted_bounding_box with no
    object to cover. Unlike in torchvision's crop the aspect is uniform, not its logarithm; the height, not the area, is
    uniform; and a box never touches the last row or column unless it has all of them.
    """

    ratio: tuple[float, float] = (0.75, 1.33)  # width / height; TensorFlow and big_vision write 1.33, not 4/3

    def draw(self, rows: int, columns: int) -> Box:
        least, most = (share * rows * columns for share in self.scale)
        for _ in range(100):
            aspect = self.ratio[0] + torch.rand(()).item() * (self.ratio[1] - self.ratio[0])
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
            if least <= height * width <= most and 0 < height <= rows and 0 < width <= columns:
                # No + 1, as in the source: the last position is never drawn.
                return _below(max(1, rows - height)), _below(max(1, columns - width)), height, width
        return 0, 0, rows, columns


@dataclass(frozen=True)
class RandomResizedCrop(BoxCrop):
    """torchvision's: the same draws bit for bit, and on processors with AVX2 the same pixels, in less time."""

    def draw(self, rows: int, columns: int) -> Box:
        number = torch.empty(1)
        for _ in range(10):
            area = rows * columns * number.uniform_(*self.scale).item()
            aspect = number.uniform_(*LOG_RATIO).exp_().item()
            width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < width <= columns and 0 < height <= rows:
                return _below(rows - height + 1), _below(columns - width + 1), height, width
        height, width = min(rows, round(columns / RATIO[0])), min(columns, round(rows * RATIO[1]))
        return (rows - height) // 2, (columns - width) // 2, height, width


@dataclass(frozen=True)
class PadCrop:
    """Resize an image of another size, pad it with black, crop: the CIFAR crop (1512.03385, section 4.2)."""

    size: tuple[int, int]
    interpolation: InterpolationMode = InterpolationMode.BICUBIC
    padding: int = 4
    mode: ClassVar = "constant"

    def resized(self, rows: int, columns: int) -> tuple[int, int]:
        return self.size

    def padded(self, image: Tensor) -> Tensor:
        image = F.resize(image, list(self.resized(*image.shape[-2:])), self.interpolation, antialias=True)
        return F.pad(image, [self.padding], padding_mode=self.mode) if self.padding else image

    def place(self, outer: int, inner: int) -> int:
        """Where the crop begins along a side of the resized image."""
        return _below(outer + 2 * self.padding - inner + 1) - self.padding

    def plan(self, rows: int, columns: int) -> Cut:
        height, width = self.resized(rows, columns)
        top, left = self.place(height, self.size[0]), self.place(width, self.size[1])
        return Cut((0, 0, rows, columns), (height, width), (top, left))

    def __call__(self, image: Tensor) -> Tensor:
        top, left = (first + self.padding for first in self.plan(*image.shape[-2:]).begin)
        return self.padded(image)[:, top : top + self.size[0], left : left + self.size[1]]


@dataclass(frozen=True)
class SimpleCrop(PadCrop):
    """Resize to cover the size, mirror the border, crop: DeiT III's simple random crop (2204.07118, section 3)."""

    mode: ClassVar = "reflect"

    def resized(self, rows: int, columns: int) -> tuple[int, int]:
        return cover(self.size, rows, columns)


@dataclass(frozen=True)
class ResmallCrop(PadCrop):
    """Resize as evaluation does, crop anywhere: big_vision's resmall_crop (`configs/transfer.py`), its best for CIFAR.

    With `squash` it is their resize_crop. The resize is antialiased.
    """

    padding: int = 0
    crop_ratio: float = 0.875
    squash: bool = False

    def resized(self, rows: int, columns: int) -> tuple[int, int]:
        # Rounded down as timm does; 224 / (224 / 248) is a little below 248.
        height, width = (math.floor(side / self.crop_ratio + 1e-6) for side in self.size)
        return (height, width) if self.squash else cover((height, width), rows, columns)


@dataclass(frozen=True)
class CenterCrop(ResmallCrop):
    """Evaluation's crop: resize to size / crop_ratio, or just to cover that without `squash`, and crop the centre."""

    def place(self, outer: int, inner: int) -> int:
        return round((outer - inner) / 2)  # as torchvision does


def cover(size: tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
    """(height, width) at which an image just covers a size, aspect kept, rounded down as in torchvision's Resize."""
    height, width = size
    if rows * width <= columns * height:
        return height, max(width, height * columns // rows)
    return max(height, width * rows // columns), width


def _below(count: int) -> int:
    return int(torch.randint(count, ()))
