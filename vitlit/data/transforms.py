"""What a training image goes through on the host, as uint8."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode

from vitlit.errors import UserError
from vitlit.images.crops import InceptionCrop, PadCrop, RandomResizedCrop, SimpleCrop
from vitlit.images.preprocess import Preprocess

Transform = Callable[[Tensor], Tensor]
CropName = Literal["random_resized", "inception", "simple", "pad", "center"]


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


def check_scale(name: str, scale: tuple[float, float]) -> None:
    """Raise UserError unless a crop's area can be drawn between these two shares of an image."""
    if not 0 < scale[0] <= scale[1] <= 1:
        raise UserError(f"{name} {list(scale)} is no range of shares between 0 and 1")


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
