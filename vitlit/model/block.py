"""The parts of a ViT: patch embedding, attention, MLP, encoder block. B is the batch, D the width."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitlit.model.config import ViTConfig
from vitlit.model.position import Rotary, rotate


class RMSNorm(nn.RMSNorm):
    """torch's, in the precision of its weight under mixed precision, as LayerNorm is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def new_norm(config: ViTConfig, width: int | None = None) -> nn.Module:
    """The norm that `norm_kind` names, over D channels or another number of them."""
    kind = RMSNorm if config.norm_kind == "rmsnorm" else nn.LayerNorm
    return kind(width or config.width, eps=config.norm_eps)


class PatchEmbed(nn.Module):
    """A convolution whose kernel and stride are the patch size: images (B, C, H, W) -> N patches (B, N, D)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.width, patch, stride=patch, bias=config.patch_bias)
        self.norm = new_norm(config) if config.patch_norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.proj(images).flatten(2).transpose(1, 2))


class Attention(nn.Module):
    """Multi-head self-attention: (B, tokens, D) -> (B, tokens, D), or of the `first` tokens alone to all."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width, head_width = config.width, config.width // config.heads
        self.heads = config.heads
        self.attention_dropout = config.attention_dropout
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.q_norm = new_norm(config, head_width) if config.qk_norm else nn.Identity()
        self.k_norm = new_norm(config, head_width) if config.qk_norm else nn.Identity()
        self.norm = new_norm(config) if config.sub_norm else nn.Identity()
        self.proj = nn.Linear(width, width, bias=config.proj_bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: Rotary | None = None, first: int | None = None) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        dropout = self.attention_dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q[:, :, :first], k, v, dropout_p=dropout)
        return self.drop(self.proj(self.norm(x.transpose(1, 2).reshape(batch, -1, width))))


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between them and dropout after each: (B, tokens, D) -> (B, tokens, D).

    gelu is exact; gelu_tanh (JAX's default) and quick_gelu, x sigmoid(1.702 x), approximate it. For swiglu (2002.05202)
    `fc1` has 2 * mlp_dim outputs: the first half, after SiLU, gates the second. `norm` is applied before `fc2`.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width, mlp_dim = config.width, config.mlp_dim
        self.activation = config.mlp
        self.fc1 = nn.Linear(width, 2 * mlp_dim if config.mlp == "swiglu" else mlp_dim, bias=config.proj_bias)
        self.norm = new_norm(config, mlp_dim) if config.sub_norm else nn.Identity()
        self.fc2 = nn.Linear(mlp_dim, width, bias=config.proj_bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.activation == "swiglu":
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        elif self.activation == "quick_gelu":
            x = x * torch.sigmoid(1.702 * x)
        else:
            x = F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return self.drop(self.fc2(self.norm(self.drop(x))))


class LayerScale(nn.Module):
    """A learned factor per channel (2103.17239, section 2)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """The block `i` of a pre-norm encoder (2010.11929, equations 2 and 3): (B, tokens, D) -> (B, tokens, D).

    With `first`, only so many tokens come out, and for the others no more is computed than their keys and values.
    """

    def __init__(self, config: ViTConfig, i: int = 0) -> None:
        super().__init__()
        width, scale = config.width, config.layer_scale
        self.norm1 = new_norm(config)
        self.attn = Attention(config)
        self.ls1 = nn.Identity() if scale is None else LayerScale(width, scale)
        self.norm2 = new_norm(config)
        self.mlp = MLP(config)
        self.ls2 = nn.Identity() if scale is None else LayerScale(width, scale)
        rises = config.drop_path_decay == "linear"
        self.drop_path = config.drop_path * i / max(1, config.depth - 1) if rises else config.drop_path
        self.subset = config.drop_path_subset

    def forward(self, x: Tensor, rotary: Rotary | None = None, first: int | None = None) -> Tensor:
        x = self.add(x, lambda x, rotary: self.ls1(self.attn(self.norm1(x), rotary, first)), rotary, first)
        return self.add(x, lambda x, _: self.ls2(self.mlp(self.norm2(x))))

    def add(
        self, x: Tensor, branch: Callable[[Tensor, Any], Tensor], rotary: Rotary | None = None, first: int | None = None
    ) -> Tensor:
        """x and a branch; stochastic depth (1603.09382) drops it for some samples in training, and scales the rest."""
        batch, p = x.shape[0], self.drop_path if self.training else 0.0
        if p == 0:
            return x[:, :first] + branch(x, rotary)
        if not self.subset:
            added = branch(x, rotary)
            kept = torch.rand(batch, 1, 1, device=x.device) >= p
            return x[:, :first] + added * kept.to(added.dtype) / (1 - p)
        rows = torch.rand(batch, device=x.device).argsort()[: max(1, int(batch * (1 - p)))]
        if rotary is not None and rotary[0].ndim > 2:  # of the patches of each image
            rotary = rotary[0][rows], rotary[1][rows]
        added = branch(x[rows], rotary).to(x.dtype)
        return x[:, :first].index_add(0, rows, added, alpha=batch / rows.shape[0])
