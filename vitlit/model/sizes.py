"""The named sizes of a ViT."""

from typing import NamedTuple


class Size(NamedTuple):
    """A row of the size table."""

    width: int
    depth: int
    mlp_dim: int
    heads: int


# 2010.11929 table 1 (B, L, H), 2106.04560 table 2 (Ti, S, g, G), big_vision's decode_variant (M, So400m).
SIZES = {
    "Ti": Size(192, 12, 768, 3),
    "S": Size(384, 12, 1536, 6),
    "M": Size(512, 12, 2048, 8),
    "B": Size(768, 12, 3072, 12),
    "L": Size(1024, 24, 4096, 16),
    "So400m": Size(1152, 27, 4304, 16),
    "H": Size(1280, 32, 5120, 16),
    "g": Size(1408, 40, 6144, 16),
    "G": Size(1664, 48, 8192, 16),
}
