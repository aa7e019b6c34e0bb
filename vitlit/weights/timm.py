"""timm's `vision_transformer` and `deit` models: their names are the ViT's own."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitlit.model import ViT
from vitlit.weights.files import CONFIG, Contents
from vitlit.weights.weights import HALF, IMAGENET, Weights, architecture, require, square

STEM = "patch_embed.proj.weight"
POOLS = {"token": "cls", "avg": "gap", "map": "map"}
# The models that timm builds with act_layer gelu_tanh.
TANH = (
    "base_patch32_siglip",
    "giantopt_patch16_siglip",
    "large_patch16_siglip_512",
    "large_patch16_siglip_gap_512",
    "so400m_patch16_siglip",
)


def read(contents: Contents) -> Weights | None:
    state = unprefixed(contents.tensors)
    if STEM not in state:
        return None
    state = canonical(state)
    config, about = architecture(state, contents.path), contents.beside(CONFIG)
    config |= told(about)
    origins = dict.fromkeys(told(about), CONFIG)
    cfg = about.get("pretrained_cfg")
    if isinstance(cfg, dict) and "mean" in cfg:
        preprocess: dict[str, Any] = {name: tuple(cfg[name]) for name in ("mean", "std")}
        preprocess["interpolation"] = "bilinear" if cfg.get("interpolation") == "bilinear" else "bicubic"
        preprocess["crop_ratio"] = float(cfg.get("crop_pct", 0.875))
        origins["preprocess"] = CONFIG
    else:
        imagenet = config["distilled"] or config["layer_scale"] is not None
        preprocess = {**(IMAGENET if imagenet else HALF), "crop_ratio": 0.9}
        origins["preprocess"] = (
            f"{'DeiT and DINOv2' if imagenet else 'AugReg and SigLIP'}, since the file does not tell"
        )
    names = about.get("label_names")
    classes = [str(name) for name in names] if isinstance(names, list) and len(names) == config["num_classes"] else []
    return Weights(contents.path, "timm", state, config, classes, preprocess, origins=origins)


def told(about: dict[str, Any]) -> dict[str, Any]:
    """What timm's config.json tells and no tensor: the pooling, and the tanh GELU of some models."""
    told = {}
    if about.get("global_pool") in POOLS:
        told["pool"] = POOLS[about["global_pool"]]
    if any(f"vit_{known}" in str(about.get("architecture")) for known in TANH):
        told["mlp"] = "gelu_tanh"
    return told


def unprefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DDP, torch.compile or a model around the ViT put before them."""
    for name in tensors:
        if name.endswith(f".{STEM}"):
            prefix = name.removesuffix(STEM)
            return {n.removeprefix(prefix): t for n, t in tensors.items()}
    return tensors


def canonical(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that a few models of the family write otherwise; a table that covers registers, folded into them."""
    state = {re.sub(r"^(blocks\.\d+\.)gamma_([12])$", r"\1ls\2.gamma", name): tensor for name, tensor in state.items()}
    if {"pos_embed", "reg_token"} <= state.keys() and state["pos_embed"].ndim == state["reg_token"].ndim == 3:
        table, registers = state["pos_embed"], state["reg_token"].shape[1]
        special = sum(name in state for name in ("cls_token", "dist_token"))
        length = table.shape[1] - special
        if square(length - registers) and not square(length) and not square(table.shape[1]):
            state["reg_token"] = state["reg_token"] + table[:, special : special + registers]
            state["pos_embed"] = torch.cat([table[:, :special], table[:, special + registers :]], dim=1)
    return state


def write(vit: ViT, path: Path) -> dict[str, Tensor]:
    """The tensors of a timm model of the same network.

    Raises:
        UserError: timm has no such network.
    """
    require(vit, path, "timm's vit", hidden_dim=None, position=("learned", "sincos2d", "sincos2d_mae"))
    state = dict(vit.state_dict())
    if vit.position.startswith("sincos2d"):
        assert vit.pos_embed is not None
        special = vit.prefix - vit.config["registers"]
        state["pos_embed"] = torch.cat([vit.pos_embed.new_zeros(1, special, vit.width), vit.pos_embed], dim=1)
    if vit.config["registers"] and vit.positioned:  # timm's table covers all of the prefix or nothing
        table = state["pos_embed"]
        state["pos_embed"] = table[:, vit.positioned :]
        for i, name in enumerate(name for name in ("cls_token", "dist_token") if name in state):
            state[name] = state[name] + table[:, i : i + 1]
    return state
