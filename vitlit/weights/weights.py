"""A ViT's weights as read from a file, and the architecture that its tensors show."""

import math
import re
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

STEM = "patch_embed.proj.weight"  # identifies a ViT with timm's names
# Heads by width: the presets, and DINOv3's largest.
HEADS = {size.width: size.heads for size in SIZES.values()} | {4096: 32}

# The options of the ViT of 2010.11929, for `require`; ViTConfig's defaults are its.
FEATURES = (
    "pool",
    "position",
    "class_position",
    "distilled",
    "registers",
    "layer_scale",
    "qk_norm",
    "final_norm",
    "norm",
)
PLAIN: dict[str, Any] = {name: getattr(ViTConfig, name) for name in FEATURES}


@dataclass
class Weights:
    """A ViT's weights, and what the file says about them.

    Attributes:
        path: the file.
        format: whose format it is, such as timm.
        state: tensors by the ViT's parameter names.
        config: the ViT's options, as far as file and format show them; image_size is None if the position table is not
            square.
        classes: class names in the order of the head's outputs; empty if unknown.
        preprocess: arguments of `vitlit.data.Preprocess`; empty if unknown.
        unused: names in the file of tensors that are not part of a ViT, such as a decoder.
        stated: options in `config` that the file or its format states; the others are inferred from the tensors.
        origins: where settings that the tensors do not show come from, by name.
    """

    path: Path
    format: str
    state: dict[str, Tensor]
    config: dict[str, Any]
    classes: list[str] = field(default_factory=list)
    preprocess: dict[str, Any] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    stated: frozenset[str] = frozenset()
    origins: dict[str, str] = field(default_factory=dict)


def architecture(
    state: Mapping[str, Tensor], path: Path, position: str = "learned", class_position: bool | None = None
) -> dict[str, Any]:
    """The ViT's options, as far as tensors with its parameter names show them; UserError if they are no whole ViT.

    `class_position` is whether the position table covers the class token; by default, whether that leaves a square.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in state:
            raise UserError(f"{path} is not a whole ViT: {name} is missing from the file")
        if state[name].ndim != dimensions or 0 in state[name].shape:
            raise UserError(f"{path} is not a ViT: {name} has the shape {list(state[name].shape)}")
        return tuple(state[name].shape)

    width, channels, patch, patch_width = shape(STEM, 4)
    if patch != patch_width:
        raise UserError(f"{path} has patches of {patch} x {patch_width} pixels; vitlit's are square")
    hidden, mlp_dim = shape("blocks.0.mlp.fc1.weight", 2)[0], shape("blocks.0.mlp.fc2.weight", 2)[1]
    tokens = {name: state[name].shape[1] if name in state else 0 for name in ("cls_token", "dist_token", "reg_token")}
    config: dict[str, Any] = {
        "image_size": None,
        "patch_size": patch,
        "width": width,
        "depth": count_blocks(state, path),
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
        _, length, table_width = shape("pos_embed", 3)
        if table_width != width:
            raise UserError(f"{path}: pos_embed is {list(state['pos_embed'].shape)} in the file, its width not {width}")
        special = tokens["cls_token"] + tokens["dist_token"]
        if class_position is None:
            class_position = special > 0 and (square(length - special) is not None or square(length) is None)
        side = square(length - special if class_position else length)
        config["class_position"], config["image_size"] = class_position, side * patch if side else None
    return config


def count_blocks(state: Mapping[str, Tensor], path: Path) -> int:
    """The number of blocks, which are numbered from 0 without a gap, or UserError."""
    blocks = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    gap = next(i for i in range(len(blocks) + 1) if i not in blocks)
    if gap == 0 or gap < len(blocks):
        raise UserError(f"{path} is not a whole ViT: blocks.{gap}.norm1.weight is missing from the file")
    return len(blocks)


def usual_heads(config: Mapping[str, Any]) -> int | None:
    """The usual number of heads of a network of this width; None for other widths."""
    width = config["width"]
    if width == 1280 and config.get("position") == "rope":  # DINOv3's H+
        return 20
    if width == 1536 and config.get("mlp") == "swiglu":  # DINOv2's giant
        return 24
    return HEADS.get(width)


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
