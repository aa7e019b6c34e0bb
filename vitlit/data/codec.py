"""torchcodec, the fast decoder of images, where it can be loaded."""

try:
    from torchcodec.decoders import decode_image
except (ImportError, OSError, RuntimeError) as error:  # no wheel for the platform, or a library that does not load
    decode_image = None  # type: ignore[assignment]
    WHY_NOT = str(error).strip().partition("\n")[0] or type(error).__name__
else:
    WHY_NOT = ""

DECODER = "torchcodec" if decode_image is not None else "Pillow"
PILLOW_SLOWER = 1.7  # times torchcodec's on photographs, for the same pixels
