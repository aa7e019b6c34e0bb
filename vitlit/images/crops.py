"""Random crops for training: uint8 (3, H, W) -> uint8 (3, height, width), drawn from torch's global generator."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from vitlit.errors import UserError


class Crop(v2.Transform):
    """A transform of one image, called without torchvision's search for images among its arguments.

    The search takes as long as half a resize.
    """

    def __call__(self, image: Tensor) -> Tensor:
        return self.transform(image, self.make_params([image]))


class InceptionCrop(Crop):
    """Crop a random area at a random aspect, then resize it: the crop of big_vision and of Google's ViTs.

    The draw is that of TensorFlow's `tf.image.sample_distorted_bounding_box` (GenerateRandomCrop in
    tensorflow/core/kernels/image/sample_distorted_bounding_box_op.cc), called as `inception_crop` and
    `decode_jpeg_and_inception_crop` in big_vision/pp/ops_image.py call it: with no boxes, and no object to cover. It
    is not that of torchvision's RandomResizedCrop: the aspect is uniform, not its logarithm; the height is uniform
    among those that area and aspect allow, not the area; and a crop never touches the image's last row or column
    unless it has all of them.

    The resize is antialiased. big_vision's own is not by default, which its ImageNet configs leave as it is.

    Args:
        size: (height, width) of the result, pixels.
        scale: the crop's area as a share of the image's, between these two.
        interpolation: of the resize.
        ratio: width / height of the crop, between these two. TensorFlow and big_vision write 1.33, not 4/3.
        attempts: draws until one has an area within `scale`; after them the whole image is taken.

    Raises:
        UserError: a size, scale, ratio or number of attempts that admits no crop.
    """

    def __init__(
        self,
        size: tuple[int, int],
        scale: tuple[float, float] = (0.05, 1.0),
        interpolation: InterpolationMode = InterpolationMode.BILINEAR,
        ratio: tuple[float, float] = (0.75, 1.33),
        attempts: int = 100,
    ) -> None:
        super().__init__()
        _check_size(size)
        if not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(f"scale {scale} must rise within (0, 1]")
        if not 0 < ratio[0] <= ratio[1]:
            raise UserError(f"ratio {ratio} must rise and be above 0")
        if attempts < 1:
            raise UserError(f"attempts {attempts} must be at least 1")
        self.size, self.scale, self.interpolation, self.ratio, self.attempts = (
            size,
            scale,
            interpolation,
            ratio,
            attempts,
        )

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        rows, columns = flat_inputs[0].shape[-2:]
        for _ in range(self.attempts):
            box = self._draw(rows, columns)
            if box is not None:
                return box
        return {"top": 0, "left": 0, "height": rows, "width": columns}

    def _draw(self, rows: int, columns: int) -> dict[str, int] | None:
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

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        return resized_crop(inpt, **params, size=self.size, interpolation=self.interpolation)


class RandomResizedCrop(Crop, v2.RandomResizedCrop):
    """torchvision's, its draws the same bit for bit, and its pixels on processors with AVX2, in less time."""

    def __init__(self, size: tuple[int, int], scale: tuple[float, float], interpolation: InterpolationMode) -> None:
        super().__init__(size, scale, interpolation=interpolation, antialias=True)
        # As torchvision has it, but on the CPU also where a network is built on the meta device.
        self._lowest, self._highest = torch.log(torch.tensor(self.ratio, device="cpu")).tolist()

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        rows, columns = flat_inputs[0].shape[-2:]
        draw = torch.empty(1)
        for _ in range(10):
            area = rows * columns * draw.uniform_(*self.scale).item()
            aspect = draw.uniform_(self._lowest, self._highest).exp_().item()
            width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < width <= columns and 0 < height <= rows:
                top, left = _below(rows - height + 1), _below(columns - width + 1)
                return {"top": top, "left": left, "height": height, "width": width}
        height = min(rows, round(columns / self.ratio[0]))
        width = min(columns, round(rows * self.ratio[1]))
        return {"top": (rows - height) // 2, "left": (columns - width) // 2, "height": height, "width": width}

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        return resized_crop(inpt, **params, size=(self.size[0], self.size[1]), interpolation=self.interpolation)


class SimpleCrop(Crop):
    """Resize until the image covers the result, mirror its border, crop: DeiT III's simple random crop.

    2204.07118, section 3, "Simple Random Crop"; `--src` of facebookresearch/deit, augment.py. The image keeps its
    aspect; the resize is antialiased, as Pillow's is there.

    Args:
        size: (height, width) of the result, pixels.
        interpolation: of the resize; bicubic in the source.
        padding: pixels mirrored on each side; below the sides of `size`.

    Raises:
        UserError: a size or padding out of range.
    """

    def __init__(
        self, size: tuple[int, int], interpolation: InterpolationMode = InterpolationMode.BICUBIC, padding: int = 4
    ) -> None:
        super().__init__()
        _check_size(size)
        if not 0 <= padding < min(size):
            raise UserError(f"padding {padding} must be at least 0 and below the sides of size {size}, to be mirrored")
        self.size, self.interpolation, self.padding = size, interpolation, padding

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        resized = cover(self.size, flat_inputs[0])
        return {"resized": resized, **_position(resized, self.size, self.padding)}

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        image = F.resize(inpt, list(params["resized"]), self.interpolation, antialias=True)
        image = F.pad(image, [self.padding], padding_mode="reflect")
        return F.crop(image, params["top"], params["left"], *self.size)


class PadCrop(Crop):
    """Pad with black, crop: the CIFAR crop (1512.03385, section 4.2). An image of another size is resized first.

    Args:
        size: (height, width) of the result, pixels.
        padding: black pixels on each side.
        interpolation: of the antialiased resize, which does not keep the aspect.

    Raises:
        UserError: a size or padding out of range.
    """

    def __init__(
        self, size: tuple[int, int], padding: int = 4, interpolation: InterpolationMode = InterpolationMode.BICUBIC
    ) -> None:
        super().__init__()
        _check_size(size)
        if padding < 0:
            raise UserError(f"padding {padding} must be at least 0")
        self.size, self.padding, self.interpolation = size, padding, interpolation

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return _position(self.size, self.size, self.padding)

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        # resize returns an image that has the size already as it is.
        image = F.resize(inpt, list(self.size), self.interpolation, antialias=True)
        return F.crop(F.pad(image, [self.padding]), params["top"], params["left"], *self.size)


def resized_crop(
    image: Tensor, top: int, left: int, height: int, width: int, size: tuple[int, int], interpolation: InterpolationMode
) -> Tensor:
    """A box of an image (3, H, W), resized with antialiasing to `size`.

    The box is copied out first: torch resizes a dense uint8 image with its channels last in three quarters of the time
    that a view into a larger one takes. torchvision's resize would come to the same call, and so to the same bits, on
    processors with AVX2, after as long again as the copy takes.
    """
    box = image[None, :, top : top + height, left : left + width].clone(memory_format=torch.channels_last)
    return interpolate(box, size, mode=interpolation.value, align_corners=False, antialias=True)[0]


def cover(size: tuple[int, int], image: Tensor) -> tuple[int, int]:
    """The (height, width) at which an image (..., H, W) just covers a size, its aspect kept.

    The side that does not bind is rounded down, as torchvision's Resize does.
    """
    (rows, columns), (height, width) = image.shape[-2:], size
    if rows * width <= columns * height:
        return height, max(width, height * columns // rows)
    return max(height, width * rows // columns), width


def _check_size(size: tuple[int, int]) -> None:
    if min(size) < 1:
        raise UserError(f"size {size} must be at least 1 pixel high and wide")


def _below(count: int) -> int:
    """A uniform draw from range(count)."""
    return int(torch.randint(count, ()))


def _position(image: tuple[int, int], size: tuple[int, int], padding: int) -> dict[str, int]:
    """Where a crop of a size lies in an image with padding around: every position is as likely."""
    top, left = (_below(side + 2 * padding - inner + 1) for side, inner in zip(image, size, strict=True))
    return {"top": top, "left": left}
