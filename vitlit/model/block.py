"""The parts of a ViT: patch embedding, attention, MLP, encoder block. B is the batch, D the width."""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitlit.model.position import Rotary, rotate

if TYPE_CHECKING:
    from vitlit.model.vit import ViTConfig

Activation = Literal["gelu", "gelu_tanh", "swiglu"]


class PatchEmbed(nn.Module):
    """A convolution whose kernel and stride are the patch size: images (B, C, H, W) -> N patches (B, N, D)."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention: (B, tokens, D) -> (B, tokens, D)."""

    def __init__(self, config: "ViTConfig") -> None:
        super().__init__()
        width, head_width = config.width, config.width // config.heads
        self.heads = config.heads
        self.attention_dropout = config.attention_dropout
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.q_norm = nn.LayerNorm(head_width, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_width, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attention_dropout if self.training else 0.0)
        return self.drop(self.proj(x.transpose(1, 2).reshape(batch, tokens, width)))


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between them and dropout after each: (B, tokens, D) -> (B, tokens, D).

    gelu is exact; gelu_tanh is its approximation (JAX's default). For swiglu (2002.05202), `fc1` has 2 * mlp_dim
    outputs: the first half, after SiLU, gates the second.
    """

    def __init__(self, width: int, mlp_dim: int, activation: Activation, dropout: float) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(width, 2 * mlp_dim if activation == "swiglu" else mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.activation == "swiglu":
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        else:
            x = F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return self.drop(self.fc2(self.drop(x)))


class LayerScale(nn.Module):
    """A learned factor per channel (2103.17239, section 2)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth (1603.09382): in training, drops a sample with probability p and divides the rest by 1 - p."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        kept = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.p
        return x * kept.to(x.dtype) / (1 - self.p)


class Block(nn.Module):
    """The block `i` of a pre-norm encoder (2010.11929, equations 2 and 3): (B, tokens, D) -> (B, tokens, D)."""

    def __init__(self, config: "ViTConfig", i: int = 0) -> None:
        super().__init__()
        width, scale = config.width, config.layer_scale
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ls1 = nn.Identity() if scale is None else LayerScale(width, scale)
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = MLP(width, config.mlp_dim, config.mlp, config.dropout)
        self.ls2 = nn.Identity() if scale is None else LayerScale(width, scale)
        rises = config.drop_path_decay == "linear"
        self.drop_path = DropPath(config.drop_path * i / max(1, config.depth - 1) if rises else config.drop_path)

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), rotary)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
