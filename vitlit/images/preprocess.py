"""From an image to a model's input at evaluation."""

import math
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from vitlit.errors import UserError, check_types
from vitlit.files import read_file
from vitlit.images import raw
from vitlit.images.crops import CenterCrop
from vitlit.images.decode import GROUND, colour, decode_bytes, decode_picture, naming
from vitlit.images.raw import MOST_CHANNELS

Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class Preprocess:
    """Turns images into a model's input at evaluation; stored with the weights.

    Called on an image or a list of images, it gives the model's input (B, C, height, width), float32. An image is a
    path, the bytes of a file, a PIL image, an array (H, W, 3) or a tensor (3, H, W) of uint8, grey ones included; one
    more dimension in front is a batch. C is the length of mean and std: 3, or 1 for grey images. With a range, arrays
    (H, W, C), or (H, W), and tensors (C, H, W) are of any numbers, and C is from 1 to 16.

    Args:
        image_size: (height, width) of the model's input, pixels.
        crop_ratio: the share of the resized image's side that the central crop keeps.
        interpolation: of the antialiased resize.
        mean: by channel, of images scaled to [0, 1].
        std: by channel, likewise.
        squash: resize to a size of the model's aspect whatever the image's, so that no side is cropped more than the
            other (timm's crop_mode squash); by default the aspect is kept.
        ground: the colour under what is transparent in a file: a CSS name, or #rrggbb.
        range: the values of black and white, which become 0 and 1, in files that are read as they are (see `raw`);
            values beyond are kept. None reads every file as RGB of 8 bits.

    Raises:
        UserError: mean, std or the range is out of range, or they have neither 3 numbers nor 1; or the ground is no
            colour.
    """

    image_size: tuple[int, int]
    crop_ratio: float = 0.875
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    squash: bool = False
    ground: str = GROUND
    range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        if not all(0 < number < math.inf for number in self.std) or not all(map(math.isfinite, self.mean)):
            raise UserError(f"mean {self.mean} must be finite and std {self.std} above 0")
        if self.range and not -math.inf < self.range[0] < self.range[1] < math.inf:
            raise UserError(f"range {self.range} must be two numbers that rise: black and white")
        channels = len(self.mean)
        fits = channels in (1, 3) if self.range is None else 1 <= channels <= MOST_CHANNELS
        if not fits or len(self.std) != channels:
            takes = "3 numbers each, or 1 for grey images, unless there is a range"
            takes = f"equally many numbers, 1 to {MOST_CHANNELS}" if self.range else takes
            raise UserError(f"mean {self.mean} and std {self.std} must have {takes}")
        colour(self.ground)

    @property
    def crop(self) -> CenterCrop:
        """Resize to image_size / crop_ratio, or just to cover it, crop the centre: (C, H, W) -> (C, h, w)."""
        how = InterpolationMode(self.interpolation)
        return CenterCrop(self.image_size, how, crop_ratio=self.crop_ratio, squash=self.squash)

    def blank(self, size: tuple[int, int], level: float = 0.0) -> Tensor:
        """An image as `decode` gives it, of a level from black, 0, to white, 1."""
        if self.range:
            return torch.full((len(self.mean), *size), level)
        return torch.full((3, *size), round(255 * level), dtype=torch.uint8)

    def decode(self, data: bytes, path: str | Path) -> Tensor:
        """An image file's content: uint8 (3, H, W), with a range float32 (C, H, W). UserError if it cannot be read."""
        if self.range is None:
            return decode_bytes(data, path, self.ground)
        with naming(path):
            return raw.scaled(raw.read(data), self.range, len(self.mean))

    def normalise(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decoded (B, C, H, W) -> normalised (B, C, H, W) of `dtype`, on the images' device."""
        if self.range is None and len(self.mean) == 1:
            images = F.rgb_to_grayscale(images)
        mean, std = (
            # Not made on the device, which would wait for the GPU.
            torch.tensor(numbers).view(-1, 1, 1).to(images.device, non_blocking=True)
            for numbers in (self.mean, self.std)
        )
        centred = images.float().div_(255).sub_(mean) if self.range is None else images - mean
        return centred.div_(std).to(dtype)

    def __call__(self, images: Any) -> Tensor:
        batches = isinstance(images, Tensor | np.ndarray) and images.ndim == 4
        many = list(images) if batches or isinstance(images, list | tuple) else [images]
        if not many:
            raise UserError("there is no image to preprocess")
        return self.normalise(torch.stack([self.crop(self._pixels(image)) for image in many]))

    def _pixels(self, image: Any) -> Tensor:
        """An image of any kind as `decode` gives it, else UserError."""
        if isinstance(image, str | PathLike):
            return self.decode(read_file(Path(image)), Path(image))
        if isinstance(image, bytes):
            return self.decode(image, "that was given as bytes")
        if self.range is None:
            return pixels(image, self.ground)
        if isinstance(image, Image.Image):
            upright = ImageOps.exif_transpose(image)
            image = np.asarray(upright.convert("RGB") if upright.mode == "P" else upright)
        with naming("that was given"):
            values = image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) else np.asarray(image)
            return raw.scaled(values, self.range, len(self.mean))


def pixels(image: Any, ground: str = GROUND) -> Tensor:
    """An image in memory as uint8 (3, H, W), else UserError."""
    if isinstance(image, np.ndarray | Tensor):
        of_torch, shape = isinstance(image, Tensor), list(image.shape)
        channels = shape[0 if of_torch else -1] if len(shape) == 3 else 1 if len(shape) == 2 and not of_torch else 0
        if channels not in ((1, 3) if of_torch else (1, 3, 4)):
            right = "a tensor of pixels must be (3, H, W)" if of_torch else "an array of pixels must be (H, W, 3)"
            raise UserError(f"{right}, or a batch of such, not {shape}")
        if str(image.dtype).removeprefix("torch.") != "uint8":
            raise UserError(f"pixels must be uint8, 0 to 255, not {image.dtype}; the ViT itself takes normalised ones")
        if isinstance(image, Tensor):
            return image.expand(3, -1, -1)
        image = Image.fromarray(image.reshape(shape[:2]) if channels == 1 else image)
    if not isinstance(image, Image.Image):
        kinds = "a path, bytes, a PIL image, an array (H, W, 3) or a tensor (3, H, W)"
        raise UserError(f"an image is {kinds}, not a {type(image).__name__}")
    try:
        return decode_picture(image, ground)
    except (OSError, ValueError) as error:  # Pillow reads a file when its pixels are needed
        raise UserError(f"cannot read the PIL image: {error}") from error
