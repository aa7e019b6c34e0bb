"""From an image to a model's input at evaluation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from vitlit.errors import UserError
from vitlit.images.crops import enlarged
from vitlit.images.decode import decode

Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class Preprocess:
    """Turns images into a model's input at evaluation; stored with the weights.

    Called on paths, or on uint8 tensors (3, H, W), it gives the model's input (B, C, height, width), float32. C is the
    length of mean and std: 3, or 1 for grey images.

    Args:
        image_size: (height, width) of the model's input, pixels.
        crop_ratio: the share of the resized image's side that the central crop keeps.
        interpolation: of the antialiased resize.
        mean: by channel, of images scaled to [0, 1].
        std: by channel, likewise.
        squash: resize to a size of the model's aspect whatever the image's, so that no side is cropped more than the
            other (timm's crop_mode squash); by default the aspect is kept.

    Raises:
        UserError: mean or std is out of range, or they have neither 3 numbers nor 1.
    """

    image_size: tuple[int, int]
    crop_ratio: float = 0.875
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    squash: bool = False

    def __post_init__(self) -> None:
        if not all(0 < number < math.inf for number in self.std) or not all(map(math.isfinite, self.mean)):
            raise UserError(f"mean {self.mean} must be finite and std {self.std} above 0")
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
            raise UserError(f"mean {self.mean} and std {self.std} must have 3 numbers each, or 1 for grey images")

    def crop(self, image: Tensor) -> Tensor:
        """Resize to image_size / crop_ratio, or just to cover it, crop the centre: uint8 (3, H, W) -> (3, h, w)."""
        size = enlarged(self.image_size, self.crop_ratio, self.squash, image)
        image = F.resize(image, list(size), InterpolationMode(self.interpolation), antialias=True)
        return F.center_crop(image, list(self.image_size))

    def normalise(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 (B, 3, H, W) -> normalised (B, C, H, W) of `dtype`, on the images' device."""
        if len(self.mean) == 1:
            images = F.rgb_to_grayscale(images)
        mean, std = (
            # Not made on the device, which would wait for the GPU.
            torch.tensor(numbers).view(-1, 1, 1).to(images.device, non_blocking=images.is_cuda)
            for numbers in (self.mean, self.std)
        )
        return images.float().div_(255).sub_(mean).div_(std).to(dtype)

    def __call__(self, images: str | Path | Tensor | Sequence[str | Path | Tensor]) -> Tensor:
        if isinstance(images, str | Path | Tensor):
            images = [images]
        tensors = [image if isinstance(image, Tensor) else decode(image) for image in images]
        return self.normalise(torch.stack([self.crop(tensor) for tensor in tensors]))
