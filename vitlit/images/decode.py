"""Image files to uint8 tensors."""

import io
import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vitlit.errors import UserError
from vitlit.files import read_file

# Formats that Pillow may open. It knows more; one of them, EPS, would run Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
MOST_PIXELS = 178_956_970  # of an image; Pillow's own limit, 2 * Image.MAX_IMAGE_PIXELS
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


def decode(path: str | Path) -> Tensor:
    return decode_bytes(read_file(path), path)


def decode_bytes(data: bytes, path: str | Path) -> Tensor:
    """Decode an image file's content as RGB, upright by its EXIF orientation: (3, H, W), uint8, memory (H, W, 3).

    torchcodec decodes JPEG, PNG and WebP; Pillow the other formats, the first frame of animations, and everything if
    torchcodec is missing. 16 bits are scaled to 8, 32 bits are refused, transparency is dropped.
    """
    try:
        if not data:
            raise ValueError("it is empty")
        if decoder := DECODERS.get(_format_of_simple_header(data)):
            return decoder(data, mode="RGB")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF data, or half of the pixels allowed
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
        decoder = DECODERS.get(str(picture.format))
        if not decoder or getattr(picture, "is_animated", False):
            return decode_picture(picture)
        image: Tensor = decoder(data, mode="RGB")
        return image if image.ndim == 3 else image[0]  # the only frame of an animation
    except UnidentifiedImageError as error:
        raise UserError(f"cannot read the image {path}: it is no {' '.join(FORMATS)}; convert or remove it") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"cannot read the image {path}: more than {MOST_PIXELS:,} pixels; scale it down") from error
    except (OSError, RuntimeError, ValueError, SyntaxError) as error:
        # torchcodec names its source line.
        reason = re.sub(r"^\w+, \S+:\d+, ", "", str(error)).strip(" .\n").partition("\n")[0]
        raise UserError(f"cannot read the image {path}: {reason or type(error).__name__}") from error


def _format_of_simple_header(data: bytes) -> str:
    """JPEG or PNG if the header is simple and its size is allowed; else "". Saves 3 % of an image's time in Pillow."""
    if data.startswith(b"\x89PNG\r\n\x1a\n") and data[12:16] == b"IHDR" and len(data) >= 24:
        width, height = struct.unpack_from(">II", data, 16)
        return "PNG" if width * height <= MOST_PIXELS else ""
    place = 2
    while data.startswith(b"\xff\xd8") and len(data) >= place + 9:
        start, marker, length, _, height, width = struct.unpack_from(">BBHBHH", data, place)
        if start == 0xFF and marker in JPEG_FRAMES:
            return "JPEG" if width * height <= MOST_PIXELS else ""
        if start != 0xFF or marker not in JPEG_TABLES or length < 2:
            return ""
        place += 2 + length
    return ""


def decode_picture(picture: Image.Image) -> Tensor:
    if picture.mode == "F" or (picture.mode == "I" and picture.format == "TIFF"):
        raise ValueError("numbers of 32 bits, whose white is unknown; convert it to 8 or 16 bits")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits, which Pillow's convert would clip to 255
        picture = Image.fromarray(((np.asarray(picture, np.int64).clip(0, 65535) + 128) // 257).astype(np.uint8))
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
