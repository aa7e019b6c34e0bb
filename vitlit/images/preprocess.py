"""From an image to a model's input at evaluation."""

import math
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from vitlit.errors import UserError, check_types
from vitlit.images.crops import CenterCrop
from vitlit.images.decode import GROUND, colour, decode, decode_bytes, decode_picture

Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class Preprocess:
    """Turns images into a model's input at evaluation; stored with the weights.

    Called on an image or a list of images, it gives the model's input (B, C, height, width), float32. An image is a
    path, the bytes of a file, a PIL image, an array (H, W, 3) or a tensor (3, H, W) of uint8, grey ones included; one
    more dimension in front is a batch. C is the length of mean and std: 3, or 1 for grey images.

    Args:
        image_size: (height, width) of the model's input, pixels.
        crop_ratio: the share of the resized image's side that the central crop keeps.
        interpolation: of the antialiased resize.
        mean: by channel, of images scaled to [0, 1].
        std: by channel, likewise.
        squash: resize to a size of the model's aspect whatever the image's, so that no side is cropped more than the
            other (timm's crop_mode squash); by default the aspect is kept.
        ground: the colour under what is transparent in a file: a CSS name, or #rrggbb.

    Raises:
        UserError: mean or std is out of range, or they have neither 3 numbers nor 1; or the ground is no colour.
    """

    image_size: tuple[int, int]
    crop_ratio: float = 0.875
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    squash: bool = False
    ground: str = GROUND

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        if not all(0 < number < math.inf for number in self.std) or not all(map(math.isfinite, self.mean)):
            raise UserError(f"mean {self.mean} must be finite and std {self.std} above 0")
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
            raise UserError(f"mean {self.mean} and std {self.std} must have 3 numbers each, or 1 for grey images")
        colour(self.ground)

    @property
    def crop(self) -> CenterCrop:
        """Resize to image_size / crop_ratio, or just to cover it, crop the centre: uint8 (3, H, W) -> (3, h, w)."""
        how = InterpolationMode(self.interpolation)
        return CenterCrop(self.image_size, how, crop_ratio=self.crop_ratio, squash=self.squash)

    def normalise(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 (B, 3, H, W) -> normalised (B, C, H, W) of `dtype`, on the images' device."""
        if len(self.mean) == 1:
            images = F.rgb_to_grayscale(images)
        mean, std = (
            # Not made on the device, which would wait for the GPU.
            torch.tensor(numbers).view(-1, 1, 1).to(images.device, non_blocking=True)
            for numbers in (self.mean, self.std)
        )
        return images.float().div_(255).sub_(mean).div_(std).to(dtype)

    def __call__(self, images: Any) -> Tensor:
        batches = isinstance(images, Tensor | np.ndarray) and images.ndim == 4
        many = list(images) if batches or isinstance(images, list | tuple) else [images]
        if not many:
            raise UserError("there is no image to preprocess")
        return self.normalise(torch.stack([self.crop(pixels(image, self.ground)) for image in many]))


def pixels(image: Any, ground: str = GROUND) -> Tensor:
    """An image of any kind that `Preprocess` takes as uint8 (3, H, W), else UserError."""
    if isinstance(image, str | PathLike):
        return decode(Path(image), ground)
    if isinstance(image, bytes):
        return decode_bytes(image, "that was given as bytes", ground)
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
