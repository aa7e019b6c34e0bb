"""Low-rank adaptation: what it trains, and that the merged network is saved."""

from functools import partial
from typing import Any

import pytest
import torch
from conftest import randomized
from torch import nn

from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.model.lora import LoRA, add_lora, merge, zero_adapters
from vitlit.optim import build_optimizer

TINY: dict[str, Any] = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 2, "heads": 2, "mlp_dim": 32}
ALL = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def adapted(lora: LoRA, **options: Any) -> tuple[ViT, ViT]:
    """A ViT, and one of the same weights with adapters."""
    torch.manual_seed(0)
    plain = randomized(ViT(**TINY, num_classes=3, **options))
    vit = ViT(**TINY, num_classes=3, **options)
    vit.load_state_dict(plain.state_dict())
    add_lora(vit, lora)
    return plain, vit.eval()


@pytest.mark.parametrize("layers", [ALL, ("attn.qkv",)])
def test_adapters_change_nothing_at_first_and_merge_into_the_plain_network(layers: tuple[str, ...]) -> None:
    plain, vit = adapted(LoRA(rank=3, alpha=6, layers=layers))
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(vit(images), plain(images))
    randomized(vit)
    logits = vit(images)
    assert (logits - plain(images)).abs().max() > 1e-2
    state, replaced = merge(vit.state_dict())
    assert state.keys() == plain.state_dict().keys()
    merged = ViT(**plain.config.plain()).eval()
    merged.load_state_dict(state)
    assert (merged(images) - logits).abs().max() <= 1e-5
    assert len(replaced) == 4 * len(layers) * 2
    vit.load_state_dict(state | replaced)
    assert torch.equal(vit(images), logits)


def test_the_update_is_the_papers() -> None:
    _, vit = adapted(LoRA(rank=2, alpha=8, layers=("mlp.fc1",)))
    randomized(vit)
    layer = vit.blocks[0].get_submodule("mlp.fc1")
    assert isinstance(layer, nn.Linear)
    x = torch.randn(5, 16)
    a, b = layer.get_parameter("lora_a"), layer.get_parameter("lora_b")
    assert (a.shape, b.shape) == ((2, 16), (32, 2))
    by_hand = x @ layer.weight.T + layer.bias + 8 / 2 * (x @ a.T) @ b.T  # section 4.1
    torch.testing.assert_close(layer(x), by_hand)


def test_only_adapters_and_head_are_trained() -> None:
    _, vit = adapted(LoRA(rank=4))
    trained = {name for name, parameter in vit.named_parameters() if parameter.requires_grad}
    expected = {f"blocks.{i}.attn.{layer}.lora_{m}" for i in (0, 1) for layer in ("qkv", "proj") for m in "ab"}
    assert trained == expected | {"head.weight", "head.bias"}
    count = 2 * (4 * (16 + 48) + 4 * (16 + 16))
    assert sum(p.numel() for p in vit.parameters() if p.requires_grad) == count + 3 * 17


def test_adapters_belong_to_their_blocks() -> None:
    _, vit = adapted(LoRA())
    assert "blocks.1.attn.qkv.lora_a" in vit.layers()["blocks.1"]


def test_zero_adapters_leave_the_merged_network_unchanged() -> None:
    _, vit = adapted(LoRA())
    randomized(vit)
    images = torch.randn(2, 3, 16, 16)
    logits = vit(images)
    state, _ = merge(vit.state_dict())
    vit.load_state_dict(state | zero_adapters(vit))
    assert (vit(images) - logits).abs().max() <= 1e-5


def test_a_state_without_adapters_stays_as_it_is() -> None:
    state = ViT(**TINY).state_dict()
    merged, replaced = merge(state)
    assert replaced == {}
    assert all(merged[name] is tensor for name, tensor in state.items())


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"rank": 0}, {"layers": ("attn.q",)}, {"layers": ()}])
def test_what_cannot_be_adapted_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"model\.lora"):
        LoRA(**wrong)


def test_adapters_decay_as_kernels_do() -> None:
    """As in the authors' loralib and in peft, where an optimizer's weight decay acts on A and B."""
    vit = ViT(**TINY, num_classes=3)
    add_lora(vit, LoRA(rank=2))
    optimizer = build_optimizer(partial(torch.optim.AdamW, lr=1.0, weight_decay=0.1), vit.layers(), vit)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert {name for name, p in vit.named_parameters() if id(p) in decayed} == {
        name for name, p in vit.named_parameters() if p.requires_grad and p.ndim > 1
    }
