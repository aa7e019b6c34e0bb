"""torchcodec, the fast decoder of images, where it can be loaded."""

from collections.abc import Callable
from typing import Any

DECODERS: dict[str, Callable[..., Any]] = {}  # by format; its decode_gif would decode all images of an animation

try:
    from torchcodec.decoders import decode_jpeg, decode_png, decode_webp
except (ImportError, OSError, RuntimeError) as error:  # no wheel for the platform, or a library that does not load
    WHY_NOT = str(error).strip().partition("\n")[0] or type(error).__name__
else:
    WHY_NOT = ""
    DECODERS = {"JPEG": decode_jpeg, "PNG": decode_png, "WEBP": decode_webp}

DECODER = "torchcodec" if DECODERS else "Pillow"
PILLOW_SLOWER = 1.7  # times torchcodec's on photographs, for the same pixels
