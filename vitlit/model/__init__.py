"""What a ViT is. Torch only."""

from vitlit.model.config import SIZES, Size, ViTConfig
from vitlit.model.vit import ViT

__all__ = ["SIZES", "Size", "ViT", "ViTConfig"]
