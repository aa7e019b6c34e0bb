"""A ViT's weights as they are read, and what a set of tensors says of the network they belong to."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vitlit.errors import UserError
from vitlit.model import SIZES, ViT

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bicubic"}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic"}

STEM = "patch_embed.proj.weight"  # by which a ViT of timm's names is known
# Heads of the widths that have a name: the presets, DINOv3's largest.
HEADS = {size.width: size.heads for size in SIZES.values()} | {4096: 32}

# The ViT of 2010.11929, for `require`.
PLAIN: dict[str, Any] = {
    "pool": "cls",
    "position": "learned",
    "class_position": True,
    "distilled": False,
    "registers": 0,
    "layer_scale": None,
    "qk_norm": False,
    "final_norm": True,
    "norm": "tokens",
}


@dataclass
class Weights:
    """A ViT's weights and what belongs to them.

    Attributes:
        path: the file they come from.
        format: whose file it is, such as timm.
        state: tensors by the ViT's parameter names.
        config: the ViT's constructor arguments, as far as file and format tell them; image_size is None where the
            position table is no square.
        classes: class names in the order of the head's outputs; none where the file has none.
        preprocess: arguments of `vitlit.data.Preprocess`; none where it is not known.
        unused: tensors in the file that are no part of a ViT (mask token, decoder), by their names there.
        told: arguments of the ViT that file or format tell although they could also be guessed from the tensors.
        count: how many tensors the file holds.
        origins: where what the tensors do not tell comes from, by setting: a file, or what is usual.
    """

    path: Path
    format: str
    state: dict[str, Tensor]
    config: dict[str, Any]
    classes: list[str]
    preprocess: dict[str, Any]
    unused: list[str] = field(default_factory=list)
    told: frozenset[str] = frozenset()
    count: int = 0
    origins: dict[str, str] = field(default_factory=dict)


def architecture(
    state: Mapping[str, Tensor], path: Path, position: str = "learned", class_position: bool | None = None
) -> dict[str, Any]:
    """The ViT's constructor arguments, as far as tensors under its parameter names tell them.

    Args:
        state: the tensors.
        path: their file.
        position: the kind of positions; the table of learned ones must be there.
        class_position: whether the table covers the class token, where that is known; else what leaves a square.

    Raises:
        UserError: a tensor from which they follow is missing or of no shape that a ViT has.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in state:
            raise UserError(f"{path} is no whole ViT: {name} is missing from the file")
        if state[name].ndim != dimensions or 0 in state[name].shape:
            raise UserError(f"{path} is no ViT: {name} has the shape {list(state[name].shape)}")
        return tuple(state[name].shape)

    width, channels, patch, across = shape(STEM, 4)
    if patch != across:
        raise UserError(f"{path} has patches of {patch} x {across} pixels; vitlit's are square")
    found = re.compile(r"blocks\.(\d+)\.")
    blocks = {int(match[1]) for name in state if (match := found.match(name))}
    gap = next(i for i in range(len(blocks) + 1) if i not in blocks)
    if gap == 0 or gap < len(blocks):
        raise UserError(f"{path} is no whole ViT: blocks.{gap}.norm1.weight is missing from the file")
    hidden, mlp_dim = shape("blocks.0.mlp.fc1.weight", 2)[0], shape("blocks.0.mlp.fc2.weight", 2)[1]
    tokens = {name: state[name].shape[1] if name in state else 0 for name in ("cls_token", "dist_token", "reg_token")}
    config: dict[str, Any] = {
        "image_size": None,
        "patch_size": patch,
        "width": width,
        "depth": len(blocks),
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
    for name in ("head.weight", "head.out.weight"):
        if name in state:
            config["num_classes"] = shape(name, 2)[0]
    if not config["num_classes"] and any(name.startswith("head.") for name in state):
        shape("head.weight", 2)
    if "head.out.weight" in state:
        config["hidden_dim"] = shape("head.pre_logits.weight", 2)[0]
    if position == "learned":
        _, length, across = shape("pos_embed", 3)
        if across != width:
            raise UserError(f"{path}: pos_embed is {list(state['pos_embed'].shape)} in the file, its width not {width}")
        special = tokens["cls_token"] + tokens["dist_token"]
        if class_position is None:
            class_position = special > 0 and (square(length - special) is not None or square(length) is None)
        side = square(length - special if class_position else length)
        config["class_position"], config["image_size"] = class_position, side * patch if side else None
    return config


def usual_heads(config: Mapping[str, Any]) -> int | None:
    """The number of heads that a network of this width usually has, which no tensor tells; None for another width."""
    width = config["width"]
    if width == 1280 and config.get("position") == "rope":  # DINOv3's H+
        return 20
    if width == 1536 and config.get("mlp") == "swiglu":  # DINOv2's giant
        return 24
    return HEADS.get(width)


def square(count: int) -> int | None:
    """The side of a square of so many patches, None where there is none."""
    side = math.isqrt(max(0, count))
    return side if side and side * side == count else None


def tensors(vit: ViT) -> dict[str, Tensor]:
    """What a file holds of a ViT: its state dict without the mask token, which only pretraining needs."""
    return {name: tensor for name, tensor in vit.state_dict().items() if name != "mask_token"}


def require(vit: ViT, path: Path, whose: str, **wanted: Any) -> None:
    """Raise UserError where the ViT has an option that another library's network cannot have.

    Args:
        vit: the ViT that is to be written.
        path: the file it was to be written to.
        whose: the library's network, in words.
        **wanted: the value that an option must have, by name; a tuple holds several.
    """
    for name, value in wanted.items():
        own = getattr(vit.config, name)
        if own not in (value if isinstance(value, tuple) else (value,)):
            raise UserError(f"{path} was not written: {whose} has no {name} {own}")
