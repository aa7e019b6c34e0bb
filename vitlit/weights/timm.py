"""timm's `vision_transformer` and `deit` models: their names are the ViT's own."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.weights.files import CONFIG, Contents
from vitlit.weights.weights import HALF, IMAGENET, STEM, Weights, architecture, require, square, tensors

POOLS = {"token": "cls", "avg": "gap", "map": "map"}
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh"}
# The models that timm builds with act_layer gelu_tanh.
TANH = (
    "base_patch32_siglip",
    "giantopt_patch16_siglip",
    "large_patch16_siglip_512",
    "large_patch16_siglip_gap_512",
    "so400m_patch16_siglip",
)
# Networks under the same names that compute something else.
OTHERS = ("_rope", "_rpn", "quickgelu", "qwen", "eva")
# Arguments of timm's models that change nothing, or nothing that the tensors do not show.
SHOWN = (
    *("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "mlp_ratio", "qkv_bias", "qk_norm"),
    *("init_values", "class_token", "no_embed_class", "reg_tokens", "fc_norm", "final_norm", "global_pool"),
    *("dynamic_img_size", "drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
)


def read(contents: Contents) -> Weights | None:
    state = unprefixed(contents)
    if STEM not in state:
        return None
    state = canonical(state)
    config, about = architecture(state, contents.path), contents.beside(CONFIG)
    known = told(about, contents)
    config |= known
    origins = {"mlp": "timm's default, since the file does not tell"} | dict.fromkeys(known, CONFIG)
    cfg = about.get("pretrained_cfg")
    if isinstance(cfg, dict) and "mean" in cfg:
        preprocess: dict[str, Any] = {name: tuple(cfg[name]) for name in ("mean", "std")}
        preprocess["interpolation"] = "bilinear" if cfg.get("interpolation") == "bilinear" else "bicubic"
        preprocess["crop_ratio"] = float(cfg.get("crop_pct", 0.875))
        squeezed = ", but vitlit keeps the aspect" if cfg.get("crop_mode") == "squash" else ""
        origins["preprocess"] = CONFIG + squeezed
    else:
        imagenet = config["distilled"] or config["layer_scale"] is not None
        preprocess = {**(IMAGENET if imagenet else HALF), "crop_ratio": 0.9}
        origins["preprocess"] = (
            f"{'DeiT and DINOv2' if imagenet else 'AugReg and SigLIP'}, since the file does not tell"
        )
    names = about.get("label_names")
    classes = [str(name) for name in names] if isinstance(names, list) and len(names) == config["num_classes"] else []
    return Weights(contents.path, "timm", state, config, classes, preprocess, origins=origins, told=frozenset(known))


def told(about: dict[str, Any], contents: Contents) -> dict[str, Any]:
    """What timm's config.json tells and no tensor: pooling, heads, the kind of GELU, the image size.

    Raises:
        UserError: it tells of another network.
    """
    name, more = str(about.get("architecture", "")), about.get("model_args") or {}
    if not name:
        return {}
    where = contents.path.parent / CONFIG
    if any(other in name for other in OTHERS):
        raise UserError(f"{where} is of timm's {name}, which is no plain ViT of the kinds that vitlit has")
    strange = [key for key in more if key not in (*SHOWN, "num_heads", "act_layer")]
    if strange:
        raise UserError(f"{where} has the model argument {strange[0]}, which vitlit does not know")
    told: dict[str, Any] = {"mlp": "gelu_tanh"} if any(f"vit_{known}" in name for known in TANH) else {}
    pool = more.get("global_pool", about.get("global_pool", ""))
    if pool:
        told["pool"] = POOLS.get(pool)
    if "act_layer" in more:
        told["mlp"] = ACTIVATIONS.get(more["act_layer"])
    if None in told.values():
        raise UserError(f"{where} has global_pool {pool} and act_layer {more.get('act_layer')}; vitlit has not both")
    if "num_heads" in more or name.startswith("vit_base_patch16_gap"):
        told["heads"] = int(more.get("num_heads", 16))
    size = more.get("img_size")
    if size is not None:
        told["image_size"] = size if isinstance(size, int) else list(size)
    return told


def prefix_of(contents: Contents) -> str:
    """What stands before the ViT's names in a file."""
    return next((name.removesuffix(STEM) for name in contents.tensors if name.endswith(STEM)), "")


def unprefixed(contents: Contents) -> dict[str, Tensor]:
    """Names without what DDP, torch.compile or a model around the ViT put before them.

    Raises:
        UserError: something has not that prefix, and so is no part of the ViT.
    """
    tensors, prefix = contents.tensors, prefix_of(contents)
    for name, tensor in tensors.items():
        if not name.startswith(prefix):
            raise UserError(f"{contents.path} holds {name} {list(tensor.shape)} beside the ViT in {prefix.rstrip('.')}")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def canonical(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A table that covers the registers, too, folded into them."""
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
    state = tensors(vit)
    if vit.position.startswith("sincos2d"):
        assert vit.pos_embed is not None
        special = 0 if vit.config.registers else vit.prefix  # timm's table covers all of the prefix or nothing
        state["pos_embed"] = torch.cat([vit.pos_embed.new_zeros(1, special, vit.width), vit.pos_embed], dim=1)
    if vit.config.registers and vit.positioned:  # likewise
        table = state["pos_embed"]
        state["pos_embed"] = table[:, vit.positioned :]
        for i, name in enumerate(name for name in ("cls_token", "dist_token") if name in state):
            state[name] = state[name] + table[:, i : i + 1]
    return state
