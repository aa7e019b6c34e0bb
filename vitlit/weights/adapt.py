"""Bring weights to a ViT of another image size, number of channels or kind of positions."""

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.model.block import MLP
from vitlit.model.position import Grid, resample, sincos2d
from vitlit.weights.weights import STEM, Weights


def adapt(state: dict[str, Tensor], weights: Weights, vit: ViT, skipped: Collection[str]) -> None:
    """Bring tensors to the ViT's channels, image size and kind of positions, in place; UserError if that cannot be."""
    stem, channels = state.get(STEM), vit.config.in_channels
    if stem is not None and stem.ndim == 4 and stem.shape[1] != channels:  # as timm: the sum for one, else repeated
        repeated = stem.repeat(1, -(-channels // stem.shape[1]), 1, 1)[:, :channels] * (stem.shape[1] / channels)
        state[STEM] = stem.sum(dim=1, keepdim=True) if channels == 1 else repeated
    if "pos_embed" in skipped:
        return
    kind, fits = weights.config.get("position", "learned"), True
    if kind.startswith("sincos2d") and vit.position == "learned":
        state["pos_embed"] = F.pad(sincos2d(vit.grid, vit.width, kind), (0, 0, vit.positioned, 0))
    elif kind != "learned":
        fits = kind == vit.position
    elif state.get("pos_embed", torch.empty(0)).ndim == 3:
        fits = adapt_table(state, weights, vit)
    if not fits:
        raise UserError(f"{weights.path}: position is {kind} in the file and {vit.position} in the model")


def adapt_table(state: dict[str, Tensor], weights: Weights, vit: ViT) -> bool:
    """Bring a learned table to the ViT's grid, and to whether its prefix has positions; False if the ViT's differs."""
    table = state["pos_embed"]
    special = [name for name in ("cls_token", "dist_token") if name in state]
    count = len(special) if weights.config.get("class_position", True) else 0
    if "class_position" not in weights.stated and table.shape[1] == math.prod(vit.grid) + vit.positioned:
        count = vit.positioned  # as long as the ViT's table
    if table.shape[2] != vit.width or any(state[name].shape[2:] != table.shape[2:] for name in special):
        return True  # another width, which load_weights refuses
    patches = table[:, count:]
    source = grid_of(patches.shape[1], weights, vit)
    if vit.position == "learned":
        table = resample(table, source, vit.grid, count, weights.config.get("resampling", vit.resampling))
    elif vit.pos_embed is None or not (patches - sincos2d(source, vit.width, vit.position)).abs().max() <= 1e-5:
        return False
    if count and not vit.positioned:  # the sum of token and position stays
        for i, name in enumerate(special):
            if table[:, i].any():
                state[name] = state[name] + table[:, i : i + 1]
        table = table[:, count:]
    elif vit.positioned == len(special) > count:
        table = F.pad(table, (0, 0, vit.positioned, 0))
    if vit.position == "learned":
        state["pos_embed"] = table
    else:
        del state["pos_embed"]
    return True


def grid_of(patches: int, weights: Weights, vit: ViT) -> Grid:
    """The grid of a file's position table: stated by the file, else the ViT's if it is as long, else a square."""
    if patches == math.prod(vit.grid) and "image_size" not in weights.stated:
        return vit.grid
    size = weights.config.get("image_size")
    if size is not None:
        sides = (size, size) if isinstance(size, int) else size
        height, width = (side // weights.config["patch_size"] for side in sides)
        if height * width == patches:
            return height, width
    ours = "{} x {}".format(*vit.grid)
    raise UserError(f"{weights.path}: the {patches} patches of pos_embed are not a grid; the model's are {ours}")


def set_numerics(vit: ViT, config: dict[str, Any]) -> list[str]:
    """Set what weights were made with and no tensor shows: epsilon, GELU, resampling. Returns what changed."""
    ours = {name: getattr(vit.config, name) for name in ("norm_eps", "mlp", "resampling")}
    changed = {name: config[name] for name, value in ours.items() if config.get(name, value) != value}
    vit.config = replace(vit.config, **changed)
    for module in vit.modules():
        if "norm_eps" in changed and isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.eps = changed["norm_eps"]
        elif "mlp" in changed and isinstance(module, MLP) and module.activation != "swiglu":
            module.activation = changed["mlp"]
    return [f"{name} {value} (was {ours[name]})" for name, value in changed.items()]
