"""Our networks and timm's with every parameter moved, and the comparison of their outputs."""

from typing import Any, TypeVar

import timm
import torch
from torch import Tensor, nn

from vitlit.model import ViT

Module = TypeVar("Module", bound=nn.Module)
SMALL: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 192, "depth": 2, "heads": 3, "mlp_dim": 384}


def shaken(module: Module, scale: float = 0.05) -> Module:
    """Move every parameter, so that neither a zero nor a one hides it."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module.eval()


def vit_of(**options: Any) -> ViT:
    return shaken(ViT(**{**SMALL, "num_classes": 10, **options}), 0.1)


def images_of(size: int | tuple[int, int], channels: int = 3) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(2, channels, height, width)


def assert_same(ours: Tensor, theirs: Tensor, atol: float = 1e-5) -> None:
    assert theirs.std() > 0.02  # nothing vanished, so that a difference would show
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def timm_model(name: str, size: Any = 64, **options: Any) -> nn.Module:
    return timm.create_model(name, **{"img_size": size, "depth": 2, "num_classes": 10, **options}).eval()


def ti16(size: int | tuple[int, int], **options: Any) -> ViT:
    return ViT(size, 16, 192, 2, 3, 768, num_classes=10, **options).eval()
