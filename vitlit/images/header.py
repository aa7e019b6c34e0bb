"""What an image file says of its size, which is asked before anything of it is decoded: a few bytes may be 50,000 x
50,000 pixels."""

import re
import struct

MOST_PIXELS = 178_956_970  # of an image: above them Pillow, too, takes it for an attack
SEGMENTS = 10_000  # of a JPEG before its size, where a photograph has a dozen

# A JPEG's markers that stand alone (TEM, RST) and stuffed or filling bytes are passed over, as libjpeg does.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF: the others are tables
_ENDS = frozenset((0xD8, 0xD9, 0xDA))


class HugeImage(ValueError):
    """An image of more than `MOST_PIXELS`."""


def check_size(data: bytes) -> None:
    """Refuse an image of too many pixels, whatever decodes it.

    JPEG, PNG, GIF and WebP are read as their libraries do, so that no header means another size to them. Of other
    formats Pillow reads the header, and has the same limit.

    Raises:
        HugeImage: it has more than `MOST_PIXELS`.
        ValueError: its header cannot be read.
    """
    try:
        match format_of(data):
            case "JPEG":
                size: tuple[int, ...] = _jpeg(data)
            case "PNG":
                size = _png(data)
            case "GIF":
                size = struct.unpack_from("<HH", data, 6)
            case "WEBP":
                size = _webp(data)
            case _:
                return
    except struct.error as error:
        raise ValueError("its header is cut short") from error
    refuse_huge(*size)


def refuse_huge(width: int, height: int) -> None:
    """HugeImage for more pixels than `MOST_PIXELS`."""
    if width * height > MOST_PIXELS:
        raise HugeImage(f"{width} x {height} pixels, more than {MOST_PIXELS:,}; scale it down")


def format_of(data: bytes) -> str:
    """The format that a file's first bytes tell: JPEG, PNG, GIF or WEBP; "" for others."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"GIF8"):
        return "GIF"
    return "WEBP" if data.startswith(b"RIFF") and data[8:12] == b"WEBP" else ""


def is_film(data: bytes) -> bool:
    """Whether it is an animated WebP, all images of which torchcodec would decode."""
    return format_of(data) == "WEBP" and data[12:16] == b"VP8X" and bool(data[20] & 2)


def _jpeg(data: bytes) -> tuple[int, int]:
    place = 2
    for _ in range(SEGMENTS):
        match = _MARKER.search(data, place)
        if match is None:
            raise ValueError("its header is cut short")
        marker, place = match[1][0], match.end()
        if marker in _FRAMES:  # the first counts: libjpeg refuses a second
            height, width = struct.unpack_from(">HH", data, place + 3)
            return width, height
        if marker in _ENDS:
            break
        place += max(2, *struct.unpack_from(">H", data, place))
    raise ValueError("its header tells no size")


def _png(data: bytes) -> tuple[int, ...]:
    if data[12:16] != b"IHDR":  # libpng would pass over some chunks before it
        raise ValueError("its header is damaged")
    return struct.unpack_from(">II", data, 16)


def _webp(data: bytes) -> tuple[int, int]:
    if len(data) < 30:
        raise ValueError("its header is cut short")
    kind = data[12:16]
    if kind == b"VP8X":  # an image within that is not of the canvas's size is refused by libwebp
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError("its header is damaged")
