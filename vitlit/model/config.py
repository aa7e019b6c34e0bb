"""The options of a ViT, and its named sizes."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from vitlit.errors import UserError, check_range, check_types

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"]
Init = Literal["vision_transformer", "big_vision", "timm"]
Resampling = Literal["antialias", "bicubic", "bilinear", "offset"]


@dataclass(frozen=True)
class ViTConfig:
    """The options of a ViT. Values that contradict each other or are out of range raise UserError."""

    image_size: int | tuple[int, int] = 224
    """Pixels, an int or (height, width). Images of another size resample the positions."""
    patch_size: int = 16
    """Pixels. Must divide the image size, unless partial_patches says otherwise."""
    width: int = 768
    """D, the size of a token."""
    depth: int = 12
    """The number of blocks."""
    heads: int = 12
    """Attention heads. Must divide the width."""
    mlp_dim: int = 3072
    """Hidden units of a block's MLP."""
    num_classes: int = 0
    """Outputs of the head; 0 for no head."""
    hidden_dim: int | None = None
    """Hidden units of the pretraining head; None for the single linear layer of finetuning."""
    in_channels: int = 3
    """C."""
    pool: Literal["cls", "gap", "map"] = "cls"
    """What the head sees: the class token, the mean of the patches, or attention over them (2106.04560)."""
    pool_prefix: bool = False
    """Whether pools gap and map also see the tokens before the patches."""
    position: Literal["learned", "sincos2d", "sincos2d_mae", "rope", "none"] = "learned"
    """A learned table (2010.11929), a fixed one (2205.01580), a fixed one with MAE's frequencies, rotary queries and
    keys (2508.10104), or no positions."""
    class_token: bool | None = None
    """Whether there is a class token. By default only with pool cls."""
    class_position: bool = True
    """Whether a learned table also has positions for the class and distillation tokens."""
    distilled: bool = False
    """Whether there is a distillation token with its own head (2012.12877). The output is the mean of both heads."""
    registers: int = 0
    """Extra tokens without position or output (2309.16588)."""
    mlp: Activation = "gelu"
    """The MLP's nonlinearity. gelu_tanh is JAX's default, quick_gelu OpenAI's in CLIP; swiglu doubles fc1's outputs."""
    patch_bias: bool = True
    """Whether the patch embedding has a bias; CLIP's has none."""
    patch_norm: bool = False
    """Whether patches are normalised before positions are added (AIMv2, 2411.14402)."""
    pre_norm: bool = False
    """Whether all tokens are normalised before the first block (CLIP, 2103.00020)."""
    sub_norm: bool = False
    """Whether the input of the last layer of attention and MLP is normalised (2210.06423, BEiT-3)."""
    layer_scale: float | None = None
    """Initial value of a learned factor per channel after attention and MLP (2103.17239); None for no factor."""
    qkv_bias: bool = True
    """Whether queries, keys and values have a bias."""
    proj_bias: bool = True
    """Whether the other linear layers of a block have a bias."""
    qk_norm: bool = False
    """Whether queries and keys are normalised per head (2302.05442)."""
    dropout: float = 0.0
    """Dropout after the position embedding and every linear layer except qkv (2010.11929, appendix B.1)."""
    attention_dropout: float = 0.0
    """Dropout of the attention weights."""
    drop_path: float = 0.0
    """Stochastic depth (1603.09382): the rate of the last block."""
    drop_path_decay: Literal["linear", "constant"] = "linear"
    """Whether that rate is reached linearly from 0 at the first block, or is every block's (DeiT III)."""
    drop_path_subset: bool = False
    """Whether a block drops a fixed number of samples, uncomputed (2304.07193, section 5), not each by chance."""
    patch_dropout: float = 0.0
    """The share of the patches that training leaves out, at random in each image (2208.07220)."""
    init: Init = "vision_transformer"
    """Whose initial weights; see `vitlit.model.init.init_weights`."""
    float32_head: bool = False
    """Whether pooling and head compute in float32 under mixed precision too, as DINOv2's linear probe does."""
    norm_eps: float = 1e-6
    """Epsilon of every norm."""
    norm_kind: Literal["layernorm", "rmsnorm"] = "layernorm"
    """LayerNorm, or RMSNorm (1910.07467), which has no bias and subtracts no mean."""
    norm: Literal["tokens", "pooled"] = "tokens"
    """Whether the final norm is applied to the tokens or to the pooled features (2111.06377)."""
    final_norm: bool = True
    """Whether there is a final norm."""
    partial_patches: Literal["refuse", "drop"] = "refuse"
    """Whether images that the patch size does not divide are refused, or lose the patches that edges cut (timm)."""
    resampling: Resampling = "antialias"
    """How a learned table is resampled to another grid; see `vitlit.model.position.resample`."""
    activation_checkpointing: bool | int = False
    """Recompute each block, or every so many-th, in the backward pass: less memory, up to a third more time."""

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        if not isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", tuple(self.image_size))
        if self.class_token is None:
            object.__setattr__(self, "class_token", self.pool == "cls")
        if not self.num_classes:
            object.__setattr__(self, "hidden_dim", None)
        check_range("ViT", 1, **{name: getattr(self, name) for name in COUNTS}, image_size=min(self.sides))
        check_range("ViT", 0, num_classes=self.num_classes, registers=self.registers)
        check_range("ViT", 0, activation_checkpointing=self.activation_checkpointing)
        for name in DROPOUTS:
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is not a probability below 1")
        if self.width % self.heads:
            raise UserError(f"heads {self.heads} do not divide the width {self.width}")
        if self.position == "rope" and self.width // self.heads % 4:
            raise UserError(f"position rope needs heads of a multiple of 4 channels, not {self.width // self.heads}")
        if self.position.startswith("sincos2d") and self.width % 4:
            raise UserError(f"position {self.position} needs a width divisible by 4, not {self.width}")
        if self.pool == "cls" and not self.class_token:
            raise UserError("pool cls needs a class token; leave class_token out")
        if self.pool_prefix and self.pool == "cls":
            raise UserError("pool_prefix needs pool gap or map, not cls")
        if self.distilled and self.pool != "cls":
            raise UserError(f"a distillation token needs pool cls, not {self.pool}")

    @property
    def sides(self) -> tuple[int, int]:
        """The image's (height, width) in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    def plain(self) -> dict[str, Any]:
        """The options as values that JSON and YAML can hold. `ViT(**config.plain())` is the same network."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


DROPOUTS = ("dropout", "attention_dropout", "drop_path", "patch_dropout")
COUNTS = ("patch_size", "width", "depth", "heads", "mlp_dim", "in_channels", "hidden_dim")


class Size(NamedTuple):
    width: int
    depth: int
    mlp_dim: int
    heads: int


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
