"""The Vision Transformer of 2010.11929, read top to bottom.

B is the batch, C the image's channels, H and W its height and width in pixels, P the patch size, D the width,
N = (H / P)(W / P) the number of patches, S the number of prefix tokens (class, distillation, registers) before them.
Parameter names are timm's.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitlit.errors import UserError
from vitlit.model.block import Activation, Block
from vitlit.model.heads import AttentionPool, linear_head, tanh_head
from vitlit.model.init import init_weights
from vitlit.model.options import SIZES, Pool, Position, ViTOptions, check
from vitlit.model.position import Resampling, resample, rotary2d, sincos2d

# The layer of each part of a ViT that is not a block.
LAYER_OF = {
    **dict.fromkeys(("patch_embed", "cls_token", "dist_token", "reg_token", "pos_embed"), "embed"),
    **dict.fromkeys(("norm", "fc_norm"), "norm"),
    **dict.fromkeys(("attn_pool", "head", "head_dist"), "head"),
}


class PatchEmbed(nn.Module):
    """A convolution whose kernel and stride are the patch size: (B, C, H, W) -> (B, N, D)."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """The Vision Transformer: (B, C, H, W) -> logits (B, num_classes), or features (B, D) without a head.

    The forward pass is `embed` -> `encode` -> `pool` -> `head`, each of which can be called alone. `config` holds
    every constructor argument as a plain value: `ViT(**vit.config)` is the same network. `classes` and `preprocess`
    are filled by `vitlit.load`.

    Args:
        image_size: pixels, an int or (height, width); another one at run time resamples the positions.
        patch_size: pixels; must divide the image size.
        width: D, the size of a token.
        depth: the number of blocks.
        heads: attention heads; must divide the width.
        mlp_dim: hidden units of a block's MLP.
        num_classes: outputs of the head; 0 for none.
        hidden_dim: hidden units of the pretraining head; None for the one linear layer of finetuning.
        in_channels: C.
        pool: what the head sees: cls is the class token, gap the mean of the patches, map an attention pool over the
            patches (2106.04560).
        position: learned is one table (2010.11929); sincos2d is fixed (2205.01580), sincos2d_mae likewise with MAE's
            frequencies; rope turns queries and keys by the patch's place (2508.10104); none.
        class_token: whether there is one; by default where it is pooled.
        class_position: whether a learned table has positions for the class and distillation tokens, too.
        distilled: whether there is a distillation token, with a head of its own (2012.12877); the output is the mean of
            the two.
        registers: further tokens without a position or an output (2309.16588).
        mlp: the MLP's nonlinearity; gelu_tanh is JAX's default, swiglu has 2 x mlp_dim channels in its first layer.
        layer_scale: the initial value of a learned factor by channel after attention and MLP (2103.17239), or None.
        qkv_bias: whether queries, keys and values have a bias.
        qk_norm: whether queries and keys are normalised by head (2302.05442).
        dropout: after the position embedding and every linear layer but qkv (2010.11929, appendix B.1).
        attention_dropout: on the attention weights.
        drop_path: stochastic depth (1603.09382): the last block's share, rising linearly from 0 at the first.
        norm_eps: epsilon of every LayerNorm.
        norm: whether the final norm is over the tokens, or over what was pooled of them (2111.06377).
        final_norm: whether there is a final norm.
        resampling: how a learned table is brought to another grid; see `vitlit.model.position.resample`.
        activation_checkpointing: compute each block anew in the backward pass: less memory, a third more time.

    Raises:
        UserError: the patch size does not divide the image, the heads do not divide the width, a number is out of
            range, or two options contradict each other.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_dim: int = 3072,
        num_classes: int = 0,
        hidden_dim: int | None = None,
        in_channels: int = 3,
        pool: Pool = "cls",
        position: Position = "learned",
        class_token: bool | None = None,
        class_position: bool = True,
        distilled: bool = False,
        registers: int = 0,
        mlp: Activation = "gelu",
        layer_scale: float | None = None,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        norm: Literal["tokens", "pooled"] = "tokens",
        final_norm: bool = True,
        resampling: Resampling = "antialias",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        height, breadth = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.config: dict[str, Any] = {
            "image_size": image_size if isinstance(image_size, int) else [height, breadth],
            "patch_size": patch_size,
            "width": width,
            "depth": depth,
            "heads": heads,
            "mlp_dim": mlp_dim,
            "in_channels": in_channels,
            "pool": pool,
            "position": position,
            "class_token": pool == "cls" if class_token is None else class_token,
            "class_position": class_position,
            "distilled": distilled,
            "registers": registers,
            "mlp": mlp,
            "layer_scale": layer_scale,
            "qkv_bias": qkv_bias,
            "qk_norm": qk_norm,
            "dropout": dropout,
            "attention_dropout": attention_dropout,
            "drop_path": drop_path,
            "norm_eps": norm_eps,
            "norm": norm,
            "final_norm": final_norm,
            "resampling": resampling,
            "activation_checkpointing": activation_checkpointing,
        }
        check(self.config)
        self.patch_size, self.width = patch_size, width
        self.pooling, self.position = pool, position
        self.activation_checkpointing = activation_checkpointing
        self.classes: list[str] = []
        self.preprocess: Callable[..., Tensor] | None = None
        self.grid = self.grid_of(height, breadth)

        def token(count: int) -> Tensor | None:
            return nn.Parameter(torch.empty(1, count, width)) if count else None

        self.patch_embed = PatchEmbed(patch_size, in_channels, width)
        self.cls_token = token(1 if self.config["class_token"] else 0)
        self.dist_token = token(1 if distilled else 0)
        self.reg_token = token(registers)
        special = sum(t is not None for t in (self.cls_token, self.dist_token))
        self.prefix = special + registers
        self.positioned = special if position == "learned" and class_position else 0
        self.pos_embed: Tensor | None
        if position.startswith("sincos2d"):
            self.register_buffer("pos_embed", torch.empty(1, math.prod(self.grid), width), persistent=False)
        else:
            self.pos_embed = token(self.positioned + math.prod(self.grid)) if position == "learned" else None
        self.pos_drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                mlp_dim,
                qkv_bias=qkv_bias,
                qk_norm=qk_norm,
                mlp=mlp,
                layer_scale=layer_scale,
                dropout=dropout,
                attention_dropout=attention_dropout,
                drop_path=drop_path * i / max(1, depth - 1),
                norm_eps=norm_eps,
            )
            for i in range(depth)
        )
        final: nn.Module = nn.LayerNorm(width, eps=norm_eps) if final_norm else nn.Identity()
        self.norm = final if norm == "tokens" else nn.Identity()
        self.fc_norm = final if norm == "pooled" else nn.Identity()
        self.attn_pool = AttentionPool(width, heads, mlp_dim, mlp, norm_eps) if pool == "map" else None
        init_weights(self)
        self.head: nn.Module
        self.head_dist: nn.Module | None
        self.set_head("pretrain" if num_classes and hidden_dim else "finetune", num_classes, hidden_dim)

    @property
    def resampling(self) -> Resampling:
        """How a learned position table is brought to another grid; it may be set."""
        convention: Resampling = self.config["resampling"]
        return convention

    @resampling.setter
    def resampling(self, convention: Resampling) -> None:
        self.config["resampling"] = convention
        check(self.config)

    @classmethod
    def from_preset(
        cls,
        preset: str,
        image_size: int | tuple[int, int] = 224,
        num_classes: int = 0,
        **options: Unpack[ViTOptions],
    ) -> "ViT":
        """Build a ViT from its name in the paper's notation.

        Args:
            preset: size/patch, such as B/16: sizes Ti S M B L So400m H g G, any patch size.
            image_size: pixels, an int or (height, width).
            num_classes: outputs of the linear head; 0 for none.
            **options: what `ViT` takes beside these.

        Raises:
            UserError: the preset is not of that form or names no size in the table.
        """
        name, _, patch = preset.partition("/")
        if name not in SIZES or not patch.isdecimal() or int(patch) == 0:
            raise UserError(f"preset {preset!r} is not SIZE/PATCH with SIZE one of {' '.join(SIZES)}, such as B/16")
        size = SIZES[name]._asdict()
        return cls(image_size, int(patch), num_classes=num_classes, **size, **options)

    def set_head(self, kind: Literal["pretrain", "finetune"], num_classes: int, hidden_dim: int | None = None) -> None:
        """Replace the head (2010.11929, section 3.1), and that of the distillation token where there is one.

        Args:
            kind: pretrain is Linear, tanh, Linear; finetune is one zero-initialised Linear.
            num_classes: outputs; 0 removes the head, and `vit(images)` gives the features.
            hidden_dim: hidden units of the pretraining head; the width unless given.
        """
        if kind not in ("pretrain", "finetune"):
            raise UserError(f"head {kind!r} is neither 'pretrain' nor 'finetune'")
        if num_classes < 0:
            raise UserError(f"num_classes {num_classes} is less than 0")
        if hidden_dim is not None and hidden_dim < 1:
            raise UserError(f"hidden_dim {hidden_dim} is less than 1")
        hidden_dim = (hidden_dim or self.width) if kind == "pretrain" and num_classes else None
        self.config.update(num_classes=num_classes, hidden_dim=hidden_dim)
        if len(self.classes) != num_classes:
            self.classes = []

        def head() -> nn.Module:
            if num_classes == 0:
                return nn.Identity()
            made = (
                tanh_head(self.width, hidden_dim, num_classes) if hidden_dim else linear_head(self.width, num_classes)
            )
            return made.to(self.patch_embed.proj.weight)  # its device and dtype

        self.head = head()
        self.head_dist = head() if self.dist_token is not None else None

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

    def embed(self, images: Tensor) -> Tensor:
        """Patches, positions and prefix tokens (equation 1): (B, C, H, W) -> (B, S + N, D).

        The tokens are class, distillation, registers, patches.
        """
        patches = self.patch_embed(images)
        positions = self.positions(self.grid_of(*images.shape[-2:]))
        prefix = [t for t in (self.cls_token, self.dist_token) if t is not None]
        if positions is not None:
            patches = patches + positions[:, self.positioned :]
        if positions is not None and self.positioned:
            prefix = [torch.cat(prefix, dim=1) + positions[:, : self.positioned]]
        if self.reg_token is not None:
            prefix.append(self.reg_token)
        return self.pos_drop(torch.cat([*(t.expand(patches.shape[0], -1, -1) for t in prefix), patches], dim=1))

    def encode(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """The blocks and the final norm: (B, S + N, D) -> (B, S + N, D).

        Args:
            tokens: of `embed`.
            grid: their patch grid, for position rope; the model's own unless given.
        """
        rotary = None
        if self.position == "rope":
            head_width = self.width // self.config["heads"]
            rotary = rotary2d(grid or self.grid, head_width, self.prefix, like=tokens)
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                tokens = checkpoint(block, tokens, rotary, use_reentrant=False)
            else:
                tokens = block(tokens, rotary)
        return self.norm(tokens)

    def features(self, images: Tensor) -> Tensor:
        """The tokens of images, normalised unless the norm is over what is pooled: (B, C, H, W) -> (B, S + N, D)."""
        return self.encode(self.embed(images), self.grid_of(*images.shape[-2:]))

    def pool(self, tokens: Tensor) -> Tensor:
        """The class token (equation 4), the mean of the patches or attention over them: (B, S + N, D) -> (B, D)."""
        if self.pooling == "cls":
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
