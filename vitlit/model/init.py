"""Initial weights."""

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from vitlit.model.block import MLP, Attention, LayerScale
from vitlit.model.config import Init
from vitlit.model.position import sincos2d

if TYPE_CHECKING:
    from vitlit.model.vit import ViT


@torch.no_grad()
def init_weights(vit: "ViT") -> None:
    """Initialise everything but the head as `vit.config.init` says.

    vision_transformer is google-research's (`models_vit.py`): Xavier-uniform layers, positions with a std of 0.02.
    big_vision (`models/vit.py`) differs in the positions, whose std is 1 / sqrt(D). timm is timm 0.3's, which DeiT and
    DeiT III use: a normal distribution of std 0.02, truncated at +-2, for linear layers, positions and all tokens, and
    torch's default for the patch embedding.
    """
    init, patches = vit.config.init, vit.patch_embed.proj
    if init == "timm":
        patches.reset_parameters()
    else:
        lecun = math.sqrt(1 / math.prod(patches.weight.shape[1:])) / 0.87962566103423978  # std of N(0, 1) cut at 2
        nn.init.trunc_normal_(patches.weight, std=lecun, a=-2 * lecun, b=2 * lecun)
        if patches.bias is not None:
            nn.init.zeros_(patches.bias)
    if vit.cls_token is not None:
        nn.init.trunc_normal_(vit.cls_token, std=0.02) if init == "timm" else nn.init.zeros_(vit.cls_token)
    for tokens in (vit.dist_token, vit.reg_token):
        if tokens is not None:
            nn.init.trunc_normal_(tokens, std=0.02)
    fill_positions(vit)
    if isinstance(vit.pos_embed, nn.Parameter):
        nn.init.trunc_normal_(vit.pos_embed, std=vit.width**-0.5 if init == "big_vision" else 0.02)
    if vit.attn_pool is not None and init == "timm":
        nn.init.trunc_normal_(vit.attn_pool.latent, std=vit.width**-0.5)
    elif vit.attn_pool is not None:
        nn.init.xavier_uniform_(vit.attn_pool.latent[0])  # (1, D), whose fan is right
        for layer, parts in ((vit.attn_pool.q, 1), (vit.attn_pool.kv, 2), (vit.attn_pool.proj, 1)):
            xavier(layer, parts)
    init_layers(vit, init)


def init_layers(network: nn.Module, init: Init = "vision_transformer") -> None:
    """Initialise every attention, MLP, layer scale and norm of a network."""
    for module in network.modules():
        if init == "timm" and isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif init != "timm" and isinstance(module, Attention):
            xavier(module.qkv, 3)
            xavier(module.proj)
        elif init != "timm" and isinstance(module, MLP):
            xavier(module.fc1, 2 if module.activation == "swiglu" else 1, bias_std=1e-6)
            xavier(module.fc2, bias_std=1e-6)
        elif isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, module.initial)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.reset_parameters()


@torch.no_grad()
def xavier(layer: nn.Linear, parts: int = 1, bias_std: float = 0.0) -> None:
    """Initialise equal parts of a layer one by one (q, k and v; a gated MLP): the fused matrix has another fan."""
    for matrix in layer.weight.chunk(parts):
        nn.init.xavier_uniform_(matrix)
    if layer.bias is not None:
        nn.init.normal_(layer.bias, std=bias_std)


def fill_positions(vit: "ViT") -> None:
    """Fill a fixed position table. No state dict holds it, so a model built on the meta device needs this."""
    if vit.pos_embed is not None and vit.position != "learned":
        vit.pos_embed.copy_(sincos2d(vit.grid, vit.width, vit.position))
