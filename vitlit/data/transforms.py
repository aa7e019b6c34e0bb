"""Transforms of training images on the host, as uint8."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode

from vitlit.errors import UserError, check_range
from vitlit.images.crops import BoxCrop, Cut, InceptionCrop, PadCrop, RandomResizedCrop, ResmallCrop, SimpleCrop
from vitlit.images.preprocess import Preprocess
from vitlit.model import ViT

Transform = Callable[[Tensor], Tensor]
PIXELS = ("mean", "std")  # what a network was trained with, and must be evaluated with
CropName = Literal["random_resized", "inception", "simple", "pad", "resmall", "center"]


@dataclass(frozen=True)
class TrainTransform:
    """Crop, flip with a probability, augment: uint8 (3, H, W) -> uint8 (3, height, width)."""

    crop: BoxCrop | PadCrop
    flip: float
    augment: tuple[Transform, ...]

    def plan(self, rows: int, columns: int) -> Cut:
        cut = self.crop.plan(rows, columns)
        return cut._replace(flip=torch.rand(()).item() < self.flip)

    def __call__(self, image: Tensor) -> Tensor:
        image = self.crop(image)
        if torch.rand(()).item() < self.flip:
            image = image.flip(-1)
        for transform in self.augment:
            image = transform(image)
        return image


def train_transform(
    preprocess: Preprocess, crop: CropName, scale: tuple[float, float], flip: float, augment: Sequence[Transform] = ()
) -> TrainTransform:
    """The transform for ImageFolderData's options, with evaluation's image size and interpolation."""
    check_range("data", 0, 1, flip=flip)
    check_range("data", 0.1, 1, crop_ratio=preprocess.crop_ratio)  # images are resized to image_size / crop_ratio
    size, how = preprocess.image_size, InterpolationMode(preprocess.interpolation)
    crops: dict[CropName, Callable[[], BoxCrop | PadCrop]] = {
        "random_resized": lambda: RandomResizedCrop(size, scale, how),
        "inception": lambda: InceptionCrop(size, scale, how),
        "simple": lambda: SimpleCrop(size, how),
        "pad": lambda: PadCrop(size, how),
        "resmall": lambda: ResmallCrop(size, how, crop_ratio=preprocess.crop_ratio, squash=preprocess.squash),
        "center": lambda: preprocess.crop,
    }
    return TrainTransform(crops[crop](), flip, tuple(augment))


def matched(
    given: Mapping[str, Any], size: tuple[int, int], vit: ViT, source: object, fixed: Iterable[str]
) -> Preprocess:
    """The preprocessing of a ViT's weights, with what is given; UserError if that contradicts what is `fixed`."""
    channels, made = vit.config.in_channels, vit.preprocess
    if channels not in (1, 3):
        raise UserError(f"model.vit.in_channels is {channels}, but image folders give 3 channels, or 1 (grey)")
    for name, value in given.items():
        if name in ("mean", "std") and len(value) != channels:
            raise UserError(f"data.{name} has {len(value)} numbers, but model.vit.in_channels is {channels}")
        if name in fixed and name in PIXELS and value != (theirs := getattr(made, name, value)):
            raise UserError(f"data.{name} is {value}, but {source} was made with {theirs}; leave it out")
    if not isinstance(made, Preprocess):
        made = Preprocess(size, mean=(0.5,) * channels, std=(0.5,) * channels)
    return replace(made, image_size=size, **given)


def check_scale(name: str, scale: tuple[float, float]) -> None:
    if not 0 < scale[0] <= scale[1] <= 1:
        raise UserError(f"{name} {list(scale)} is not a range of shares between 0 and 1")


def check_augment(augment: Sequence[Transform], image_size: tuple[int, int]) -> None:
    """Try transforms on a grey image; UserError if one fails, or if the result is not uint8 (3, height, width)."""
    image = torch.full((3, *image_size), 128, dtype=torch.uint8)
    with torch.random.fork_rng(devices=[]):
        for transform in augment:
            try:
                image = transform(image)
            except Exception as error:  # a config can name any class, with any values
                why = str(error) or type(error).__name__
                raise UserError(f"data.augment: {type(transform).__name__} fails on an image: {why}") from error
    if image.dtype != torch.uint8 or image.shape != (3, *image_size):
        got = f"{list(image.shape)} of {str(image.dtype).removeprefix('torch.')}"
        raise UserError(f"data.augment makes images {got}; they must stay uint8 {[3, *image_size]}, not yet normalised")
