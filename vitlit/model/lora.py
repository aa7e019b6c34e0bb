"""Low-rank adaptation (2106.09685): each frozen linear layer gets a trained product of two thin matrices."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitlit.errors import UserError, check_range, check_types
from vitlit.model.vit import ViT

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
TENSORS = (".lora_a", ".lora_b", ".lora_scale")


@dataclass(frozen=True)
class LoRA:
    """Which linear layers of the blocks are adapted, and how (2106.09685, section 4.1). UserError if they do not fit.

    Args:
        rank: rank of the product; each layer trains a (rank, in) and an (out, rank) matrix.
        alpha: the product is scaled by alpha / rank.
        layers: names within a block: attn.qkv, attn.proj, mlp.fc1, mlp.fc2.
    """

    rank: int = 8
    alpha: float = 16.0
    layers: Sequence[str] = ("attn.qkv", "attn.proj")

    def __post_init__(self) -> None:
        check_types(type(self), vars(self), "model.lora.")
        check_range("model.lora", 1, rank=self.rank)
        check_range("model.lora", 1e-6, alpha=self.alpha)
        if not self.layers or not set(self.layers) <= set(LAYERS):
            raise UserError(f"model.lora.layers {list(self.layers)} must be one or more of {' '.join(LAYERS)}")


class LoRALinear(nn.Linear):
    """A linear layer W x + b + scale B A x: (..., in) -> (..., out). It shares W and b with the layer it adapts."""

    def __init__(self, adapted: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(adapted.in_features, adapted.out_features, adapted.bias is not None, device="meta")
        self.weight, self.bias = adapted.weight, adapted.bias
        self.lora_a = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_b = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        self.lora_scale = nn.Buffer(self.weight.new_tensor(alpha / rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # the authors' loralib

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def add_lora(vit: ViT, lora: LoRA) -> None:
    """Freeze everything but the head and add adapters to the layers. The ViT's outputs stay the same."""
    for name, parameter in vit.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    for block in vit.blocks:
        for name in lora.layers:
            layer = block.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            if lora.rank > min(layer.weight.shape):
                raise UserError(f"model.lora.rank {lora.rank} is more than {name} has, {min(layer.weight.shape)}")
            block.set_submodule(name, LoRALinear(layer, lora.rank, lora.alpha))


def merge(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict with its adapters merged, and the entries of `state` that this changes or leaves out."""
    merged = {name: tensor for name, tensor in state.items() if not name.endswith(TENSORS)}
    replaced: dict[str, Tensor] = {}
    for layer in [name.removesuffix(".lora_a") for name in state if name.endswith(".lora_a")]:
        names = [f"{layer}{tensor}" for tensor in (".weight", *TENSORS)]
        weight, a, b, scale = (state[name] for name in names)
        merged[names[0]] = (weight.double() + scale.double() * (b.double() @ a.double())).to(weight.dtype)
        replaced |= {name: state[name] for name in names}
    return merged, replaced


def zero_adapters(vit: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors by name, with B zero, so that they change nothing."""
    adapters = {name: tensor for name, tensor in vit.state_dict().items() if name.endswith(TENSORS)}
    return {name: torch.zeros_like(t) if name.endswith(".lora_b") else t for name, t in adapters.items()}
