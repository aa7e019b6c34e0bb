"""timm's `vision_transformer` and `deit` models: their names are the ViT's own."""

import re
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.weights.files import CONFIG, Contents
from vitlit.weights.names import prefix_of, strip
from vitlit.weights.weights import HALF, IMAGENET, STEM, Weights, architecture, require, square, tensors

POOLS = {"token": "cls", "avg": "gap", "map": "map"}
# The models that timm builds with act_layer gelu_tanh.
TANH = re.compile(r"vit_(base_patch32|giantopt_patch16|so400m_patch16)_siglip|vit_large_patch16_siglip(_gap)?_512")
OTHERS = re.compile("_rope|_rpn|quickgelu|qwen|eva")  # networks with the same tensor names that compute something else
# Arguments of timm's models that have no effect, are shown by the tensors, or are read by `stated_by`.
KNOWN = (
    *("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "mlp_ratio", "qkv_bias", "qk_norm"),
    *("init_values", "class_token", "no_embed_class", "reg_tokens", "fc_norm", "final_norm", "global_pool"),
    *("dynamic_img_size", "drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
    *("num_heads", "act_layer"),
)


def read(contents: Contents) -> Weights | None:
    prefix = prefix_of(contents.tensors, STEM)
    if prefix is None:
        return None
    state = fold_registers(strip(contents.tensors, prefix)[0])
    about = contents.beside(CONFIG)
    stated = stated_by(about)
    config, known = {**architecture(state), **stated}, set(stated)
    origins = {"mlp": "timm's default; the file does not say"} | dict.fromkeys(stated, CONFIG)
    cfg = about.get("pretrained_cfg")
    if isinstance(cfg, dict) and "mean" in cfg:
        preprocess: dict[str, Any] = {name: tuple(cfg[name]) for name in ("mean", "std")}
        known.add("preprocess")
        preprocess["interpolation"] = "bilinear" if cfg.get("interpolation") == "bilinear" else "bicubic"
        preprocess["crop_ratio"] = float(cfg.get("crop_pct", 0.875))
        preprocess["squash"] = cfg.get("crop_mode") == "squash"
        origins["preprocess"] = CONFIG
    else:
        imagenet = config["distilled"] or config["layer_scale"] is not None
        preprocess = {**(IMAGENET if imagenet else HALF), "crop_ratio": 0.9}
        models = "DeiT and DINOv2" if imagenet else "AugReg and SigLIP"
        origins["preprocess"] = f"{models}; the file does not say"
    names = about.get("label_names")
    classes = [str(name) for name in names] if isinstance(names, list) and len(names) == config["num_classes"] else []
    return Weights(contents.path, "timm", state, config, classes, preprocess, [], frozenset(known), origins)


def stated_by(about: dict[str, Any]) -> dict[str, Any]:
    """The options that timm's config.json states; UserError if it describes a network that vitlit does not have."""
    name, arguments = str(about.get("architecture", "")), about.get("model_args") or {}
    if not name:
        return {}
    if OTHERS.search(name):
        raise UserError(f"{CONFIG} is of timm's {name}, which is not one of the plain ViTs that vitlit has")
    unknown = next((key for key in arguments if key not in KNOWN), None)
    if unknown is not None:
        raise UserError(f"{CONFIG} has the model argument {unknown}, which vitlit does not know")
    stated: dict[str, Any] = {"mlp": "gelu_tanh"} if TANH.search(name) else {}
    pool, activation = arguments.get("global_pool", about.get("global_pool")), arguments.get("act_layer")
    if pool:
        stated["pool"] = POOLS.get(pool)
    if "act_layer" in arguments:
        stated["mlp"] = activation if activation in ("gelu", "gelu_tanh") else None
    if None in stated.values():
        raise UserError(f"{CONFIG} has global_pool {pool} and act_layer {activation}; vitlit does not have both")
    if "num_heads" in arguments or name.startswith("vit_base_patch16_gap"):
        stated["heads"] = int(arguments.get("num_heads", 16))
    if "img_size" in arguments:
        stated["image_size"] = arguments["img_size"]
    return stated


def fold_registers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """If the position table also covers the registers, add their positions to them and drop these from the table."""
    if {"pos_embed", "reg_token"} <= state.keys() and state["pos_embed"].ndim == state["reg_token"].ndim == 3:
        table, registers = state["pos_embed"], state["reg_token"].shape[1]
        special = sum(name in state for name in ("cls_token", "dist_token"))
        length = table.shape[1] - special
        if square(length - registers) and not square(length) and not square(table.shape[1]):
            state["reg_token"] = state["reg_token"] + table[:, special : special + registers]
            state["pos_embed"] = torch.cat([table[:, :special], table[:, special + registers :]], dim=1)
    return state


def write(vit: ViT) -> dict[str, Tensor]:
    require(vit, "timm's vit", hidden_dim=None, position=("learned", "sincos2d", "sincos2d_mae"))
    state, registers = tensors(vit), vit.config.registers
    if vit.position.startswith("sincos2d"):
        assert vit.pos_embed is not None
        special = 0 if registers else vit.prefix  # timm's table covers the whole prefix or nothing of it
        state["pos_embed"] = F.pad(vit.pos_embed, (0, 0, special, 0))
    if registers and vit.positioned:
        table = state["pos_embed"]
        state["pos_embed"] = table[:, vit.positioned :]
        for i, name in enumerate(name for name in ("cls_token", "dist_token") if name in state):
            state[name] = state[name] + table[:, i : i + 1]
    return state
