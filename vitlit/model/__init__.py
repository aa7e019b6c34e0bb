"""What a ViT is. Torch only."""

from vitlit.model.vit import SIZES, Size, ViT, ViTOptions

__all__ = ["SIZES", "Size", "ViT", "ViTOptions"]
