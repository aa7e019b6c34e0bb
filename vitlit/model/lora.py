"""Low-rank adaptation (2106.09685): frozen linear layers, each beside a trained product of two thin matrices."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitlit.errors import UserError
from vitlit.model.vit import ViT

ADDED = (".lora_a", ".lora_b", ".lora_scale")


@dataclass(frozen=True)
class LoRA:
    """Which linear layers of the blocks are adapted, and how far (2106.09685, section 4.1).

    Args:
        rank: of the product; (rank, in) and (out, rank) are trained for each layer.
        alpha: the product counts alpha / rank times.
        layers: names within a block, of attn.qkv, attn.proj, mlp.fc1 and mlp.fc2.

    Raises:
        UserError: the rank is less than 1 or more than a layer's, alpha is not above 0, or a block has no such layer.
    """

    rank: int = 8
    alpha: float = 16.0
    layers: Sequence[str] = ("attn.qkv", "attn.proj")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"model.lora.rank {self.rank} is less than 1")
        if self.alpha <= 0:
            raise UserError(f"model.lora.alpha {self.alpha} is not above 0")
        known = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        strange = [layer for layer in self.layers if layer not in known]
        if strange or not self.layers:
            raise UserError(f"model.lora.layers {strange or 'is empty'}; choose of {' '.join(known)}")


class LoRALinear(nn.Linear):
    """A linear layer W x + b + scale B A x: (..., in) -> (..., out). It shares W and b with the layer it adapts."""

    def __init__(self, adapted: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(adapted.in_features, adapted.out_features, adapted.bias is not None, device="meta")
        self.weight, self.bias = adapted.weight, adapted.bias
        self.lora_a = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_b = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        self.lora_scale: Tensor
        self.register_buffer("lora_scale", self.weight.new_tensor(alpha / rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # the authors' loralib

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def add_lora(vit: ViT, lora: LoRA) -> None:
    """Freeze a ViT but its head, and put adapters beside its layers. Its outputs stay as they are."""
    for name, parameter in vit.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    for block in vit.blocks:
        for layer in lora.layers:
            owner, _, name = layer.rpartition(".")
            part = block.get_submodule(owner)
            adapted = part.get_submodule(name)
            assert isinstance(adapted, nn.Linear)
            if lora.rank > min(adapted.weight.shape):
                raise UserError(f"model.lora.rank {lora.rank} is more than {layer} has, {min(adapted.weight.shape)}")
            setattr(part, name, LoRALinear(adapted, lora.rank, lora.alpha))


def merge(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Put the adapters of a state dict into the weights beside them.

    Returns:
        (the state of the plain network; what of `state` it replaces or lacks, adapters and the weights beside them).
    """
    layers = [name.removesuffix(".lora_a") for name in state if name.endswith(".lora_a")]
    before = {
        name: state[name] for layer in layers for name in (f"{layer}.weight", *(f"{layer}{part}" for part in ADDED))
    }
    plain = {name: tensor for name, tensor in state.items() if not name.endswith(ADDED)}
    for layer in layers:
        a, b, scale = (before[f"{layer}{part}"] for part in ADDED)
        product = scale.double() * (b.double() @ a.double())
        weight = plain[f"{layer}.weight"]
        plain[f"{layer}.weight"] = (weight.double() + product).to(weight.dtype)
    return plain, before


def without_adaptation(vit: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors by name, such that they change nothing: B is zero."""
    found = {name: tensor for name, tensor in vit.state_dict().items() if name.endswith(ADDED)}
    return {name: torch.zeros_like(t) if name.endswith(".lora_b") else t for name, t in found.items()}
