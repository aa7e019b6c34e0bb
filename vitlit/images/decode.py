"""Image files to uint8 tensors."""

import io
import os
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError, features
from torch import Tensor

from vitlit.errors import UserError
from vitlit.files import read_file

# Formats that Pillow may open. It knows more; one of them, EPS, would run Ghostscript.
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF"]
FORMATS += [name for name, part in (("AVIF", "avif"), ("JPEG2000", "jpg_2000")) if features.check(part)]
MOST_PIXELS = 178_956_970  # of an image; Pillow's own limit, 2 * Image.MAX_IMAGE_PIXELS
GROUND = "white"
OTHER = "has more than 8 bits or other channels than RGB: give --data.range, such as [0,65535], or convert it"
ARRAY = b"\x93NUMPY"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two are BigTIFF
JPEG_FRAMES = (0xC0, 0xC1, 0xC2)  # markers that hold the size: baseline, extended, progressive
JPEG_TABLES = (0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE)  # markers that may come first: tables, metadata, comments
PILLOW_SLOWER = 1.7  # times torchcodec's decoding time on photographs, for the same pixels

DECODERS: dict[str, Callable[..., Any]] = {}  # torchcodec's, except decode_gif, which decodes every frame
WHY_NOT = ""
try:
    from torchcodec.decoders import decode_jpeg, decode_png, decode_webp

    DECODERS = {"JPEG": decode_jpeg, "PNG": decode_png, "WEBP": decode_webp}
except (ImportError, OSError, RuntimeError) as error:  # no wheel for the platform, or a library that does not load
    WHY_NOT = str(error).strip().partition("\n")[0] or type(error).__name__
DECODER = "torchcodec" if DECODERS else "Pillow"


def decode(path: str | Path, ground: str = GROUND) -> Tensor:
    return decode_bytes(read_file(path), path, ground)


def decode_bytes(data: bytes, path: str | Path, ground: str = GROUND) -> Tensor:
    """Decode an image file's content as RGB, upright by its EXIF orientation: (3, H, W), uint8, memory (H, W, 3).

    torchcodec decodes JPEG, PNG and WebP; Pillow the other formats, the first frame of animations, and everything if
    torchcodec is missing. What is transparent shows the `ground`. UserError for more than 8 bits: see `raw`.
    """
    with naming(path):
        if decoder := DECODERS.get(_format_of_opaque_header(data)):
            return decoder(data, mode="RGB")
        picture = open_picture(data, FORMATS)
        decoder = DECODERS.get(str(picture.format))
        if not decoder or getattr(picture, "is_animated", False):
            return decode_picture(picture, ground)
        refuse_deep(picture)
        clear = picture.has_transparency_data
        image: Tensor = decoder(data, mode="RGB_ALPHA" if clear else "RGB")
        image = image if image.ndim == 3 else image[0]  # the only frame of an animation
        return _laid_over(image.permute(1, 2, 0).numpy(), ground) if clear else image


def open_picture(data: bytes, formats: list[str]) -> Image.Image:
    """An image file of one of these formats, of which only the header is read; of too many pixels none is."""
    if not data:
        raise ValueError("it is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF data, or half of the pixels allowed
            return Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as error:
        other = f"it is damaged, or {OTHER}" if data.startswith((ARRAY, *TIFF)) else ""
        raise ValueError(other or f"it is no {' '.join(formats)}; convert or remove it") from error


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Turn whatever decoders raise in the block into a UserError that names the image."""
    try:
        yield
    except UserError:  # a package is missing
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"cannot read the image {path}: more than {MOST_PIXELS:,} pixels; scale it down") from error
    except (OSError, RuntimeError, ValueError, SyntaxError) as error:
        # torchcodec names its source line.
        why = re.sub(r"^\w+, \S+:\d+, ", "", str(error)).strip(" .\n").partition("\n")[0]
        raise UserError(f"cannot read the image {path}: {why or type(error).__name__}") from error


def reason(error: Exception, path: str | Path) -> str:
    """Why an image cannot be read, without its path."""
    return str(error).removeprefix(f"cannot read the image {path}: ")


@contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Lines that C libraries print in the block, there after it: the only sign that libjpeg filled up an image."""
    lines: list[str] = []
    file, own = _scratch(os.getpid()), os.dup(2)
    os.dup2(file, 2)
    try:
        yield lines
    finally:
        os.dup2(own, 2)
        os.close(own)
        if size := os.lseek(file, 0, os.SEEK_CUR):
            lines += os.pread(file, size, 0).decode(errors="replace").splitlines()
            os.lseek(file, 0, os.SEEK_SET)


@cache
def _scratch(process: int) -> int:
    """A file of this process, not of the one that it was forked from, which would share the position in it."""
    with TemporaryFile() as file:
        return os.dup(file.fileno())


def _format_of_opaque_header(data: bytes) -> str:
    """JPEG, or opaque PNG of 8 bits, if a simple header says so and allows the size, else "". Pillow takes longer."""
    if data.startswith(b"\x89PNG\r\n\x1a\n") and data[12:16] == b"IHDR" and len(data) >= 26:
        width, height, bits, colour = struct.unpack_from(">IIBB", data, 16)
        # The chunk tRNS, which makes a colour transparent, comes before the pixels.
        opaque = colour in (0, 2, 3) and bits <= 8 and data.find(b"tRNS", 0, data.find(b"IDAT")) < 0
        return "PNG" if opaque and width * height <= MOST_PIXELS else ""
    place = 2
    while data.startswith(b"\xff\xd8") and len(data) >= place + 9:
        start, marker, length, _, height, width = struct.unpack_from(">BBHBHH", data, place)
        if start == 0xFF and marker in JPEG_FRAMES:
            return "JPEG" if width * height <= MOST_PIXELS else ""
        if start != 0xFF or marker not in JPEG_TABLES or length < 2:
            return ""
        place += 2 + length
    return ""


def decode_picture(picture: Image.Image, ground: str = GROUND) -> Tensor:
    """A PIL image, or the first frame of a file, as `decode_bytes` gives it."""
    refuse_deep(picture)
    picture = ImageOps.exif_transpose(picture)
    if picture.has_transparency_data:
        return _laid_over(np.array(picture.convert("RGBA")), ground)
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def refuse_deep(picture: Image.Image) -> None:
    """ValueError for values of more than 8 bits, whose black and white only the user knows; Pillow would cut them."""
    for tile in getattr(picture, "tile", ()):  # of a file that is not read yet: how its values are stored
        largest = tile.args[-1] if tile.codec_name.startswith("ppm") and isinstance(tile.args, tuple) else 0
        if largest > 255 or re.search("[ABKLXa];16", str(tile.args)):
            raise ValueError(f"it {OTHER}")
    if picture.mode[0] in "IF":
        raise ValueError(f"it {OTHER}")


def _laid_over(image: np.ndarray, ground: str) -> Tensor:
    """Red, green, blue and alpha, uint8 (H, W, 4), over a ground, rounded to nearest: (3, H, W), uint8."""
    alpha = image[..., 3:].astype(np.uint16)
    if alpha.min() == 255:  # half of the time
        return torch.from_numpy(image[..., :3].copy()).permute(2, 0, 1)
    mixed = image[..., :3] * alpha
    mixed += np.array(colour(ground), np.uint16) * (255 - alpha) + np.uint16(127)  # at most 65,152
    return torch.from_numpy((mixed // 255).astype(np.uint8)).permute(2, 0, 1)


@cache
def colour(ground: str) -> tuple[int, ...]:
    """Red, green and blue, 0 to 255, of a colour by its CSS name or as #rrggbb; UserError if it is none."""
    try:
        red, green, blue = tuple(ImageColor.getrgb(ground))
    except (ValueError, AttributeError) as error:
        raise UserError(f"data.ground {ground!r} is no colour: give white, black, or another as '#rrggbb'") from error
    return red, green, blue
