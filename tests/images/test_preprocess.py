"""Preprocessing: torchvision's and Pillow's evaluation crop, and normalised pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import user_error
from PIL import Image
from test_decode import pixels
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from vitlit.data import Preprocess
from vitlit.data.transforms import train_transform
from vitlit.images.decode import decode
from vitlit.images.preprocess import Interpolation


def torchvisions(image: Tensor, size: int, ratio: float, interpolation: Interpolation) -> Tensor:
    """Resize and CenterCrop as torchvision's evaluation presets chain them."""
    resize = v2.Resize(int(size / ratio), InterpolationMode(interpolation), antialias=True)
    cropped: Tensor = v2.Compose([resize, v2.CenterCrop(size)])(image)
    return cropped


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("size", "ratio"), [(224, 0.875), (224, 1.0), (96, 0.9), (384, 1.0), (600, 0.875)])
def test_the_evaluation_crop_is_torchvisions_and_pillows_within_one_level(
    photos: list[Image.Image], size: int, ratio: float, interpolation: Interpolation
) -> None:
    preprocess = Preprocess((size, size), ratio, interpolation)
    for photo in (photos[0], photos[1].rotate(90, expand=True), photos[1].crop((7, 3, 340, 350))):
        image = v2.functional.pil_to_tensor(photo)
        crop = preprocess.crop(image)
        assert torch.equal(crop, torchvisions(image, size, ratio, interpolation))

        short = int(size / ratio)
        width, height = (int(short * side / min(photo.size)) for side in photo.size)
        resized = photo.resize((width, height), getattr(Image.Resampling, interpolation.upper()))
        left, top = round((width - size) / 2), round((height - size) / 2)
        expected = np.asarray(resized.crop((left, top, left + size, top + size))).astype(int)
        # Both round between their two passes; a bicubic that enlarges overshoots, so that it adds up.
        assert np.abs(pixels(crop) - expected).max() <= (1 if short < min(photo.size) else 2)


@pytest.mark.parametrize("size", [(32, 48), (48, 32), (64, 16), (16, 64)])
@pytest.mark.parametrize("ratio", [1.0, 0.875])
def test_a_crop_that_is_not_square_keeps_the_aspect_and_the_middle(size: tuple[int, int], ratio: float) -> None:
    # Brightness grows with the row in one channel and with the column in another.
    rows, columns = 200, 300
    image = torch.stack(
        [
            torch.arange(rows)[:, None].expand(rows, columns),
            torch.arange(columns)[None].expand(rows, columns) * 2 // 3,
            torch.zeros(rows, columns, dtype=torch.int64),
        ]
    ).to(torch.uint8)
    crop = Preprocess(size, ratio).crop(image).double()
    assert crop.shape == (3, *size)
    scale = max(size[0] / rows, size[1] / columns) / ratio  # it just covers the size over the ratio
    within = 0.75 / scale + 0.5  # half a pixel of the crop, where an odd rest is to be halved
    assert crop[0].mean().item() == pytest.approx((rows - 1) / 2, abs=within)
    assert crop[1].mean().item() == pytest.approx((columns - 1) / 3, abs=within)
    row_step = (crop[0, -5, 8] - crop[0, 4, 8]).item() / (size[0] - 9)
    column_step = (crop[1, 8, -5] - crop[1, 8, 4]).item() / (size[1] - 9)
    assert row_step == pytest.approx(1 / scale, rel=0.1)
    assert column_step == pytest.approx(2 / 3 / scale, rel=0.1)


@pytest.mark.parametrize("ratio", [1.0, 0.875])
def test_squash_resizes_to_the_models_aspect(photo: Image.Image, ratio: float) -> None:
    image = v2.functional.pil_to_tensor(photo.crop((0, 0, 200, 90)))
    resize = v2.Resize([int(32 / ratio), int(48 / ratio)], InterpolationMode.BILINEAR, antialias=True)
    expected = v2.CenterCrop([32, 48])(resize(image))
    assert torch.equal(Preprocess((32, 48), ratio, "bilinear", squash=True).crop(image), expected)
    assert not torch.equal(Preprocess((32, 48), ratio, "bilinear").crop(image), expected)


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (8, 8), (3, 40), (1, 500), (500, 1), (31, 33), (427, 640)])
@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
def test_images_of_any_shape_give_the_size_wanted(shape: tuple[int, int], size: tuple[int, int]) -> None:
    image = torch.full((3, *shape), 77, dtype=torch.uint8)
    for transform in (Preprocess(size).crop, train_transform(Preprocess(size), "random_resized", (0.05, 1.0), 0.5)):
        crop = transform(image)
        assert crop.shape == (3, *size)
        assert crop.dtype == torch.uint8
        assert bool((crop == 77).all())


def test_normalising_is_torchvisions(photo: Image.Image) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = v2.functional.pil_to_tensor(photo)[None]
    expected = v2.functional.normalize(images.double() / 255, list(mean), list(std))
    preprocess = Preprocess((8, 8), mean=mean, std=std)
    assert (preprocess.normalise(images) - expected).abs().max() < 1e-6
    assert preprocess.normalise(images, torch.bfloat16).dtype == torch.bfloat16
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert Preprocess((8, 8)).normalise(black_and_white).flatten().tolist() == [-1.0] * 3 + [1.0] * 3


def test_preprocess_takes_one_or_many_paths_and_tensors(photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    photo.save(path)
    preprocess = Preprocess((32, 48))
    batch = preprocess([path, str(path), decode(path)])
    assert batch.shape == (3, 3, 32, 48)
    assert batch.dtype == torch.float32
    assert torch.equal(batch[0], batch[1])
    assert torch.equal(batch[0], batch[2])
    assert torch.equal(preprocess(path), batch[:1])
    assert torch.equal(preprocess(decode(path)), batch[:1])


def test_an_image_is_taken_in_any_form_one_or_many(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.png")
    array = np.array(photo)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    preprocess = Preprocess((32, 48))
    expected = preprocess(tmp_path / "photo.png")
    assert expected.shape == (1, 3, 32, 48)
    for image in (str(tmp_path / "photo.png"), (tmp_path / "photo.png").read_bytes(), photo, array, tensor):
        assert torch.equal(preprocess(image), expected)
        assert torch.equal(preprocess([image, image]), expected.repeat(2, 1, 1, 1))
    for batch in (np.stack([array, array]), torch.stack([tensor, tensor]), (photo, array)):
        assert torch.equal(preprocess(batch), expected.repeat(2, 1, 1, 1))
    grey = photo.convert("L")
    for image in (grey, np.array(grey), np.array(grey)[..., None], torch.from_numpy(np.array(grey))[None]):
        assert torch.equal(preprocess(image), preprocess(grey.convert("RGB")))
    turned = photo.copy()
    turned.getexif()[0x0112] = 6
    assert torch.equal(preprocess(turned), preprocess(photo.rotate(-90, expand=True)))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ([], "there is no image to preprocess"),
        (None, r"an image is a path, bytes, .* not a NoneType"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"a tensor of pixels must be \(3, H, W\), .* not \[8, 8, 3\]"),
        (torch.zeros(2, 2, 3, 8, 8, dtype=torch.uint8), r"a tensor of pixels must be .* not \[2, 2, 3, 8, 8\]"),
        (torch.zeros(8, 8, dtype=torch.uint8), r"a tensor of pixels must be .* not \[8, 8\]"),
        (torch.zeros(3, 8, 8), r"pixels must be uint8, 0 to 255, not torch\.float32"),
        (np.zeros((3, 8, 8), np.uint8), r"an array of pixels must be \(H, W, 3\), .* not \[3, 8, 8\]"),
        (np.zeros((8, 8, 3)), r"pixels must be uint8, 0 to 255, not float64"),
        (b"no image", r"cannot read the image that was given as bytes"),
        (Image.new("F", (8, 8)), r"cannot read the PIL image: it has more than 8 bits"),
    ],
)
def test_what_is_no_image_is_said(image: object, words: str) -> None:
    user_error(words, Preprocess((8, 8)), image)
