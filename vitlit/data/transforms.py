"""What happens between the decoder and the model, on uint8 tensors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from vitlit.data.crops import InceptionCrop, PadCrop, RandomResizedCrop, SimpleCrop, cover
from vitlit.data.decode import decode
from vitlit.errors import UserError

Transform = Callable[[Tensor], Tensor]
Interpolation = Literal["bilinear", "bicubic"]
CropName = Literal["random_resized", "inception", "simple", "pad", "center"]


@dataclass(frozen=True)
class Preprocess:
    """What an image goes through before the model at evaluation. It is stored with the weights.

    Calling it on paths, or on uint8 tensors (3, H, W), gives the model's input (B, C, height, width), float32, of as
    many channels as mean and std have numbers: 3, or 1 for grey images.

    Args:
        image_size: (height, width) of the model's input, pixels.
        crop_ratio: the share of the resized image's side that the central crop keeps.
        interpolation: of the antialiased resize.
        mean: by channel, of images scaled to [0, 1].
        std: by channel, likewise.

    Raises:
        UserError: mean and std have neither 3 numbers nor 1.
    """

    image_size: tuple[int, int]
    crop_ratio: float = 0.875
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if not all(0 < number < math.inf for number in self.std) or not all(map(math.isfinite, self.mean)):
            raise UserError(f"mean {self.mean} must be finite and std {self.std} above 0")
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
            raise UserError(f"mean {self.mean} and std {self.std} must have 3 numbers each, or 1 for grey images")

    def crop(self, image: Tensor) -> Tensor:
        """Resize and crop centrally: uint8 (3, H, W) -> uint8 (3, height, width).

        The image is resized, its aspect kept, until it just covers image_size / crop_ratio.
        """
        # Rounded down as timm does; 224 / (224 / 248) is a little below 248.
        height, width = (math.floor(side / self.crop_ratio + 1e-6) for side in self.image_size)
        size = cover((height, width), image)
        image = F.resize(image, list(size), InterpolationMode(self.interpolation), antialias=True)
        return F.center_crop(image, list(self.image_size))

    def normalise(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 (B, 3, H, W) -> normalised (B, C, H, W) of `dtype`, on the images' device."""
        if len(self.mean) == 1:
            images = F.rgb_to_grayscale(images)
        mean, std = (
            # Not made on the device, which would wait for all that a GPU has to do.
            torch.tensor(numbers).view(-1, 1, 1).to(images.device, non_blocking=images.is_cuda)
            for numbers in (self.mean, self.std)
        )
        return (images.float().div_(255).sub_(mean).div_(std)).to(dtype)

    def __call__(self, images: str | Path | Tensor | Sequence[str | Path | Tensor]) -> Tensor:
        if isinstance(images, str | Path | Tensor):
            images = [images]
        tensors = [image if isinstance(image, Tensor) else decode(image) for image in images]
        return self.normalise(torch.stack([self.crop(tensor) for tensor in tensors]))


def train_transform(
    preprocess: Preprocess,
    crop: CropName,
    crop_scale: tuple[float, float],
    flip: float,
    augment: Sequence[Transform] = (),
) -> "TrainTransform":
    """Crop, horizontal flip and further augmentation: uint8 (3, H, W) -> uint8 (3, height, width).

    Args:
        preprocess: of evaluation, whose image size and interpolation are used.
        crop: random_resized (torchvision's), inception (TensorFlow's), simple (DeiT III's), pad (CIFAR's), or center as
            at evaluation.
        crop_scale: the area of a random_resized or inception crop as a share of the image's, drawn between these two.
        flip: the probability of a horizontal flip.
        augment: what is done after it, in this order.
    """
    size, how = preprocess.image_size, InterpolationMode(preprocess.interpolation)
    crops: dict[CropName, Callable[[], Transform]] = {
        "random_resized": lambda: RandomResizedCrop(size, crop_scale, how),
        "inception": lambda: InceptionCrop(size, crop_scale, how),
        "simple": lambda: SimpleCrop(size, how),
        "pad": lambda: PadCrop(size, interpolation=how),
        "center": lambda: preprocess.crop,
    }
    if crop not in crops:
        raise UserError(f"data.crop {crop} is unknown; give one of {' '.join(crops)}")
    return TrainTransform(crops[crop](), flip, tuple(augment))


@dataclass(frozen=True)
class TrainTransform:
    """Crop, flip with a probability, augment: uint8 (3, H, W) -> uint8 (3, height, width)."""

    crop: Transform
    flip: float
    augment: tuple[Transform, ...]

    def __call__(self, image: Tensor) -> Tensor:
        image = self.crop(image)
        if torch.rand(()).item() < self.flip:
            image = image.flip(-1)
        for transform in self.augment:
            image = transform(image)
        return image


def check_augment(augment: Sequence[Transform], image_size: tuple[int, int]) -> None:
    """Try transforms on a grey image; UserError where one fails, or uint8 (3, height, width) does not come out."""
    image = torch.full((3, *image_size), 128, dtype=torch.uint8)
    with torch.random.fork_rng(devices=[]):
        for transform in augment:
            try:
                image = transform(image)
            except Exception as error:  # whatever was named: it is not for images, or has values that it cannot work by
                why = str(error) or type(error).__name__
                raise UserError(f"data.augment: {type(transform).__name__} fails on an image: {why}") from error
    if image.dtype != torch.uint8 or image.shape != (3, *image_size):
        raise UserError(
            f"data.augment makes images {list(image.shape)} of {str(image.dtype).removeprefix('torch.')}; it must "
            f"leave them uint8 {[3, *image_size]}: normalisation follows on the device"
        )
