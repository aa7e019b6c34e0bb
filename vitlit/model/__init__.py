"""What a ViT is. Torch only."""

from vitlit.model.options import SIZES, Size, ViTOptions
from vitlit.model.vit import ViT

__all__ = ["SIZES", "Size", "ViT", "ViTOptions"]
