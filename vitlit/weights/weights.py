"""A ViT's weights as read from a file, and the architecture that its tensors show."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vitlit.errors import UserError
from vitlit.model import SIZES, ViT, ViTConfig

COMMON: dict[str, Any] = {"interpolation": "bicubic", "crop_ratio": 0.875}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), **COMMON}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), **COMMON}

NOT_SAID = "the file does not say"  # ends the origin of what was assumed
STEM = "patch_embed.proj.weight"  # identifies a ViT with timm's names
HEADS = {size.width: size.heads for size in SIZES.values()} | {4096: 32}  # by width: the presets, DINOv3's largest

ASSUMED = ("heads", "norm_eps", "mlp", "resampling", "pool")  # where a file does not state these, a user may
# The options of the ViT of 2010.11929, for `require`; ViTConfig's defaults are its.
FEATURES = (
    *("pool", "pool_prefix", "position", "class_position", "distilled", "registers", "layer_scale", "qk_norm"),
    *("final_norm", "norm", "norm_kind", "patch_bias", "patch_norm", "pre_norm", "sub_norm", "proj_bias"),
    "partial_patches",
)
PLAIN: dict[str, Any] = {name: getattr(ViTConfig, name) for name in FEATURES}


@dataclass
class Weights:
    """A ViT's weights, and what the file says about them."""

    path: Path
    format: str  # whose it is, such as timm
    state: dict[str, Tensor]  # by the ViT's parameter names
    config: dict[str, Any]  # the ViT's options, as far as known; image_size is None if the positions are no square
    classes: list[str] = field(default_factory=list)  # in the order of the head's outputs; empty if unknown
    preprocess: dict[str, Any] = field(default_factory=dict)  # arguments of `Preprocess`; empty if unknown
    unused: list[str] = field(default_factory=list)  # names in the file of what is not part of a ViT, such as a decoder
    stated: frozenset[str] = frozenset()  # options, and preprocess, that the file or its format states
    origins: dict[str, str] = field(default_factory=dict)  # where settings that no tensor shows come from, by name
    temperature: float = 1.0  # what the logits are to be divided by before a softmax
    activation: str = "softmax"  # what makes probabilities of the logits; else sigmoid
    skipped: list[str] = field(default_factory=list)  # names by the ViT's parameter names that the user left out


def architecture(
    state: dict[str, Tensor], position: str = "learned", class_position: bool | None = None
) -> dict[str, Any]:
    """The ViT's options, as far as tensors with its parameter names show them; UserError if they are no whole ViT."""

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in state:
            raise UserError(f"{name} is missing from the file")
        if state[name].ndim != dimensions or 0 in state[name].shape:
            raise UserError(f"{name} has the shape {list(state[name].shape)}, which is not a ViT's")
        return tuple(state[name].shape)

    width, channels, patch, patch_width = shape(STEM, 4)
    if patch != patch_width:
        raise UserError(f"patches of {patch} x {patch_width} pixels; vitlit's are square")
    hidden, mlp_dim = shape("blocks.0.mlp.fc1.weight", 2)[0], shape("blocks.0.mlp.fc2.weight", 2)[1]
    tokens = {name: state[name].shape[1] if name in state else 0 for name in ("cls_token", "dist_token", "reg_token")}
    config: dict[str, Any] = {
        "image_size": None,
        "patch_size": patch,
        "width": width,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "mlp_dim": mlp_dim,
        "num_classes": 0,
        "hidden_dim": None,
        "in_channels": channels,
        "class_token": bool(tokens["cls_token"]),
        "distilled": bool(tokens["dist_token"]),
        "registers": tokens["reg_token"],
        "position": position,
        "layer_scale": 1e-5 if "blocks.0.ls1.gamma" in state else None,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "patch_bias": "patch_embed.proj.bias" in state or "norm_pre.weight" not in state,  # only CLIP's has none
        "patch_norm": "patch_embed.norm.weight" in state,
        "pre_norm": "norm_pre.weight" in state,
        "sub_norm": "blocks.0.attn.norm.weight" in state,
        "norm_kind": "layernorm" if "blocks.0.norm1.bias" in state else "rmsnorm",
        "norm": "pooled" if "fc_norm.weight" in state else "tokens",
        "final_norm": "norm.weight" in state or "fc_norm.weight" in state,
    }
    pooled = "gap" if config["norm"] == "pooled" or not config["class_token"] else "cls"
    config["pool"] = "map" if "attn_pool.latent" in state else pooled
    if hidden == 2 * mlp_dim:
        config["mlp"] = "swiglu"
    if "head.out.weight" in state:
        config["num_classes"] = shape("head.out.weight", 2)[0]
        config["hidden_dim"] = shape("head.pre_logits.weight", 2)[0]
    elif any(name.startswith("head.") for name in state):
        config["num_classes"] = shape("head.weight", 2)[0]
    if position == "learned":
        length = shape("pos_embed", 3)[1]
        special = tokens["cls_token"] + tokens["dist_token"]
        if class_position is None:  # the table covers the class token if that leaves a square
            class_position = special > 0 and (square(length - special) is not None or square(length) is None)
        side = square(length - special if class_position else length)
        config["class_position"], config["image_size"] = class_position, side * patch if side else None
    return config


def usual_heads(config: Mapping[str, Any]) -> int | None:
    """The usual number of heads of a network of this width; None for other widths."""
    width = config["width"]
    if width == 1280 and config.get("position") == "rope":  # DINOv3's H+
        return 20
    if width == 1536 and config.get("mlp") == "swiglu":  # DINOv2's giant
        return 24
    return HEADS.get(width)


def in_words(origins: Mapping[str, str]) -> tuple[str, dict[str, list[str]]]:
    """What was assumed, in words, where a file does not say; and the names of the other settings by their origin."""
    known: dict[str, list[str]] = {}
    for name, origin in origins.items():
        known.setdefault(NOT_SAID if origin.endswith(NOT_SAID) else origin, []).append(name)
    assumed = [f"{name} {origins[name].removesuffix(f'; {NOT_SAID}')}" for name in known.pop(NOT_SAID, [])]
    return f", assuming what {NOT_SAID}: {', '.join(assumed)}" if assumed else "", known


def square(count: int) -> int | None:
    """The side of a square of `count` patches; None if there is no such square."""
    side = math.isqrt(max(0, count))
    return side if side and side * side == count else None


def tensors(vit: ViT) -> dict[str, Tensor]:
    """The tensors to write: the state dict without the mask token, which only pretraining needs."""
    return {name: tensor for name, tensor in vit.state_dict().items() if name != "mask_token"}


def require(vit: ViT, model: str, **allowed: Any) -> None:
    """Raise UserError unless each option of a ViT has the value, or is in the tuple, that a `model` allows."""
    for name, values in allowed.items():
        value = getattr(vit.config, name)
        if value not in (values if isinstance(values, tuple) else (values,)):
            raise UserError(f"{model} has no {name} {value}")
