"""What a ViT looks at. Attention weights are computed beside the fused kernel, which keeps none."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vitlit.model import ViT


class QueriesAndKeys(TorchFunctionMode):
    """Keeps the queries and keys that the fused kernel is given in one of its calls, after `left` others."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left, self.given = left, ()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            self.given, self.left = self.given if self.left else args[:2], self.left - 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def attention(vit: ViT, images: Tensor, block: int = -1, tokens: slice = slice(None)) -> Tensor:
    """How much tokens, by default all, attend to each in a block: images (B, C, H, W) -> (B, heads, tokens, S + N).

    Rows sum to 1. The S prefix tokens (class, distillation, registers) come first. IndexError: there is no such block.
    """
    with torch.compiler.set_stance("force_eager"), QueriesAndKeys(range(len(vit.blocks))[block]) as seen:
        vit.encode(vit.embed(images), vit.grid_of(*images.shape[-2:]))
    queries, keys = seen.given
    return (queries[:, :, tokens] * queries.shape[-1] ** -0.5 @ keys.mT).softmax(-1)


def attended(vit: ViT, images: Tensor) -> dict[str, Tensor]:
    """What the tokens that are pooled, class token or patches, attend to in the last block, by its name.

    A map (B, rows, columns): the mean of the heads, scaled so that the largest 2 % of an image are 1.
    """
    name, tokens = ("class token", slice(1)) if vit.config.pool == "cls" else ("patches", slice(vit.prefix, None))
    seen = attention(vit, images, tokens=tokens)[..., vit.prefix :].mean((1, 2))
    shares = (seen / seen.float().quantile(0.98, 1, keepdim=True)).clamp(max=1)
    return {f"attention of the {name}": shares.unflatten(1, vit.grid_of(*images.shape[-2:]))}
