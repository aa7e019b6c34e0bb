"""The Vision Transformer of 2010.11929, read top to bottom.

B is the batch, C the image's channels, H and W its height and width in pixels, P the patch size, D the width,
N = (H / P)(W / P) the number of patches. Parameter names are timm's.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitlit.errors import UserError
from vitlit.model.heads import linear_head, tanh_head
from vitlit.model.position import resample


class Size(NamedTuple):
    """One row of the size table."""

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


class ViTOptions(TypedDict, total=False):
    """The options that `ViT` takes beside its size, its image size and its number of classes."""

    in_channels: int
    qkv_bias: bool
    dropout: float
    attention_dropout: float
    norm_eps: float
    final_norm: bool


class PatchEmbed(nn.Module):
    """A convolution whose kernel and stride are the patch size: (B, C, H, W) -> (B, N, D)."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention: (B, tokens, D) -> (B, tokens, D)."""

    def __init__(self, width: int, heads: int, qkv_bias: bool, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attention_dropout if self.training else 0.0)
        return self.drop(self.proj(x.transpose(1, 2).reshape(batch, tokens, width)))


class MLP(nn.Module):
    """Two linear layers with GELU between them and dropout after each: (B, tokens, D) -> (B, tokens, D)."""

    def __init__(self, width: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """A pre-norm encoder block (equations 2 and 3): (B, tokens, D) -> (B, tokens, D)."""

    def __init__(self, size: Size, qkv_bias: bool, dropout: float, attention_dropout: float, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size.width, eps=norm_eps)
        self.attn = Attention(size.width, size.heads, qkv_bias, dropout, attention_dropout)
        self.norm2 = nn.LayerNorm(size.width, eps=norm_eps)
        self.mlp = MLP(size.width, size.mlp_dim, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """The Vision Transformer: (B, C, H, W) -> logits (B, num_classes), or features (B, D) without a head.

    The forward pass is `embed` -> `encode` -> `pool` -> `head`, each of which can be called alone. `config` holds
    every constructor argument as a plain value: `ViT(**vit.config)` is the same network. `classes` and `preprocess`
    are filled by `vitlit.load`.

    Args:
        image_size: pixels, an int or (height, width).
        patch_size: pixels; must divide the image size.
        width: D, the size of a token.
        depth: the number of blocks.
        heads: attention heads; must divide the width.
        mlp_dim: hidden units of a block's MLP.
        num_classes: outputs of the head; 0 for none.
        hidden_dim: hidden units of the pretraining head; None for the one linear layer of finetuning.
        in_channels: C.
        qkv_bias: whether queries, keys and values have a bias.
        dropout: after the position embedding and every linear layer but qkv (2010.11929, appendix B.1).
        attention_dropout: on the attention weights.
        norm_eps: epsilon of every LayerNorm.
        final_norm: whether a LayerNorm ends the encoder.

    Raises:
        UserError: the patch size does not divide the image, the heads do not divide the width, or a number is out of
            range.
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
        qkv_bias: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        norm_eps: float = 1e-6,
        final_norm: bool = True,
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
            "qkv_bias": qkv_bias,
            "dropout": dropout,
            "attention_dropout": attention_dropout,
            "norm_eps": norm_eps,
            "final_norm": final_norm,
        }
        for name in ("patch_size", "width", "depth", "heads", "mlp_dim", "in_channels"):
            if self.config[name] < 1:
                raise UserError(f"{name} {self.config[name]} is less than 1")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= self.config[name] < 1:
                raise UserError(f"{name} {self.config[name]} is not a probability below 1")
        if min(height, breadth) < 1:
            raise UserError(f"image size {height} x {breadth} has no pixel")
        if width % heads:
            raise UserError(f"heads {heads} do not divide the width {width}")
        self.patch_size = patch_size
        self.width = width
        self.classes: list[str] = []
        self.preprocess: Callable[..., Tensor] | None = None
        self.grid = self.grid_of(height, breadth)

        self.patch_embed = PatchEmbed(patch_size, in_channels, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid[0] * self.grid[1], width))
        self.pos_drop = nn.Dropout(dropout)
        size = Size(width, depth, mlp_dim, heads)
        self.blocks = nn.ModuleList(Block(size, qkv_bias, dropout, attention_dropout, norm_eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=norm_eps) if final_norm else nn.Identity()
        init_weights(self)
        self.head: nn.Module
        if num_classes and hidden_dim is not None:
            self.set_head("pretrain", num_classes, hidden_dim)
        else:
            self.set_head("finetune", num_classes)

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
        """Replace the head (2010.11929, section 3.1).

        Args:
            kind: pretrain is Linear, tanh, Linear; finetune is one zero-initialised Linear.
            num_classes: outputs; 0 removes the head, and `vit(images)` gives the features.
            hidden_dim: hidden units of the pretraining head; the width unless given.
        """
        if kind not in ("pretrain", "finetune"):
            raise UserError(f"head {kind!r} is neither 'pretrain' nor 'finetune'")
        hidden_dim = (hidden_dim or self.width) if kind == "pretrain" and num_classes else None
        self.config.update(num_classes=num_classes, hidden_dim=hidden_dim)
        if num_classes == 0:
            self.head = nn.Identity()
        elif hidden_dim is not None:
            self.head = tanh_head(self.width, hidden_dim, num_classes)
        else:
            self.head = linear_head(self.width, num_classes)
        self.head.to(self.cls_token)  # its device and dtype

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """The patch grid (rows, columns) of an image, in patches; UserError where the patch size does not divide it."""
        if height % self.patch_size or width % self.patch_size:
            raise UserError(f"patch size {self.patch_size} does not divide the image size {height} x {width}")
        return height // self.patch_size, width // self.patch_size

    def embed(self, images: Tensor) -> Tensor:
        """Patches, class token and positions (equation 1): (B, C, H, W) -> (B, 1 + N, D).

        At another size than the model's the position table is resampled.
        """
        positions = resample(self.pos_embed, self.grid, self.grid_of(*images.shape[-2:]))
        patches = self.patch_embed(images)
        tokens = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        return self.pos_drop(tokens + positions)

    def encode(self, tokens: Tensor) -> Tensor:
        """The blocks and the final norm: (B, 1 + N, D) -> (B, 1 + N, D)."""
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def features(self, images: Tensor) -> Tensor:
        """The normalised tokens of images: (B, C, H, W) -> (B, 1 + N, D)."""
        return self.encode(self.embed(images))

    def pool(self, tokens: Tensor) -> Tensor:
        """The class token (equation 4): (B, 1 + N, D) -> (B, D)."""
        return tokens[:, 0]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pool(self.features(images)))


@torch.no_grad()
def init_weights(vit: ViT) -> None:
    """Initialise all but the head as google-research/vision_transformer does (`models_vit.py`).

    Queries, keys and values are three Xavier-uniform matrices: one draw over the fused matrix would have the wrong
    fan.
    """
    patches = vit.patch_embed.proj
    lecun = math.sqrt(1 / math.prod(patches.weight.shape[1:])) / 0.87962566103423978  # std of N(0, 1) cut at 2
    nn.init.trunc_normal_(patches.weight, std=lecun, a=-2 * lecun, b=2 * lecun)
    if patches.bias is not None:
        nn.init.zeros_(patches.bias)
    nn.init.zeros_(vit.cls_token)
    nn.init.trunc_normal_(vit.pos_embed, std=0.02)
    for module in vit.blocks.modules():
        if isinstance(module, Attention):
            for matrix in module.qkv.weight.chunk(3):
                nn.init.xavier_uniform_(matrix)
            nn.init.xavier_uniform_(module.proj.weight)
            for bias in (module.qkv.bias, module.proj.bias):
                if bias is not None:
                    nn.init.zeros_(bias)
        elif isinstance(module, MLP):
            for layer in (module.fc1, module.fc2):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.normal_(layer.bias, std=1e-6)
