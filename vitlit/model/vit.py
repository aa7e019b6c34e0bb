"""The Vision Transformer of 2010.11929, read top to bottom.

B is the batch, C the image's channels, H and W its height and width in pixels, P the patch size, D the width,
N = (H / P)(W / P) the number of patches, S the number of prefix tokens (class, distillation, registers) before them.
Parameter names are timm's.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitlit.errors import UserError
from vitlit.model.block import Block, PatchEmbed, new_norm
from vitlit.model.config import SIZES, Resampling, ViTConfig
from vitlit.model.heads import AttentionPool, new_head
from vitlit.model.init import init_weights
from vitlit.model.position import Grid, resample, rotary2d, sincos2d


class ViT(nn.Module):
    """The Vision Transformer: images (B, C, H, W) -> logits (B, num_classes), or features (B, D) without a head.

    The forward pass is `embed` -> `encode` -> `pool` -> `head`, each callable alone. Options out of range, options that
    contradict each other and a patch size that does not divide the image raise UserError.

    Args:
        *values, **options: the fields of `ViTConfig`, in order or by name.

    Attributes:
        config: the options. `set_head` and `resampling` update it.
        grid: (rows, columns) of patches at the configured image size.
        prefix: S, the number of tokens before the patches.
        positioned: how many of these have a learned position.
        classes: class names in the order of the logits; `vitlit.load` sets them.
        temperature: what the logits are to be divided by before a softmax (1706.04599); `vitlit.load` sets it.
        activation: what makes probabilities of the logits, softmax or sigmoid; an objective and `vitlit.load` set it.
        preprocess: turns image files into input; `vitlit.load` sets it.
    """

    def __init__(self, *values: Any, **options: Any) -> None:
        super().__init__()
        self.config = config = ViTConfig(*values, **options)
        self.patch_size, self.width, self.position = config.patch_size, config.width, config.position
        self.grid = self.grid_of(*config.sides)
        self.classes: list[str] = []
        self.temperature, self.activation = 1.0, "softmax"
        self.preprocess: Callable[..., Tensor] | None = None

        def tokens(count: int) -> Tensor | None:
            return nn.Parameter(torch.empty(1, count, config.width)) if count else None

        self.patch_embed = PatchEmbed(config)
        self.cls_token = tokens(1 if config.class_token else 0)
        self.dist_token = tokens(1 if config.distilled else 0)
        self.reg_token = tokens(config.registers)
        self.mask_token: Tensor | None = None
        special = sum(token is not None for token in (self.cls_token, self.dist_token))
        self.prefix = special + config.registers
        self.positioned = special if config.position == "learned" and config.class_position else 0
        self.pos_embed: Tensor | None
        if config.position.startswith("sincos2d"):
            self.register_buffer("pos_embed", torch.empty(1, math.prod(self.grid), config.width), persistent=False)
        else:
            self.pos_embed = tokens(self.positioned + math.prod(self.grid)) if config.position == "learned" else None
        self.pos_drop = nn.Dropout(config.dropout)
        self.norm_pre = new_norm(config) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))
        final = new_norm(config) if config.final_norm else nn.Identity()
        self.norm = final if config.norm == "tokens" else nn.Identity()
        self.fc_norm = final if config.norm == "pooled" else nn.Identity()
        self.attn_pool = AttentionPool(config) if config.pool == "map" else None
        init_weights(self)
        self.set_head("pretrain" if config.hidden_dim else "finetune", config.num_classes, config.hidden_dim)

    @staticmethod
    def from_preset(preset: str, image_size: int | tuple[int, int] = 224, **options: Any) -> "ViT":
        """Build a ViT from its name in the paper's notation; UserError for another name.

        Args:
            preset: SIZE/PATCH, such as B/16: sizes Ti S M B L So400m H g G, any patch size.
            image_size: pixels, an int or (height, width).
            **options: the other fields of `ViTConfig`, such as num_classes.
        """
        name, _, patch = str(preset).partition("/")
        if name not in SIZES or not patch.isdecimal() or int(patch) == 0:
            raise UserError(f"preset {preset!r} is not SIZE/PATCH with SIZE one of {' '.join(SIZES)}, such as B/16")
        # Written out, so that jsonargparse sees which fields are left for **options.
        (width, depth, mlp_dim, heads), side = SIZES[name], int(patch)
        return ViT(
            image_size=image_size, patch_size=side, width=width, depth=depth, heads=heads, mlp_dim=mlp_dim, **options
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.outputs(images)[0]

    def outputs(self, images: Tensor, pooled: bool = True) -> tuple[Tensor, Tensor]:
        """What `forward` gives, and the pooled features (B, D) that it comes from; `pooled` as in `encode`."""
        return self.outputs_of(self.features(images, pooled))

    def outputs_of(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """`outputs` of the tokens that `features` gives: the logits, with distillation the mean of both heads'."""
        logits, distilled, features = self.heads(tokens)
        return logits if distilled is None else (logits + distilled) / 2, features

    def features(self, images: Tensor, pooled: bool = False, layers: Sequence[int] | None = None) -> Tensor:
        """The encoded tokens of images, (B, C, H, W) -> (B, S + N, D); not normalised with `norm: pooled`.

        Those of K patches, (B, S + K, D), in training with patch dropout. With `pooled` or `layers`, what `encode` then
        gives.
        """
        grid, keep = self.grid_of(*images.shape[-2:]), None
        if self.config.patch_dropout and self.pos_drop.training:
            patches = math.prod(grid)
            kept = max(1, int(patches * (1 - self.config.patch_dropout)))
            keep = torch.rand(images.shape[0], patches, device=images.device).argsort(dim=1)[:, :kept]
        return self.encode(self.embed(images, keep=keep), grid, keep, pooled, layers)

    def embed(self, images: Tensor, mask: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Prefix tokens and patches with positions (equation 1): (B, C, H, W) -> (B, S + N, D).

        The order of the tokens is class, distillation, registers, patches.

        Args:
            images: any size that the patch size divides; see also `partial_patches`.
            mask: patches to replace by the mask token before positions are added, (B, N), bool; see `add_mask_token`.
            keep: indices of the only patches to keep, (B, K), int64; the result is (B, S + K, D).
        """
        patches = self.patch_embed(images)
        if mask is not None:
            assert self.mask_token is not None, "a mask needs a mask token: call vit.add_mask_token() first"
            patches = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)
        prefix = [token for token in (self.cls_token, self.dist_token) if token is not None]
        positions = self.positions(self.grid_of(*images.shape[-2:]))
        if positions is not None:
            patches = patches + positions[:, self.positioned :]
            if self.positioned:
                prefix = [torch.cat(prefix, dim=1) + positions[:, : self.positioned]]
        if keep is not None:
            patches = patches.gather(1, keep[..., None].expand(-1, -1, self.width))
        if self.reg_token is not None:
            prefix.append(self.reg_token)
        return self.pos_drop(torch.cat([*(t.expand(patches.shape[0], -1, -1) for t in prefix), patches], dim=1))

    def encode(
        self,
        tokens: Tensor,
        grid: Grid | None = None,
        keep: Tensor | None = None,
        pooled: bool = False,
        layers: Sequence[int] | None = None,
    ) -> Tensor:
        """The norm before the blocks if there is one, the blocks, the final norm: (B, S + N, D) -> (B, S + N, D).

        Position rope needs the images' patch `grid`, by default the model's own, and the `keep` that `embed` was given.
        With `pooled`, only the tokens that `pool` and `heads` look at come out. If these are the class token and the
        distillation token, the last block computes no others, which saves most of its work. With `layers`, numbers of
        blocks from 0, or from -1 backwards, what comes out of each, through the final norm: (layers, B, S + N, D).
        """
        first = 1 + self.config.distilled if pooled and layers is None and self.config.pool == "cls" else None
        rotary = None
        if self.position == "rope":
            head_width = self.width // self.config.heads
            rotary = rotary2d(grid or self.grid, head_width, self.prefix, like=tokens, keep=keep)
        tokens = self.norm_pre(tokens)
        every = int(self.config.activation_checkpointing)
        asked_for = [range(len(self.blocks))[layer] for layer in layers or ()]
        after = {}
        for i, block in enumerate(self.blocks):
            asked = (rotary, first if i + 1 == len(self.blocks) else None)
            if every and i % every == 0 and self.training:
                tokens = checkpoint(block, tokens, *asked, use_reentrant=False)
            else:
                tokens = block(tokens, *asked)
            if i in asked_for:
                after[i] = tokens
        return self.norm(tokens if layers is None else torch.stack([after[layer] for layer in asked_for]))

    def pool(self, tokens: Tensor) -> Tensor:
        """The class token (equation 4), the mean of the patches or attention over them: (B, S + N, D) -> (B, D)."""
        if self.config.pool == "cls":
            return self.fc_norm(tokens[:, 0])
        patches = tokens if self.config.pool_prefix else tokens[:, self.prefix :]
        return self.fc_norm(patches.mean(dim=1) if self.attn_pool is None else self.attn_pool(patches))

    def heads(self, tokens: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Logits (B, num_classes) of `features`, those of the distillation token if there is one, and the pooled."""
        if self.config.float32_head and not tokens.is_meta and torch.is_autocast_enabled(tokens.device.type):
            with torch.autocast(tokens.device.type, enabled=False):
                return self.heads(tokens.float())
        distilled = None if self.head_dist is None else self.head_dist(self.fc_norm(tokens[:, 1]))
        pooled = self.pool(tokens)
        return self.head(pooled), distilled, pooled

    def grid_of(self, height: int, width: int) -> Grid:
        """The patch grid (rows, columns) of an image in pixels; UserError if the patch size does not divide it."""
        patch = self.patch_size
        if self.config.partial_patches == "refuse" and (height % patch or width % patch):
            near = " x ".join(str(max(1, round(side / patch)) * patch) for side in (height, width))
            raise UserError(f"patch size {patch} does not divide the image size {height} x {width}; {near} would do")
        return height // patch, width // patch

    def positions(self, grid: Grid) -> Tensor | None:
        """The positions that `embed` adds for a patch grid, (1, positioned + N, D), or None."""
        if self.pos_embed is None or grid == self.grid:
            return self.pos_embed
        if self.position == "learned":
            return resample(self.pos_embed, self.grid, grid, self.positioned, self.resampling)
        return sincos2d(grid, self.width, self.position).to(self.pos_embed)

    @property
    def resampling(self) -> Resampling:
        """How a learned position table is resampled to another grid. Can be set."""
        return self.config.resampling

    @resampling.setter
    def resampling(self, resampling: Resampling) -> None:
        self.config = replace(self.config, resampling=resampling)

    def set_head(self, kind: Literal["pretrain", "finetune"], num_classes: int, hidden_dim: int | None = None) -> None:
        """Replace the head (2010.11929, section 3.1), and the distillation token's if there is one.

        pretrain is Linear, tanh, Linear, with `hidden_dim` units between, by default the width; finetune is one
        zero-initialised Linear. 0 classes remove the head, and `vit(images)` gives the features.
        """
        if kind not in ("pretrain", "finetune"):
            raise UserError(f"head {kind!r} is neither 'pretrain' nor 'finetune'")
        hidden = (self.width if hidden_dim is None else hidden_dim) if kind == "pretrain" else None
        self.config = replace(self.config, num_classes=num_classes, hidden_dim=hidden)
        self.classes, self.temperature, self.activation = [], 1.0, "softmax"
        sizes, like = (self.width, hidden, num_classes), self.patch_embed.proj.weight  # for device and dtype
        self.head = new_head(*sizes).to(like)
        self.head_dist = new_head(*sizes).to(like) if self.dist_token is not None else None

    def add_mask_token(self) -> None:
        """Add the learned token that `embed` puts in place of masked patches. Weight files do not contain it."""
        self.mask_token = nn.Parameter(self.patch_embed.proj.weight.new_empty(1, 1, self.width))
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def layers(self) -> dict[str, dict[str, nn.Parameter]]:
        """The parameters by layer and name, in the order of the forward pass: embed, blocks.N, norm, head.

        The distillation head and the attention pool belong to head. Parameters added from outside are in no layer.
        """
        layers: dict[str, dict[str, nn.Parameter]]
        layers = {layer: {} for layer in ("embed", *(f"blocks.{i}" for i in range(len(self.blocks))), "norm", "head")}
        for name, parameter in self.named_parameters():
            part, _, rest = name.partition(".")
            layer = f"blocks.{rest.partition('.')[0]}" if part == "blocks" else LAYER_OF.get(part)
            if layer is not None:
                layers[layer][name] = parameter
        return layers


EMBED = ("patch_embed", "cls_token", "dist_token", "reg_token", "mask_token", "pos_embed", "norm_pre")
LAYER_OF = {
    **dict.fromkeys(EMBED, "embed"),
    **dict.fromkeys(("norm", "fc_norm"), "norm"),
    **dict.fromkeys(("attn_pool", "head", "head_dist"), "head"),
}
