"""The sizes that have names, the options of a ViT, and what they may be."""

from typing import Any, Literal, NamedTuple, TypedDict, get_args

from vitlit.errors import UserError
from vitlit.model.block import Activation
from vitlit.model.position import Resampling


class Size(NamedTuple):
    """One row of the size table."""

    width: int
    depth: int
    mlp_dim: int
    heads: int


Pool = Literal["cls", "gap", "map"]
Position = Literal["learned", "sincos2d", "sincos2d_mae", "rope", "none"]

# 2010.11929 table 1 (B, L, H), 2106.04560 table 2 (Ti, S, g, G), big_vision's decode_variant (M, So400m).
SIZES = {
    "Ti": Size(192, 12, 768, 3),
    "S": Size(384, 12, 1536, 6),
    "M": Size(512, 12, 2048, 8),
    "B": Size(768, 12, 3072, 12),
    "L": Size(1024, 24, 4096, 16),
    "So400m": Size(1152, 27, 4304, 16),
    "H": Size(1280, 32, 5120, 16),
    "g": Size(1408, 40, 6144, 16),
    "G": Size(1664, 48, 8192, 16),
}


class ViTOptions(TypedDict, total=False):
    """The options that `ViT` takes beside its size, its image size and its number of classes."""

    in_channels: int
    pool: Pool
    position: Position
    class_token: bool | None
    class_position: bool
    distilled: bool
    registers: int
    mlp: Activation
    layer_scale: float | None
    qkv_bias: bool
    qk_norm: bool
    dropout: float
    attention_dropout: float
    drop_path: float
    norm_eps: float
    norm: Literal["tokens", "pooled"]
    final_norm: bool
    resampling: Resampling
    activation_checkpointing: bool


CHOICES = {
    name: get_args(kind)
    for name, kind in (
        ("pool", Pool),
        ("position", Position),
        ("mlp", Activation),
        ("norm", Literal["tokens", "pooled"]),
        ("resampling", Resampling),
    )
}


def check(config: dict[str, Any]) -> None:
    """Raise UserError where an argument is out of range, or two contradict each other."""
    for name in ("patch_size", "width", "depth", "heads", "mlp_dim", "in_channels"):
        if config[name] < 1:
            raise UserError(f"{name} {config[name]} is less than 1")
    for name in ("dropout", "attention_dropout", "drop_path"):
        if not 0 <= config[name] < 1:
            raise UserError(f"{name} {config[name]} is not a probability below 1")
    for name, choices in CHOICES.items():
        if config[name] not in choices:
            raise UserError(f"{name} {config[name]!r} is none of {' '.join(choices)}")
    if config["norm_eps"] <= 0:
        raise UserError(f"norm_eps {config['norm_eps']} is not above 0")
    if config["registers"] < 0:
        raise UserError(f"registers {config['registers']} is less than 0")
    size = config["image_size"]
    height, breadth = (size, size) if isinstance(size, int) else size
    if min(height, breadth) < 1:
        raise UserError(f"image size {height} x {breadth} has no pixel")
    width, heads = config["width"], config["heads"]
    if width % heads:
        raise UserError(f"heads {heads} do not divide the width {width}")
    if config["position"] == "rope" and width // heads % 4:
        raise UserError(f"position rope needs heads of a multiple of 4 channels, not {width // heads}")
    if config["position"].startswith("sincos2d") and width % 4:
        raise UserError(f"position {config['position']} needs a width divisible by 4, not {width}")
    if config["pool"] == "cls" and not config["class_token"]:
        raise UserError("pool cls needs a class token; leave class_token out")
    if config["distilled"] and config["pool"] != "cls":
        raise UserError(f"a distillation token goes with pool cls, not {config['pool']}")
