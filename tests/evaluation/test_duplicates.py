"""Copies of real photographs are found however they were made, and pictures that differ in one place are told apart."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps

from vitlit.evaluation import duplicates


def thumbnails(images: list[Image.Image]) -> np.ndarray:
    small = [np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)) for image in images]
    return np.stack(small).transpose(0, 3, 1, 2)


def compressed(image: Image.Image, quality: int) -> Image.Image:
    file = BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


@pytest.fixture(scope="module")
def crops(photos: list[Image.Image]) -> list[Image.Image]:
    """48 pictures, each of another part of two photographs."""
    boxes = [(x, y, x + 120, y + 100) for y in (200, 260, 320) for x in range(0, 520, 70)]
    return [photo.crop(box) for photo in photos for box in boxes]


def test_resized_recompressed_and_mirrored_copies_are_found(crops: list[Image.Image]) -> None:
    copies = [
        *(image.resize((60, 50)) for image in crops[:8]),
        *(compressed(image, 40) for image in crops[8:16]),
        *(ImageOps.mirror(image) for image in crops[16:24]),
        *(compressed(ImageOps.mirror(image.resize((90, 75))), 60) for image in crops[24:32]),
    ]
    pairs, apart = duplicates(thumbnails([*crops, *copies]), 3)
    assert {tuple(pair) for pair in pairs.tolist()} == {(row, len(crops) + row) for row in range(32)}
    assert apart.tolist() == sorted(apart)
    mirrored = pairs[:, 0].tolist().index(16)
    assert apart[mirrored] == 0


@pytest.mark.parametrize("k", [1, 5, 100])
def test_so_many_nearest_are_compared_as_are_asked_for(crops: list[Image.Image], k: int) -> None:
    """Of four same images each has so many partners; more than there are do no harm."""
    pairs, apart = duplicates(thumbnails([crops[0]] * 4 + crops[1:3]), k)
    assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs)
    assert len(pairs) == 6 if k > 1 else 2 <= len(pairs) <= 4
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert not apart.any()


def test_pictures_that_differ_in_one_place_are_two(crops: list[Image.Image]) -> None:
    """As a drawing of a hand in two skin colours; the same change all over is what a compression does."""
    one = thumbnails(crops[:1])
    other = one.copy()
    other[0, :, 10:18, 10:18] = np.minimum(one[0, :, 10:18, 10:18].astype(int) + 20, 255)
    assert len(duplicates(np.concatenate([one, other]))[0]) == 0
    other = one.copy()
    shift = np.array([40, -20, 0])[:, None, None]  # of colour alone
    other[0, :, 10:18, 10:18] = np.clip(one[0, :, 10:18, 10:18] + shift, 0, 255)
    assert len(duplicates(np.concatenate([one, other]))[0]) == 0
    noise = np.random.default_rng(0).integers(-16, 17, one.shape)
    noisy = np.clip(one + noise, 0, 255).astype(np.uint8)
    assert duplicates(np.concatenate([one, noisy]))[0].tolist() == [[0, 1]]


def test_flat_pictures_of_two_colours_are_two() -> None:
    flat = np.stack([np.full((3, 32, 32), level, np.uint8) for level in (0, 60, 120, 255)])
    red, green = np.zeros((2, 3, 32, 32), np.uint8)
    red[0], green[1] = 100, 51  # of one brightness
    assert len(duplicates(np.stack([*flat, red, green]))[0]) == 0


def test_one_image_has_no_pair() -> None:
    pairs, apart = duplicates(np.zeros((1, 3, 32, 32), np.uint8))
    assert pairs.shape == (0, 2)
    assert apart.shape == (0,)
