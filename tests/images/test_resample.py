"""Crops of many images at once: the pixels of the crops one by one, within a level."""

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from vitlit.images import resample
from vitlit.images.crops import CenterCrop, Cut, InceptionCrop, PadCrop, RandomResizedCrop, ResmallCrop, SimpleCrop
from vitlit.images.resample import cut_all

SIZE, HOW = (48, 40), (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
CROPS: list[Any] = [kind(SIZE, interpolation=how) for kind in (RandomResizedCrop, InceptionCrop) for how in HOW]
CROPS += [kind(SIZE, how) for kind in (PadCrop, SimpleCrop, ResmallCrop, CenterCrop) for how in HOW]
CROPS += [CenterCrop(SIZE, crop_ratio=0.9, squash=True), ResmallCrop(SIZE, crop_ratio=0.3), PadCrop(SIZE, padding=60)]


def packed(images: list[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Images (3, H, W) as one row of pixels, and where each begins, with its width."""
    places, first = [], 0
    for image in images:
        places.append((first, image.shape[2]))
        first += image.shape[1] * image.shape[2]
    return torch.cat([image.permute(1, 2, 0).reshape(-1, 3) for image in images]), places


def off(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours.int() - theirs.int()).abs()


@pytest.fixture(scope="module")
def images(photos: list[Image.Image]) -> list[Tensor]:
    """Parts of photographs, noise and an edge, from 1 pixel to 400."""
    draw = torch.Generator().manual_seed(0)
    found = [torch.randint(256, (3, *size), dtype=torch.uint8, generator=draw) for size in ((1, 1), (90, 3), (48, 40))]
    found.append((torch.arange(200) > 99).to(torch.uint8).mul(255).expand(3, 30, -1))
    for number in range(16):
        left, top, width, height = torch.randint(8, 400, (4,), generator=draw).tolist()
        found.append(F.pil_to_tensor(photos[number % 2].crop((left, top, left + width, top + height))))
    return found


@pytest.mark.parametrize("crop", CROPS, ids=str)
def test_a_batch_has_the_pixels_of_each_crop(crop: Any, images: list[Tensor]) -> None:
    expected, cuts = [], []
    for number, image in enumerate(images):
        torch.manual_seed(number)
        one, then = crop(image), torch.rand(())
        expected.append(one.flip(-1) if number % 3 == 0 else one)
        torch.manual_seed(number)
        cuts.append(crop.plan(*image.shape[1:])._replace(flip=number % 3 == 0))
        assert torch.rand(()) == then  # the same draws
    differences = off(cut_all(*packed(images), cuts, crop), torch.stack(expected).permute(0, 2, 3, 1))
    assert differences.max() <= 1
    assert (differences > 0).float().mean() < 1e-4


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (7, 7), (64, 33), (300, 2)])
def test_any_size_is_resized_to_any_other_as_torch_does_it(how: InterpolationMode, size: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(0)
    for wanted in ((1, 1), (5, 64), (7, 7), (128, 3), (33, 300)):
        image = torch.randint(256, (3, *size), dtype=torch.uint8, generator=draw)
        crop, cut = PadCrop(wanted, how, padding=0), Cut((0, 0, *size), wanted)
        last = image[None].clone(memory_format=torch.channels_last)
        expected = interpolate(last, wanted, mode=how.value, antialias=True, align_corners=False)
        assert off(cut_all(*packed([image]), [cut], crop), expected.permute(0, 2, 3, 1)).max() <= 1


def test_parts_of_a_batch_are_the_batch(images: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    crop = RandomResizedCrop(SIZE)
    cuts = [crop.plan(*image.shape[1:]) for image in images]
    whole = cut_all(*packed(images), cuts, crop)
    monkeypatch.setattr(resample, "AT_ONCE", 100_000)
    assert torch.equal(cut_all(*packed(images), cuts, crop), whole)
