"""Decoding against Pillow: every format, mode and orientation, and what is no image."""

import importlib
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from conftest import forked, png16, user_error
from PIL import Image, ImageFile, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader

from vitlit.data import Preprocess
from vitlit.data.dataset import Images
from vitlit.data.folder import scan_train
from vitlit.errors import UserError
from vitlit.images import decode as decoding
from vitlit.images.decode import decode


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def pillow(path: Path, ground: Sequence[int] = (255, 255, 255)) -> np.ndarray:
    """What Pillow makes of a file, over a ground where it is transparent: (H, W, 3), uint8."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        if not upright.has_transparency_data:
            return np.asarray(upright.convert("RGB"))
        layers = np.asarray(upright.convert("RGBA")).astype(float)
    alpha = layers[..., 3:] / 255
    return np.rint(layers[..., :3] * alpha + np.array(ground) * (1 - alpha)).astype(np.uint8)


def pixels(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


MODES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "1": lambda image: image.convert("1"),
    "L": lambda image: image.convert("L"),
    "LA": lambda image: with_alpha(image.convert("L")),
    "P": lambda image: image.convert("P"),
    "RGB": lambda image: image,
    "RGBA": with_alpha,
    "CMYK": lambda image: image.convert("CMYK"),
}
FORMATS = {
    "jpg": ("L", "RGB", "CMYK"),
    "png": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "webp": ("L", "RGB", "RGBA"),
    "gif": ("1", "L", "P", "RGB", "RGBA"),
    "bmp": ("1", "L", "P", "RGB", "RGBA"),
    "tiff": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"),
    "ppm": ("L", "RGB"),
    "jfif": ("L", "RGB", "CMYK"),
    "apng": ("RGB", "RGBA"),
    "pbm": ("1",),
    "avif": ("RGB", "RGBA"),
    "jp2": ("L", "LA", "RGB", "RGBA"),
}


@pytest.fixture(params=["torchcodec", "Pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two paths: with torchcodec, and without it."""
    if request.param == "Pillow":
        monkeypatch.setattr("vitlit.images.decode.DECODERS", {})


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize(("extension", "mode"), [(e, mode) for e, modes in FORMATS.items() for mode in modes])
def test_every_format_and_mode_reads_as_pillow_reads_it(
    photo: Image.Image, tmp_path: Path, extension: str, mode: str
) -> None:
    path = tmp_path / f"image.{extension}"
    MODES[mode](photo).save(path)
    image = decode(path)
    assert image.dtype == torch.uint8
    assert np.array_equal(pixels(image), pillow(path))


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_one_colour_of_a_png_or_gif_may_be_transparent(photo: Image.Image, tmp_path: Path, mode: str) -> None:
    image = photo.convert(mode)
    clear = image.getpixel((5, 5))
    for name in ("one.png", "one.gif") if mode == "P" else ("one.png",):
        image.save(tmp_path / name, transparency=clear)
        expected = pillow(tmp_path / name)
        assert (expected[5, 5] == 255).all()
        assert not np.array_equal(expected, np.asarray(image.convert("RGB")))
        assert np.array_equal(pixels(decode(tmp_path / name)), expected)


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("extension", ["png", "webp", "tiff", "avif"])
def test_transparency_is_laid_over_the_ground(photo: Image.Image, tmp_path: Path, extension: str) -> None:
    clear, solid = tmp_path / f"clear.{extension}", tmp_path / f"solid.{extension}"
    with_alpha(photo).save(clear)
    photo.save(solid)
    black, white, plum = (pixels(decode(clear, ground)) for ground in ("black", "white", "#dda0dd"))
    assert np.array_equal(black, pillow(clear, (0, 0, 0)))
    assert np.array_equal(white, pillow(clear))
    assert np.array_equal(plum, pillow(clear, (0xDD, 0xA0, 0xDD)))
    assert white.mean() > black.mean() + 20
    assert torch.equal(decode(solid, "black"), decode(solid, "white"))  # opaque: the ground changes no bit
    user_error("'#12345' is no colour: give white", decode, clear, "#12345")


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_torchcodec_reads_the_usual_formats(
    photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extension: str
) -> None:
    photo.save(tmp_path / f"image.{extension}")
    expected = pillow(tmp_path / f"image.{extension}")
    monkeypatch.delattr(ImageFile.ImageFile, "load")  # Pillow may read the header, but no pixel
    assert np.array_equal(pixels(decode(tmp_path / f"image.{extension}")), expected)


def test_a_torchcodec_that_does_not_load_says_why(tmp_path: Path) -> None:
    def child() -> int:
        sys.modules["torchcodec.decoders"] = None  # type: ignore[assignment]
        found = importlib.reload(decoding)
        return int(bool(found.DECODERS) or found.DECODER != "Pillow" or "torchcodec.decoders" not in found.WHY_NOT)

    assert forked(child, tmp_path).code == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("progressive.jpg", {"progressive": True}),
        ("full_chroma.jpg", {"quality": 95, "subsampling": 0}),
        ("lossless.webp", {"lossless": True}),
        ("transparent.png", {"transparency": (0, 0, 0)}),
        ("compressed.tiff", {"compression": "tiff_lzw"}),
        ("wrong_name.png", {"format": "JPEG"}),
        ("wrong_name.jpg", {"format": "TIFF"}),
    ],
)
def test_variants_of_the_formats_read_as_pillow_reads_them(
    photo: Image.Image, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    photo.save(tmp_path / name, **options)
    assert np.array_equal(pixels(decode(tmp_path / name)), pillow(tmp_path / name))


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("extension", ["jpg", "tiff", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(photo: Image.Image, tmp_path: Path, orientation: int, extension: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{extension}"
    photo.save(path, exif=exif)
    image = decode(path)
    assert image.shape[1:] == ((161, 107) if orientation > 4 else (107, 161))
    assert np.array_equal(pixels(image), pillow(path))


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("extension", ["gif", "webp", "png"])
def test_the_first_frame_of_an_animation_counts(photo: Image.Image, tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"film.{extension}"
    photo.save(path, save_all=True, append_images=[ImageOps.invert(photo)])
    assert np.array_equal(pixels(decode(path)), pillow(path))


@pytest.mark.usefixtures("decoder")
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow says so, too
@pytest.mark.parametrize("extension", list(FORMATS))
def test_a_cut_off_file_is_an_error_that_names_it_in_one_line(
    photo: Image.Image, tmp_path: Path, extension: str
) -> None:
    path = tmp_path / f"cut off.{extension}"
    photo.save(path)
    whole = path.read_bytes()
    for length in (0, 20, len(whole) // 2, int(0.95 * len(whole))):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError) as caught:
            decode(path)
        message = str(caught.value)
        assert message.startswith(f"cannot read the image {path}: ")
        assert "\n" not in message
        assert "_core" not in message
        assert "BytesIO" not in message


@pytest.mark.usefixtures("decoder")
def test_an_animation_of_one_frame_is_an_image(photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "film.webp"
    photo.save(path, save_all=True, append_images=[ImageOps.invert(photo)])
    data = path.read_bytes()
    start = data.rindex(b"ANMF")
    path.write_bytes(data[:4] + struct.pack("<I", start - 8) + data[8:start])
    assert np.array_equal(pixels(decode(path)), pillow(path))


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize(
    "name", ["grey.png", "grey.tif", "grey.pgm", "colour.tif", "colour.ppm", "plain.ppm", "clear.png", "a.npy"]
)
@pytest.mark.parametrize("kind", ["uint16", "float32"])
def test_more_than_eight_bits_are_refused_without_a_range(tmp_path: Path, name: str, kind: str) -> None:
    values, path = np.arange(12, dtype=kind).reshape(2, 2, 3), tmp_path / name
    if name == "colour.tif":
        tifffile.imwrite(path, values, photometric="rgb")
    elif name == "colour.ppm":
        path.write_bytes(b"P6 2 2 65535 " + values.astype(">u2").tobytes())
    elif name == "plain.ppm":
        path.write_text("P3 1 1 65535 60000 5 7\n")
    elif name == "clear.png":
        path.write_bytes(png16(np.dstack([values, values[..., 0]])))
    elif name == "a.npy":
        np.save(path, values)
    elif kind == "uint16" or path.suffix == ".tif":
        Image.fromarray(values[..., 0]).save(path)
    else:
        path.write_bytes(png16(values[..., :1]))
    with pytest.raises(
        UserError, match=f"cannot read the image {path}: it .*has more than 8 bits .*: give --data.range"
    ):
        decode(path)


def test_of_a_tiff_cut_short_it_is_said_that_it_may_be_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.new("RGB", (16, 16)).save(path, compression="tiff_lzw")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="it is damaged, or has more than 8 bits"):
        decode(path)


def test_what_is_no_image_is_an_error_that_names_it(tmp_path: Path) -> None:
    page = tmp_path / "page.jpg"
    page.write_text("<html>404</html>")
    folder = tmp_path / "folder.png"
    folder.mkdir()
    for path in (page, folder, tmp_path / "missing.jpg"):
        with pytest.raises(UserError, match=str(path)):
            decode(path)


def test_an_unreadable_image_is_named_through_a_loaders_worker(few: Path, tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n junk")
    _, index, _ = scan_train(tmp_path, 0.1)
    loader = DataLoader(Images(index, Preprocess((8, 8)).crop), num_workers=1)
    with pytest.raises(UserError, match="broken"):
        next(iter(loader))
