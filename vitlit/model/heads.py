"""The attention pool of 2106.04560 and the two heads of 2010.11929, section 3.1."""

from collections import OrderedDict
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitlit.model.block import MLP, new_norm
from vitlit.model.config import ViTConfig


class AttentionPool(nn.Module):
    """Attention of one learned query over the tokens, then an MLP (2106.04560, section 3.2).

    (B, tokens, D) -> (B, D). The MLP is never gated: if the blocks use swiglu, it uses gelu.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.latent = nn.Parameter(torch.empty(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = new_norm(config)
        activation = "gelu" if config.mlp == "swiglu" else config.mlp
        self.mlp = MLP(replace(config, mlp=activation, dropout=0.0, proj_bias=True, sub_norm=False))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q = self.q(self.latent).reshape(1, 1, self.heads, -1).transpose(1, 2).expand(batch, -1, -1, -1)
        k, v = self.kv(x).reshape(batch, tokens, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = self.proj(F.scaled_dot_product_attention(q, k, v).reshape(batch, 1, width))
        return (x + self.mlp(self.norm(x)))[:, 0]


def new_head(width: int, hidden_dim: int | None, num_classes: int) -> nn.Module:
    """A head, (B, width) -> (B, num_classes), that gives zeros at first: Linear, tanh, Linear, or one Linear."""
    if num_classes == 0:
        return nn.Identity()
    if hidden_dim is not None:
        hidden = nn.Linear(width, hidden_dim)
        nn.init.xavier_uniform_(hidden.weight)  # the std of flax's default, LeCun-normal, if hidden_dim is the width
        nn.init.zeros_(hidden.bias)
        output = new_head(hidden_dim, None, num_classes)
        return nn.Sequential(OrderedDict(pre_logits=hidden, tanh=nn.Tanh(), out=output))
    output = nn.Linear(width, num_classes)
    nn.init.zeros_(output.weight)
    nn.init.zeros_(output.bias)
    return output
