"""Images of any number of channels and bits: their values as they are in the file."""

import io

import numpy as np
import torch
from torch import Tensor

from vitlit.errors import need
from vitlit.images.decode import ARRAY, DECODERS, MOST_PIXELS, TIFF, WHY_NOT, open_picture

FORMATS = ["PNG", "JPEG", "WEBP", "TIFF"]  # besides npy
MOST_CHANNELS = 16


def read(data: bytes) -> np.ndarray:
    """The values of an image file's content, (H, W, C) or (H, W), of the file's own type.

    PNG, JPEG and WebP are upright by their EXIF orientation. A TIFF's channels are its samples, its axis C, or its
    pages. An array of .npy is (H, W) or (H, W, C). ValueError if the file is none of these, or damaged.
    """
    if not data.startswith((ARRAY, *TIFF)):
        format = str(open_picture(data, FORMATS).format).replace("MPO", "JPEG")  # of several pictures, the first
        if format not in DECODERS:
            raise ValueError(f"data.range needs torchcodec, which does not load: {WHY_NOT}")
        depth = {"output_dtype": "auto"} if format == "PNG" else {}
        values: np.ndarray = DECODERS[format](data, mode="UNCHANGED", **depth).movedim(-3, -1).numpy()
        return values
    if data.startswith(TIFF):
        need("tifffile")
    try:
        return np.load(io.BytesIO(data)) if data.startswith(ARRAY) else _read_tiff(data)
    except Exception as error:  # a damaged file may raise anything
        if "imagecodecs" in str(error):
            need("imagecodecs")
        raise ValueError(str(error)) from error


def _read_tiff(data: bytes) -> np.ndarray:
    """The first image of a TIFF, (H, W) or (H, W, C)."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        first = file.series[0]
        axes, page = first.axes, first.keyframe
        channels = "".join(axis for axis in axes if axis not in "YX")
        wrong = {
            f"its axes are {axes}, not Y and X with channels or without": channels not in ("", *"SCIQ"),
            f"it has more than {MOST_PIXELS:,} pixels": page.imagewidth * page.imagelength > MOST_PIXELS,
            "it has a palette; convert it": page.photometric == tifffile.PHOTOMETRIC.PALETTE,
            "its tag Orientation turns it; turn its pixels": page.tags.valueof("Orientation", default=1) != 1,
        }
        if why := next((words for words, found in wrong.items() if found), ""):
            raise ValueError(why)
        return first.asarray().transpose([axes.index(axis) for axis in f"YX{channels}"])


def scaled(image: np.ndarray, levels: tuple[float, float], channels: int | None = None) -> Tensor:
    """Values (H, W, C) or (H, W) with black at 0 and white at 1, float32 (C, H, W).

    ValueError if they are anything else, not all finite, or not of so many channels.
    """
    image = image[..., None] if image.ndim == 2 else image
    if image.ndim != 3 or not image.size or image.shape[2] > MOST_CHANNELS:
        raise ValueError(f"its shape is {image.shape}, not (H, W) or (H, W, C) of at most {MOST_CHANNELS} channels")
    if channels not in (None, image.shape[2]):
        raise ValueError(f"it has {image.shape[2]} channels, but mean and std have {channels} numbers")
    if image.dtype.kind not in "iuf":
        raise ValueError(f"its values are {image.dtype}, not integers or floats")
    if image.dtype.kind != "f" and np.iinfo(image.dtype).max + 1 < levels[1]:
        raise ValueError(f"its values are {image.dtype}, which never reach the range's white, {levels[1]:,g}")
    # In float64 for whole numbers of 32 bits, which float32 would round.
    values = (image.astype(np.promote_types(image.dtype, np.float32)) - levels[0]) / (levels[1] - levels[0])
    values = values.astype(np.float32, copy=False)
    if image.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("some of its values are infinite or no numbers")
    return torch.from_numpy(values).permute(2, 0, 1)


def shown(images: Tensor) -> Tensor:
    """What pictures show of images (..., C, H, W): the first three channels, or the first as grey, (..., 3, H, W)."""
    return images[..., [0, 1, 2] if images.shape[-3] >= 3 else [0, 0, 0], :, :]


def as_picture(image: Tensor) -> Tensor:
    """A decoded image (C, H, W) to look at: uint8 (3, H, W)."""
    return image if image.dtype == torch.uint8 else (shown(image).clamp(0, 1) * 255).round().to(torch.uint8)
