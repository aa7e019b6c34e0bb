"""How a ViT begins."""

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from vitlit.model.block import MLP, Attention, LayerScale
from vitlit.model.position import sincos2d

if TYPE_CHECKING:
    from vitlit.model.vit import ViT


@torch.no_grad()
def init_weights(vit: "ViT") -> None:
    """Initialise all but the head as google-research/vision_transformer does (`models_vit.py`).

    Queries, keys and values are three Xavier-uniform matrices, and so are the halves of a gated MLP: one draw over the
    fused matrix would have the wrong fan.
    """
    patches = vit.patch_embed.proj
    lecun = math.sqrt(1 / math.prod(patches.weight.shape[1:])) / 0.87962566103423978  # std of N(0, 1) cut at 2
    nn.init.trunc_normal_(patches.weight, std=lecun, a=-2 * lecun, b=2 * lecun)
    if patches.bias is not None:
        nn.init.zeros_(patches.bias)
    if vit.cls_token is not None:
        nn.init.zeros_(vit.cls_token)
    for tokens in (vit.dist_token, vit.reg_token):
        if tokens is not None:
            nn.init.trunc_normal_(tokens, std=0.02)
    fill_positions(vit)
    if isinstance(vit.pos_embed, nn.Parameter):
        nn.init.trunc_normal_(vit.pos_embed, std=0.02)
    if vit.attn_pool is not None:
        nn.init.xavier_uniform_(vit.attn_pool.latent[0])  # (1, D): torch would take D of three axes for a kernel
        for layer, parts in ((vit.attn_pool.q, 1), (vit.attn_pool.kv, 2), (vit.attn_pool.proj, 1)):
            xavier(layer, parts)
    init_layers(vit)


@torch.no_grad()
def init_layers(network: nn.Module) -> None:
    """Initialise every attention, MLP, layer scale and LayerNorm of a network."""
    for module in network.modules():
        if isinstance(module, Attention):
            xavier(module.qkv, 3)
            xavier(module.proj)
        elif isinstance(module, MLP):
            xavier(module.fc1, 2 if module.activation == "swiglu" else 1, bias_std=1e-6)
            xavier(module.fc2, bias_std=1e-6)
        elif isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, module.initial)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()


@torch.no_grad()
def xavier(layer: nn.Linear, parts: int = 1, bias_std: float = 0.0) -> None:
    """Xavier-uniform for each of the equal parts of a layer's outputs."""
    for matrix in layer.weight.chunk(parts):
        nn.init.xavier_uniform_(matrix)
    if layer.bias is not None:
        nn.init.normal_(layer.bias, std=bias_std)


@torch.no_grad()
def fill_positions(vit: "ViT") -> None:
    """Fill a fixed position table, which no state dict holds (a model built on the meta device lacks it)."""
    if vit.pos_embed is not None and vit.position != "learned":
        vit.pos_embed.copy_(sincos2d(vit.grid, vit.width, vit.position))
