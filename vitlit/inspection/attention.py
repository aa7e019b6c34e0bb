"""What a ViT looks at. Attention weights are computed beside the fused kernel, which keeps none."""

from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vitlit.model import ViT


class QueriesAndKeys(TorchFunctionMode):
    """Keeps the queries and keys that the fused kernel is given, in its calls with these numbers."""

    def __init__(self, calls: range) -> None:
        super().__init__()
        self.calls, self.call, self.given = calls, 0, list[tuple[Tensor, Tensor]]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            self.given += [args[:2]] if self.call in self.calls else []
            self.call += 1
        return function(*args, **(kwargs or {}))


def attentions(vit: ViT, images: Tensor, tokens: slice = slice(None), blocks: slice = slice(None)) -> Iterator[Tensor]:
    """The weights of `attention` of each of the blocks in turn, from one forward pass."""
    calls = range(len(vit.blocks))[blocks]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), QueriesAndKeys(calls) as seen:
        vit.encode(vit.embed(images), vit.grid_of(*images.shape[-2:]))
    return ((queries[:, :, tokens] * queries.shape[-1] ** -0.5 @ keys.mT).softmax(-1) for queries, keys in seen.given)


def attention(vit: ViT, images: Tensor, block: int = -1, tokens: slice = slice(None)) -> Tensor:
    """How much tokens, by default all, attend to each in a block: images (B, C, H, W) -> (B, heads, tokens, S + N).

    Rows sum to 1. The S prefix tokens (class, distillation, registers) come first. IndexError: there is no such block.
    """
    number = range(len(vit.blocks))[block]
    return next(attentions(vit, images, tokens, slice(number, number + 1)))


def rollout(vit: ViT, images: Tensor, residual: float = 0.5) -> Tensor:
    """What reaches each token from each through all blocks (2005.00928, section 3): (B, C, H, W) -> (B, S + N, S + N).

    The product of the blocks' (1 - residual) W + residual I, where W is the mean of the heads' weights.
    """
    blocks = (weights.mean(1) for weights in attentions(vit, images))
    mixed = ((1 - residual) * mean + residual * torch.eye(mean.shape[-1], device=mean.device) for mean in blocks)
    return reduce(lambda below, block: block @ below, mixed)


def attention_distance(vit: ViT, images: Tensor) -> Tensor:
    """How far the patches of images (B, C, H, W) look, in pixels: (depth, heads).

    The distance between patches, weighted by the attention among them, averaged over patches and images (2010.11929,
    figure 7, right). The prefix tokens, which have no place, do not count.
    """
    places = torch.cartesian_prod(*map(torch.arange, vit.grid_of(*images.shape[-2:]))).to(images) * vit.patch_size
    apart = (places[:, None] - places).norm(dim=-1)
    looks = (weights[..., vit.prefix :] for weights in attentions(vit, images, slice(vit.prefix, None)))
    return torch.stack([((among * apart).sum(-1) / among.sum(-1)).mean((0, 2)) for among in looks])


def attended(vit: ViT, images: Tensor) -> dict[str, Tensor]:
    """What the tokens that are pooled, class token or patches, attend to in the last block, by its name.

    A map (B, rows, columns): the mean of the heads, as `as_map` scales it.
    """
    name, tokens = pooled(vit)
    return {f"attention of the {name}": as_map(vit, images, attention(vit, images, tokens=tokens).mean((1, 2)))}


def pooled(vit: ViT) -> tuple[str, slice]:
    """The tokens that the head sees: their name, and where they are."""
    return ("class token", slice(1)) if vit.config.pool == "cls" else ("patches", slice(vit.prefix, None))


def as_map(vit: ViT, images: Tensor, weights: Tensor) -> Tensor:
    """Weights of all tokens (..., S + N) as a map (..., rows, columns), scaled so that its largest 2 % are 1."""
    seen = weights[..., vit.prefix :].float()
    return (seen / seen.quantile(0.98, -1, keepdim=True)).clamp(max=1).unflatten(-1, vit.grid_of(*images.shape[-2:]))
