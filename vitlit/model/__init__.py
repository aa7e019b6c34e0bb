"""What a ViT is. Torch only."""

from vitlit.model.sizes import SIZES, Size
from vitlit.model.vit import ViT, ViTConfig

__all__ = ["SIZES", "Size", "ViT", "ViTConfig"]
