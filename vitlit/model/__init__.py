"""What a ViT is. Torch only."""

from vitlit.model.config import ViTConfig
from vitlit.model.sizes import SIZES, Size
from vitlit.model.vit import ViT

__all__ = ["SIZES", "Size", "ViT", "ViTConfig"]
