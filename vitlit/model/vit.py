"""The Vision Transformer of 2010.11929, read top to bottom.

B is the batch, C the image's channels, H and W its height and width in pixels, P the patch size, D the width,
N = (H / P)(W / P) the number of patches, S the number of prefix tokens (class, distillation, registers) before them.
Parameter names are timm's.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitlit.errors import UserError
from vitlit.model.block import Activation, Block, PatchEmbed
from vitlit.model.heads import AttentionPool, linear_head, tanh_head
from vitlit.model.init import init_weights
from vitlit.model.position import Resampling, resample, rotary2d, sincos2d
from vitlit.model.sizes import parse_preset

# The layer of each part of a ViT that is not a block.
LAYER_OF = {
    **dict.fromkeys(("patch_embed", "cls_token", "dist_token", "reg_token", "mask_token", "pos_embed"), "embed"),
    **dict.fromkeys(("norm", "fc_norm"), "norm"),
    **dict.fromkeys(("attn_pool", "head", "head_dist"), "head"),
}


@dataclass(frozen=True)
class ViTConfig:
    """The options of a ViT. Contradictory or out-of-range values raise UserError."""

    image_size: int | tuple[int, int] = 224
    """Pixels, an int or (height, width). At run time another size resamples the positions."""
    patch_size: int = 16
    """Pixels. It must divide the image size."""
    width: int = 768
    """D, the size of a token."""
    depth: int = 12
    """The number of blocks."""
    heads: int = 12
    """Attention heads. They must divide the width."""
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
    position: Literal["learned", "sincos2d", "sincos2d_mae", "rope", "none"] = "learned"
    """Positions: a learned table (2010.11929), a fixed one (2205.01580), a fixed one with MAE's frequencies, rotary
    queries and keys (2508.10104), or none."""
    class_token: bool | None = None
    """Whether there is a class token. By default there is one if it is pooled."""
    class_position: bool = True
    """Whether a learned table also has positions for the class and distillation tokens."""
    distilled: bool = False
    """Whether there is a distillation token with its own head (2012.12877). The output is the mean of both heads."""
    registers: int = 0
    """The number of extra tokens without position or output (2309.16588)."""
    mlp: Activation = "gelu"
    """The MLP's nonlinearity. gelu_tanh is JAX's default; swiglu has 2 x mlp_dim channels in its first layer."""
    layer_scale: float | None = None
    """Initial value of a learned factor per channel after attention and MLP (2103.17239); None for no factor."""
    qkv_bias: bool = True
    """Whether queries, keys and values have a bias."""
    qk_norm: bool = False
    """Whether queries and keys are normalised per head (2302.05442)."""
    dropout: float = 0.0
    """Dropout after the position embedding and every linear layer except qkv (2010.11929, appendix B.1)."""
    attention_dropout: float = 0.0
    """Dropout of the attention weights."""
    drop_path: float = 0.0
    """Stochastic depth (1603.09382): the rate of the last block. It rises linearly from 0 at the first block."""
    norm_eps: float = 1e-6
    """Epsilon of every LayerNorm."""
    norm: Literal["tokens", "pooled"] = "tokens"
    """Whether the final norm is applied to the tokens or to the pooled features (2111.06377)."""
    final_norm: bool = True
    """Whether there is a final norm."""
    resampling: Resampling = "antialias"
    """How a learned table is resampled to another grid; see `vitlit.model.position.resample`."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, a third more time."""

    def __post_init__(self) -> None:
        if not isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", tuple(self.image_size))
        if self.class_token is None:
            object.__setattr__(self, "class_token", self.pool == "cls")
        if not self.num_classes:
            object.__setattr__(self, "hidden_dim", None)
        self.check()

    def check(self) -> None:
        """Raise UserError if an option is out of range, or two contradict each other."""
        options = vars(self)
        least = dict.fromkeys(("patch_size", "width", "depth", "heads", "mlp_dim", "in_channels"), 1)
        for name, smallest in {**least, "num_classes": 0, "registers": 0}.items():
            if options[name] < smallest:
                raise UserError(f"{name} {options[name]} is less than {smallest}")
        for name in ("dropout", "attention_dropout", "drop_path"):
            if not 0 <= options[name] < 1:
                raise UserError(f"{name} {options[name]} is not a probability below 1")
        for name, choices in CHOICES.items():
            if options[name] not in choices:
                raise UserError(f"{name} {options[name]!r} is none of {' '.join(choices)}")
        if self.hidden_dim is not None and self.hidden_dim < 1:
            raise UserError(f"hidden_dim {self.hidden_dim} is less than 1")
        if self.norm_eps <= 0:
            raise UserError(f"norm_eps {self.norm_eps} is not above 0")
        if min(self.sides) < 1:
            raise UserError("image size {} x {} has no pixel".format(*self.sides))
        if self.width % self.heads:
            raise UserError(f"heads {self.heads} do not divide the width {self.width}")
        if self.position == "rope" and self.width // self.heads % 4:
            raise UserError(f"position rope needs heads of a multiple of 4 channels, not {self.width // self.heads}")
        if self.position.startswith("sincos2d") and self.width % 4:
            raise UserError(f"position {self.position} needs a width divisible by 4, not {self.width}")
        if self.pool == "cls" and not self.class_token:
            raise UserError("pool cls needs a class token; leave class_token out")
        if self.distilled and self.pool != "cls":
            raise UserError(f"a distillation token goes with pool cls, not {self.pool}")

    @property
    def sides(self) -> tuple[int, int]:
        """The image's (height, width) in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    def plain(self) -> dict[str, Any]:
        """The options as values that JSON and YAML can hold: `ViT(**config.plain())` is the same network."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


# The values of each option that has a fixed set of them.
CHOICES = {name: get_args(kind) for name, kind in get_type_hints(ViTConfig).items() if get_origin(kind) is Literal}


class ViT(nn.Module):
    """The Vision Transformer: (B, C, H, W) -> logits (B, num_classes), or features (B, D) without a head.

    The forward pass is `embed` -> `encode` -> `pool` -> `head`; each can be called alone.

    Args:
        *values, **options: the fields of `ViTConfig`, in their order or by name.

    Attributes:
        config: the options. `set_head` and `resampling` update it.
        grid: (rows, columns) of patches at the configured image size.
        prefix: S, the number of tokens before the patches.
        classes: class names in the order of the logits; `vitlit.load` sets them.
        preprocess: makes input from image files; `vitlit.load` sets it.

    Raises:
        UserError: an option is out of range, two contradict each other, or the patch size does not divide the image.
    """

    def __init__(self, *values: Any, **options: Any) -> None:
        super().__init__()
        self.config = config = ViTConfig(*values, **options)
        self.patch_size, self.width, self.position = config.patch_size, config.width, config.position
        self.classes: list[str] = []
        self.preprocess: Callable[..., Tensor] | None = None
        self.grid = self.grid_of(*config.sides)

        def token(count: int) -> Tensor | None:
            return nn.Parameter(torch.empty(1, count, config.width)) if count else None

        self.patch_embed = PatchEmbed(config.patch_size, config.in_channels, config.width)
        self.cls_token = token(1 if config.class_token else 0)
        self.dist_token = token(1 if config.distilled else 0)
        self.reg_token = token(config.registers)
        self.mask_token: Tensor | None = None
        special = sum(t is not None for t in (self.cls_token, self.dist_token))
        self.prefix = special + config.registers
        self.positioned = special if config.position == "learned" and config.class_position else 0
        self.pos_embed: Tensor | None
        if config.position.startswith("sincos2d"):
            self.register_buffer("pos_embed", torch.empty(1, math.prod(self.grid), config.width), persistent=False)
        else:
            self.pos_embed = token(self.positioned + math.prod(self.grid)) if config.position == "learned" else None
        self.pos_drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(config, drop_path=config.drop_path * i / max(1, config.depth - 1)) for i in range(config.depth)
        )
        final: nn.Module = nn.LayerNorm(config.width, eps=config.norm_eps) if config.final_norm else nn.Identity()
        self.norm = final if config.norm == "tokens" else nn.Identity()
        self.fc_norm = final if config.norm == "pooled" else nn.Identity()
        self.attn_pool = AttentionPool(config) if config.pool == "map" else None
        init_weights(self)
        self.head: nn.Module
        self.head_dist: nn.Module | None
        self.set_head("pretrain" if config.hidden_dim else "finetune", config.num_classes, config.hidden_dim)

    @staticmethod
    def from_preset(preset: str, image_size: int | tuple[int, int] = 224, **options: Any) -> "ViT":
        """Build a ViT from its name in the paper's notation.

        Args:
            preset: size/patch, such as B/16: sizes Ti S M B L So400m H g G, any patch size.
            image_size: pixels, an int or (height, width).
            **options: the other fields of `ViTConfig`, such as num_classes.

        Raises:
            UserError: the preset is not of that form or names no size in the table.
        """
        (width, depth, mlp_dim, heads), patch = parse_preset(preset)
        return ViT(
            image_size=image_size, patch_size=patch, width=width, depth=depth, heads=heads, mlp_dim=mlp_dim, **options
        )

    @property
    def resampling(self) -> Resampling:
        """How a learned position table is resampled to another grid; it may be set."""
        return self.config.resampling

    @resampling.setter
    def resampling(self, resampling: Resampling) -> None:
        self.config = replace(self.config, resampling=resampling)

    def set_head(self, kind: Literal["pretrain", "finetune"], num_classes: int, hidden_dim: int | None = None) -> None:
        """Replace the head (2010.11929, section 3.1), and the head of the distillation token if there is one.

        Args:
            kind: pretrain is Linear, tanh, Linear; finetune is one zero-initialised Linear.
            num_classes: outputs; 0 removes the head, and `vit(images)` gives the features.
            hidden_dim: hidden units of the pretraining head; by default the width.
        """
        if kind not in ("pretrain", "finetune"):
            raise UserError(f"head {kind!r} is neither 'pretrain' nor 'finetune'")
        hidden = (self.width if hidden_dim is None else hidden_dim) if kind == "pretrain" else None
        self.config = replace(self.config, num_classes=num_classes, hidden_dim=hidden)
        if len(self.classes) != num_classes:
            self.classes = []

        def head() -> nn.Module:
            if num_classes == 0:
                return nn.Identity()
            made = tanh_head(self.width, hidden, num_classes) if hidden else linear_head(self.width, num_classes)
            return made.to(self.patch_embed.proj.weight)  # its device and dtype

        self.head = head()
        self.head_dist = head() if self.dist_token is not None else None

    def add_mask_token(self) -> None:
        """Add the learned token that `embed` puts in place of masked patches. Weight files do not contain it."""
        self.mask_token = nn.Parameter(self.patch_embed.proj.weight.new_empty(1, 1, self.width))
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def layers(self) -> dict[str, dict[str, nn.Parameter]]:
        """The parameters by name, layer by layer in the order of the forward pass: embed, blocks.N, norm, head.

        The distillation head and the attention pool count as head. A parameter of none of these parts is in no layer.
        """
        found: dict[str, dict[str, nn.Parameter]] = {"embed": {}}
        found |= {f"blocks.{i}": {} for i in range(len(self.blocks))} | {"norm": {}, "head": {}}
        for name, parameter in self.named_parameters():
            part, number = (*name.split("."), "")[:2]
            layer = f"blocks.{number}" if part == "blocks" else LAYER_OF.get(part)
            if layer is not None:
                found[layer][name] = parameter
        return found

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """The patch grid (rows, columns) of an image, in patches; UserError where the patch size does not divide it."""
        if height % self.patch_size or width % self.patch_size:
            near = " x ".join(str(max(1, round(side / self.patch_size)) * self.patch_size) for side in (height, width))
            raise UserError(
                f"patch size {self.patch_size} does not divide the image size {height} x {width}; {near} would do"
            )
        return height // self.patch_size, width // self.patch_size

    def positions(self, grid: tuple[int, int]) -> Tensor | None:
        """What is added to the tokens of a patch grid, (1, N, D), or (1, 1 + N, D) with the class token's; or None."""
        if self.pos_embed is None or grid == self.grid:
            return self.pos_embed
        if self.position == "learned":
            return resample(self.pos_embed, self.grid, grid, self.positioned, self.resampling)
        return sincos2d(grid, self.width, self.position).to(self.pos_embed)

    def embed(self, images: Tensor, mask: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Patches, positions and prefix tokens (equation 1): (B, C, H, W) -> (B, S + N, D).

        The tokens are class, distillation, registers, patches.

        Args:
            images: of any size that the patch size divides.
            mask: patches that the mask token replaces before positions are added, (B, N), bool; see `add_mask_token`.
            keep: indices of the only patches to keep, (B, K), int64; the result is (B, S + K, D).
        """
        patches = self.patch_embed(images)
        if mask is not None:
            assert self.mask_token is not None, "a mask needs a mask token: call vit.add_mask_token() first"
            patches = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)
        positions = self.positions(self.grid_of(*images.shape[-2:]))
        prefix = [t for t in (self.cls_token, self.dist_token) if t is not None]
        if positions is not None:
            patches = patches + positions[:, self.positioned :]
        if keep is not None:
            patches = patches.gather(1, keep[..., None].expand(-1, -1, self.width))
        if positions is not None and self.positioned:
            prefix = [torch.cat(prefix, dim=1) + positions[:, : self.positioned]]
        if self.reg_token is not None:
            prefix.append(self.reg_token)
        return self.pos_drop(torch.cat([*(t.expand(patches.shape[0], -1, -1) for t in prefix), patches], dim=1))

    def encode(self, tokens: Tensor, grid: tuple[int, int] | None = None, keep: Tensor | None = None) -> Tensor:
        """The blocks and the final norm: (B, S + N, D) -> (B, S + N, D).

        Args:
            tokens: the result of `embed`.
            grid: the images' patch grid, for position rope; by default the model's own.
            keep: the indices given to `embed`, for position rope.
        """
        rotary = None
        if self.position == "rope":
            head_width = self.width // self.config.heads
            rotary = rotary2d(grid or self.grid, head_width, self.prefix, like=tokens, keep=keep)
        for block in self.blocks:
            if self.config.activation_checkpointing and self.training:
                tokens = checkpoint(block, tokens, rotary, use_reentrant=False)
            else:
                tokens = block(tokens, rotary)
        return self.norm(tokens)

    def features(self, images: Tensor) -> Tensor:
        """The tokens of images, normalised unless the norm is over what is pooled: (B, C, H, W) -> (B, S + N, D)."""
        return self.encode(self.embed(images), self.grid_of(*images.shape[-2:]))

    def pool(self, tokens: Tensor) -> Tensor:
        """The class token (equation 4), the mean of the patches or attention over them: (B, S + N, D) -> (B, D)."""
        if self.config.pool == "cls":
            return self.fc_norm(tokens[:, 0])
        patches = tokens[:, self.prefix :]
        return self.fc_norm(patches.mean(dim=1) if self.attn_pool is None else self.attn_pool(patches))

    def heads(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the head makes of `features`, (B, num_classes), and the distillation token's head where there is one."""
        output = self.head(self.pool(tokens))
        return output, None if self.head_dist is None else self.head_dist(self.fc_norm(tokens[:, 1]))

    def forward(self, images: Tensor) -> Tensor:
        output, follower = self.heads(self.features(images))
        return output if follower is None else (output + follower) / 2
