"""Image files to uint8 tensors."""

import io
import re
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from vitlit.errors import UserError
from vitlit.files import read_file
from vitlit.images.codec import DECODERS
from vitlit.images.header import MOST_PIXELS, HugeImage, check_size, format_of, is_film, refuse_huge

# That Pillow may read: it knows more, of which EPS would run Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")


def decode(path: str | Path) -> Tensor:
    """Read an image file as RGB, upright by its EXIF orientation: (3, H, W), uint8.

    Raises:
        UserError: the file cannot be read as an image; the message names it.
    """
    return decode_bytes(read_file(path), path)


def decode_bytes(data: bytes, path: str | Path) -> Tensor:
    """The image in a file's content as RGB, upright by its EXIF orientation: (3, H, W), uint8, its memory (H, W, 3).

    torchcodec reads JPEG, PNG and WebP (1.7 times Pillow's speed on photographs, the same pixels); Pillow reads the
    other formats and animated WebP, of which the first frame counts, and all of them where torchcodec is missing. 16
    bits are scaled to 8, and 32 refused; transparency is dropped. An image of more than `header.MOST_PIXELS` is refused
    by its header.

    Args:
        data: the content.
        path: of the file, for the error.

    Raises:
        UserError: it is no image that can be read; the message names the path.
    """
    try:
        if not data:
            raise ValueError("it is empty")
        check_size(data)
        decoder = DECODERS.get(format_of(data))
        return decoder(data, mode="RGB") if decoder and not is_film(data) else _pillow(data)
    except UnidentifiedImageError as error:
        raise UserError(f"cannot read the image {path}: it is no {' '.join(FORMATS)}; convert or remove it") from error
    except (OSError, RuntimeError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # torchcodec names its source line.
        reason = re.sub(r"^\w+, \S+:\d+, ", "", str(error)).strip(" .\n").splitlines()
        raise UserError(f"cannot read the image {path}: {reason[0] if reason else type(error).__name__}") from error


def _pillow(data: bytes) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # from half as many on
            picture: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise HugeImage(f"more than {MOST_PIXELS:,} pixels; scale it down") from error
    refuse_huge(*picture.size)
    if picture.mode == "F" or (picture.mode == "I" and picture.format == "TIFF"):
        raise ValueError("numbers of 32 bits, which do not tell what is white; convert it to 8 or 16 bits")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits, which Pillow's convert would cut off at 255
        picture = Image.fromarray(((np.asarray(picture, np.int64).clip(0, 65535) + 128) // 257).astype(np.uint8))
    return pil_to_tensor(picture.convert("RGB"))
