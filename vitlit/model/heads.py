"""The heads of 2010.11929, section 3.1: a hidden tanh layer at pretraining, one linear layer at finetuning."""

from collections import OrderedDict

from torch import nn


def linear_head(width: int, num_classes: int) -> nn.Linear:
    """The finetuning head: one zero-initialised linear layer, (B, width) -> (B, num_classes)."""
    head = nn.Linear(width, num_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def tanh_head(width: int, hidden_dim: int, num_classes: int) -> nn.Sequential:
    """The pretraining head: Linear, tanh, Linear, (B, width) -> (B, num_classes).

    The output layer starts at zero, the hidden one Xavier-uniform (google-research/vision_transformer).
    """
    hidden = nn.Linear(width, hidden_dim)
    nn.init.xavier_uniform_(hidden.weight)
    nn.init.zeros_(hidden.bias)
    return nn.Sequential(
        OrderedDict(pre_logits=hidden, tanh=nn.Tanh(), out=linear_head(hidden_dim, num_classes)),
    )
