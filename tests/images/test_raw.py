"""Images of any channels and bits: each reader gives the numbers that another library wrote."""

import io
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from conftest import png16, user_error
from PIL import Image

from vitlit.data import Preprocess
from vitlit.data.bad_images import BadImages
from vitlit.data.dataset import Images
from vitlit.data.folder import scan_split
from vitlit.images import raw
from vitlit.images.decode import naming

SHAPE = 9, 12
LEVELS = (0.0, 65535.0)


def numbers(channels: int, kind: str = "uint16", shape: tuple[int, int] = SHAPE) -> np.ndarray:
    random = np.random.default_rng(channels)
    if np.dtype(kind).kind == "f":
        return random.normal(size=(*shape, channels)).astype(kind)
    limits = np.iinfo(kind)
    return random.integers(limits.min, limits.max, (*shape, channels), np.dtype(kind).newbyteorder("=").type, True)


def tiff(values: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **{"photometric": "minisblack", **options})
    return file.getvalue()


def npy(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def read(data: bytes) -> np.ndarray:
    """(H, W, C)"""
    with naming("x"):
        values = raw.read(data)
        assert raw.scaled(values, (0, 1)).ndim == 3
    return values if values.ndim == 3 else values[..., None]


def first(values: np.ndarray) -> np.ndarray:
    """(H, W, C) -> (C, H, W)."""
    return np.ascontiguousarray(values.transpose(2, 0, 1))


WRITERS: dict[str, tuple[Callable[[np.ndarray], bytes], str, tuple[int, ...]]] = {
    "png of 16 bits": (png16, "uint16", (1, 2, 3, 4)),
    "png of 8 bits": (lambda v: saved(Image.fromarray(v.squeeze()), "PNG"), "uint8", (1, 2, 3, 4)),
    "webp": (lambda v: saved(Image.fromarray(v), "WEBP", lossless=True, exact=True), "uint8", (3, 4)),
    "samples": (lambda v: tiff(v, planarconfig="contig"), "uint16", (3, 4, 16)),
    "planes": (lambda v: tiff(first(v), planarconfig="separate"), "int16", (2, 4)),
    "pages": (lambda v: tiff(first(v), metadata=None), "float32", (2, 5)),
    "OME": (lambda v: tiff(first(v), ome=True, metadata={"axes": "CYX"}), "uint16", (5,)),
    "ImageJ": (lambda v: tiff(first(v), imagej=True, metadata={"axes": "CYX"}), "uint16", (4,)),
    "packed": (lambda v: tiff(v, planarconfig="contig", compression="zlib", predictor=True), "uint16", (4,)),
    "big-endian BigTIFF": (lambda v: tiff(v, planarconfig="contig", byteorder=">", bigtiff=True), "uint16", (4,)),
    "npy": (npy, "float64", (1, 2, 16)),
    "npy of another machine": (lambda v: npy(v.astype(">u2")), "uint16", (3,)),
    "npy of a plane": (lambda v: npy(v[..., 0]), "int32", (1,)),
}


@pytest.mark.parametrize(("write", "kind", "channels"), WRITERS.values(), ids=list(WRITERS))
def test_the_values_are_those_that_were_written(
    write: Callable[[np.ndarray], bytes], kind: str, channels: tuple[int, ...]
) -> None:
    for count in channels:
        values = numbers(count, kind)
        assert np.array_equal(read(write(values)), values)


def test_photographs_are_upright_also_of_sixteen_bits() -> None:
    values, turned = numbers(3), Image.Exif()
    turned[0x0112] = 6
    exif = turned.tobytes().removeprefix(b"Exif\0\0")
    deep = png16(values)
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif
    chunk += struct.pack(">I", zlib.crc32(chunk[4:]))
    assert np.array_equal(read(deep[:33] + chunk + deep[33:]), np.rot90(values, -1))
    jpeg = Image.fromarray(numbers(3, "uint8", (16, 24)))
    assert read(saved(jpeg, "JPEG", exif=turned)).shape == (24, 16, 3)
    assert read(saved(jpeg, "MPO", save_all=True, append_images=[jpeg])).shape == (16, 24, 3)  # a camera's


class Harmful:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("harmed"),)


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "it is empty"),
    "no image": (lambda: b"<html>", "it is no PNG JPEG WEBP TIFF; convert"),
    "gif": (lambda: saved(Image.new("L", (4, 4)), "GIF"), "it is no PNG JPEG WEBP TIFF; convert"),
    "17 channels": (lambda: npy(numbers(17)), r"its shape is \(9, 12, 17\), not \(H, W\) or .* at most 16 channels"),
    "four axes": (lambda: npy(np.zeros((2, 3, 4, 5))), r"its shape is \(2, 3, 4, 5\)"),
    "bool": (lambda: npy(np.ones(SHAPE, bool)), "its values are bool"),
    "objects": (lambda: npy(np.array([Harmful()])), "allow_pickle=False"),
    "cut npy": (lambda: npy(numbers(3))[:-9], "reshape|expected|elements"),
    "huge npy": (lambda: npy(numbers(3)).replace(b"(9, 12, 3), }    ", b"(9999999, 9999999)}"), "."),
    "depth": (lambda: tiff(first(numbers(3)), imagej=True, metadata={"axes": "ZYX"}), "its axes are ZYX, not Y and X"),
    "palette": (
        lambda: tiff(numbers(1, "uint8"), photometric="palette", colormap=np.zeros((3, 256), np.uint16)),
        "it has a palette",
    ),
    "turned": (lambda: tiff(numbers(1)[..., 0], extratags=[(274, "H", 1, 6, True)]), "its tag Orientation turns it"),
    "cut TIFF": (lambda: tiff(numbers(3), compression="zlib")[:-40], "."),
    "huge PNG": (lambda: png16(numbers(1)).replace(struct.pack(">II", 12, 9), struct.pack(">II", 50_000, 50_000)), "."),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=list(REFUSED))
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_read_is_said_in_a_line(
    make: Callable[[], bytes], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    user_error(f"cannot read the image x: .*{words}", read, make())
    assert not Path("harmed").exists()


def test_a_missing_package_is_no_bad_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compressed = saved(Image.fromarray(numbers(1)[..., 0]), "TIFF", compression="tiff_lzw")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.tif").write_bytes(compressed)
    grey = Preprocess(SHAPE, mean=(0.5,), std=(0.5,), range=LEVELS)
    bad = BadImages(tmp_path / "bad.csv", 1)
    images = Images(scan_split(tmp_path, ["a"]), grey.crop, bad=bad, preprocess=grey)
    for package in ("imagecodecs", "tifffile"):
        monkeypatch.setitem(sys.modules, package, None)
        said = f"^this needs {package}: pip install {package}$"
        user_error(said, read, compressed)
        user_error(said, images.decode, 0)


@pytest.mark.parametrize(
    ("kind", "black", "white"),
    [
        *[("uint8", 0, 255), ("uint16", 0, 65535), ("uint16", 0, 4095), ("int16", -1000, 3000), ("int32", 0, 2**31)],
        *[("float32", -3, 3), ("float64", 0, 1)],
    ],
)
def test_black_is_zero_and_white_one(kind: str, black: float, white: float) -> None:
    values = numbers(2, kind)
    found = raw.scaled(values, (black, white))
    expected = (values.astype(np.float64) - black) / (white - black)
    assert found.dtype == torch.float32
    assert np.abs(found.permute(1, 2, 0).numpy() - expected).max() <= 1e-6 * np.abs(expected).max()
    if kind == "uint16":
        assert len(np.unique(raw.scaled(np.arange(65536, dtype=kind)[None, :, None], (black, white)))) == 65536


def test_values_that_are_no_numbers_are_refused() -> None:
    for value in (np.nan, np.inf):
        values = numbers(2, "float32")
        values[3, 4, 1] = value
        with pytest.raises(ValueError, match="infinite or no numbers"):
            raw.scaled(values, (0, 1))


def test_an_image_of_the_models_size_arrives_as_it_is_in_any_form(tmp_path: Path) -> None:
    values, mean, std = numbers(4, shape=(16, 16)), (0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8)
    (tmp_path / "x.png").write_bytes(png16(values))
    preprocess = Preprocess((16, 16), 1.0, mean=mean, std=std, range=LEVELS)
    forms = [tmp_path / "x.png", png16(values), values, torch.from_numpy(first(values).astype(np.int32))]
    found = preprocess([*forms, preprocess.range and values.astype(np.float64)])
    assert found.shape == (5, 4, 16, 16)
    back = found.permute(0, 2, 3, 1) * torch.tensor(std) + torch.tensor(mean)
    assert (back - torch.from_numpy(values / 65535)).abs().max() <= 1 / 65536
    grey = Preprocess((16, 16), 1.0, mean=(0.5,), std=(0.5,), range=LEVELS)
    plane = values[..., 0]
    assert torch.equal(grey(Image.fromarray(plane)), grey(plane))
    assert torch.equal(grey(plane[..., None]), grey(plane))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resizing_is_that_of_eight_bits(photo: Image.Image, interpolation: Any) -> None:
    """Within the rounding of that to levels, where a bicubic does not leave the range, which only that cuts off."""
    options: dict[str, Any] = {"interpolation": interpolation}
    ours = Preprocess((40, 56), **options, range=(0, 255))(np.asarray(photo))
    theirs = Preprocess((40, 56), **options)(photo)
    inside = (ours.abs() < 1) & (theirs.abs() < 1)
    assert inside.double().mean() > 0.9
    assert (ours - theirs)[inside].abs().max() <= 1.5 * 2 / 255


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"range": (1.0, 1.0)}, r"range \(1\.0, 1\.0\) must be two numbers that rise"),
        ({"range": (0.0, float("inf"))}, "two numbers that rise"),
        ({"range": LEVELS, "mean": (0.5,) * 17, "std": (0.5,) * 17}, "must have equally many numbers, 1 to 16"),
        ({"range": LEVELS, "mean": (0.5,) * 4}, "must have equally many numbers, 1 to 16"),
        ({"mean": (0.5,) * 4, "std": (0.5,) * 4}, "must have 3 numbers each, or 1 for grey"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    user_error(words, lambda: Preprocess((8, 8), **options))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (png16(numbers(2)), "cannot read the image .* bytes: it has 2 channels, but mean and std have 3 numbers"),
        (numbers(4), "cannot read the image .* it has 4 channels"),
        (npy(first(numbers(3))), "cannot read the image .* bytes: it has 12 channels"),
        (torch.zeros(8, 8), "cannot read the image"),
        (Image.new("L", (8, 8)), "cannot read the image .* it has 1 channel"),
        (numbers(3, "uint8"), "its values are uint8, which never reach the range's white, 65,535"),
        ("not there.png", "not there.png"),
        (None, "cannot read the image"),
    ],
)
def test_an_image_of_other_channels_is_refused(image: object, words: str) -> None:
    user_error(words, Preprocess((8, 8), range=LEVELS), image)


def test_pictures_show_three_channels_or_grey() -> None:
    images = torch.arange(5.0).view(5, 1, 1).expand(2, 5, 4, 4) / 4
    assert raw.shown(images)[0, :, 0, 0].tolist() == [0, 0.25, 0.5]
    assert raw.shown(images[:, 3:])[0, :, 0, 0].tolist() == [0.75, 0.75, 0.75]
    assert raw.as_picture(2 * images[0]).flatten(1)[:, 0].tolist() == [0, 128, 255]
