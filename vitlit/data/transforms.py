"""Transforms of training images on the host, before they are normalised."""

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
PIXELS = ("range", "mean", "std")  # what a network was trained with, and must be evaluated with
CropName = Literal["random_resized", "inception", "simple", "pad", "resmall", "center"]


@dataclass(frozen=True)
class TrainTransform:
    """Crop, flip with a probability, augment: (C, H, W) -> (C, height, width), of the same type."""

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
    theirs = getattr(made, "range", None)
    levels = given.get("range", theirs)
    if channels not in (1, 3) and levels is None:
        needs = "image folders give 3 channels, or 1 (grey); data.range takes more"
        raise UserError(f"model.vit.in_channels is {channels}, but {needs}")
    # Values of which the mean and std of the weights say nothing.
    others = levels != theirs and not (made and "range" in fixed)
    if others and not {"mean", "std"} <= given.keys():
        measure = "`vitlit data check ROOT --range {:g} {:g}` measures them".format(*levels)
        raise UserError(f"data.range needs data.mean and data.std, a number for each channel; {measure}")
    for name, value in given.items():
        if name in ("mean", "std") and len(value) != channels:
            raise UserError(f"data.{name} has {len(value)} numbers, but model.vit.in_channels is {channels}")
        if name in fixed and name in PIXELS and not others and value != (had := getattr(made, name, value)):
            raise UserError(f"data.{name} is {value}, but {source} was made with {had}; leave it out")
    if not isinstance(made, Preprocess):
        made = Preprocess(size, mean=(0.5,) * channels, std=(0.5,) * channels, range=levels)
    return replace(made, image_size=size, **given)


def check_scale(name: str, scale: tuple[float, float]) -> None:
    if not 0 < scale[0] <= scale[1] <= 1:
        raise UserError(f"{name} {list(scale)} is not a range of shares between 0 and 1")


def check_augment(augment: Sequence[Transform], preprocess: Preprocess, size: tuple[int, int]) -> None:
    """Try transforms on a grey image; UserError if one fails, or if the result is not of the same type and shape."""
    image = grey = preprocess.blank(size, 0.5)
    tries = 30 if preprocess.range else 1  # of those that draw what they do, and are mostly for RGB
    with torch.random.fork_rng(devices=[]):
        for transform in [*augment] * tries:
            try:
                image = transform(image)
            except Exception as error:  # a config can name any class, with any values
                why = str(error) or type(error).__name__
                raise UserError(f"data.augment: {type(transform).__name__} fails on an image: {why}") from error
    if image.dtype != grey.dtype or image.shape != grey.shape:
        got, wanted = (f"{str(each.dtype).removeprefix('torch.')} {list(each.shape)}" for each in (image, grey))
        raise UserError(f"data.augment makes images {got}; they must stay {wanted}, not yet normalised")
