"""What may differ between a file's network and the ViT, and how it is brought over."""

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.model.block import MLP
from vitlit.model.position import resample, sincos2d
from vitlit.weights.weights import STEM, Weights


def adapt(state: dict[str, Tensor], weights: Weights, vit: ViT, skipped: Collection[str]) -> dict[str, str]:
    """Bring tensors to the ViT's image size, channels and kind of positions, in place.

    Returns:
        what was done, by name.

    Raises:
        UserError: the positions are of a kind that does not go over.
    """
    done = {}
    stem, channels = state.get(STEM), vit.config.in_channels
    if stem is not None and stem.ndim == 4 and stem.shape[1] != channels:
        state[STEM] = other_channels(stem, channels)
        done[STEM] = f"{stem.shape[1]} to {channels} channels"
    kind = weights.config.get("position", "learned")
    if "pos_embed" in skipped:
        return done
    if kind != "learned":
        if vit.position == "learned" and kind.startswith("sincos2d"):
            table = sincos2d(vit.grid, vit.width, kind)
            state["pos_embed"] = torch.cat([table.new_zeros(1, vit.positioned, vit.width), table], dim=1)
            done["pos_embed"] = f"{kind} written out"
        elif vit.position != kind:
            raise UserError(
                f"{weights.path} does not fit the model: position is {kind} in the file and {vit.position} in it"
            )
    elif state.get("pos_embed", torch.empty(0)).ndim == 3:
        positions(state, weights, vit, done)
    return done


def other_channels(stem: Tensor, channels: int) -> Tensor:
    """The patch embedding's kernel for images of other channels, whose sum over equal channels stays.

    For one channel it is the sum over the file's (timm's convention); for more, the file's in turn, scaled by
    file's / model's.
    """
    if channels == 1:
        return stem.sum(dim=1, keepdim=True)
    repeated = stem.repeat(1, -(-channels // stem.shape[1]), 1, 1)[:, :channels]
    return repeated * (stem.shape[1] / channels)


def positions(state: dict[str, Tensor], weights: Weights, vit: ViT, done: dict[str, str]) -> None:
    """Bring a learned table to the ViT's grid, and to whether its prefix has positions."""
    table = state["pos_embed"]
    special = [name for name in ("cls_token", "dist_token") if name in state]
    count = len(special) if weights.config.get("class_position", True) else 0
    if "class_position" not in weights.told and table.shape[1] == math.prod(vit.grid) + vit.positioned:
        count = vit.positioned  # laid out as the ViT's
    if table.shape[2] != vit.width or any(state[n].shape[2:] != table.shape[2:] for n in special):
        return  # of another width: refused with its shape
    source = grid_of(table.shape[1] - count, weights, vit)
    if vit.position != "learned":
        fixed = sincos2d(source, vit.width, vit.position) if vit.pos_embed is not None else None
        if fixed is None or not (table[:, count:] - fixed).abs().max() <= 1e-5:
            raise UserError(
                f"{weights.path} does not fit the model: position is learned in the file and {vit.position} in it"
            )
        done["pos_embed"] = f"equal to {vit.position}"
    elif source != vit.grid:
        table = resample(table, source, vit.grid, count, weights.config.get("resampling", vit.resampling))
        done["pos_embed"] = "{} x {} to {} x {}".format(*source, *vit.grid)
    if count and not vit.positioned:  # the same sum
        for i, name in enumerate(special):
            state[name] = state[name] + table[:, i : i + 1]
            if table[:, i].any():
                done[name] = "its position added"
        table = table[:, count:]
        done.setdefault("pos_embed", "without the class position")
    elif vit.positioned == len(special) > count:
        table = torch.cat([table.new_zeros(1, vit.positioned, vit.width), table], dim=1)
        done.setdefault("pos_embed", "with a class position of zero")
    state["pos_embed"] = table
    if vit.position != "learned":
        del state["pos_embed"]


def grid_of(patches: int, weights: Weights, vit: ViT) -> tuple[int, int]:
    """The grid of a file's position table: what the file says, else the ViT's where it is as long, else a square."""
    size = weights.config.get("image_size")
    if patches == math.prod(vit.grid) and "image_size" not in weights.told:
        return vit.grid  # as long as the ViT's
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        source = (height // weights.config["patch_size"], width // weights.config["patch_size"])
        if source[0] * source[1] == patches:
            return source
    shape = list(weights.state["pos_embed"].shape)
    raise UserError(
        f"{weights.path}: pos_embed is {shape} in the file, and {patches} positions are no grid; the model's has "
        f"{vit.grid[0]} x {vit.grid[1]}"
    )


def set_numerics(vit: ViT, config: dict[str, Any]) -> list[str]:
    """Set what weights were made with and no tensor shows: epsilon, GELU, resampling. Returns what changed."""
    changed = []
    for name in ("norm_eps", "mlp", "resampling"):
        own: Any = getattr(vit.config, name)
        value: Any = config.get(name, own)
        if value == own:
            continue
        vit.config = replace(vit.config, **{name: value})
        changed.append(f"{name} {value} (was {own})")
        for module in vit.modules():
            if name == "norm_eps" and isinstance(module, nn.LayerNorm):
                module.eps = value
            elif name == "mlp" and isinstance(module, MLP) and module.activation != "swiglu":
                module.activation = value
    return changed
