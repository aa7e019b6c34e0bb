"""Learning rates against computed values, parameter groups against timm's."""

import math
from typing import Any

import pytest
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.objectives import Supervised
from vitlit.optim import Schedule, parameter_groups

TINY: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 24, "depth": 2, "heads": 3, "mlp_dim": 40}

# 90 epochs of ImageNet at batch 1024, peak 1e-3, 10,000 steps of warm-up (big_vision's vit_s16_i1k).
RATES = {0: 0.0, 1: 1.0e-7, 5_000: 5.0e-4, 10_000: 1.0e-3, 20_000: 9.767e-4, 56_301: 5.763e-4, 100_000: 3.677e-5}


@pytest.mark.parametrize(("step", "rate"), [*RATES.items(), (112_603, 0.0)])
def test_cosine_rates_of_big_visions_90_epochs(step: int, rate: float) -> None:
    computed = 1e-3 * Schedule(warmup=10_000, decay="cosine").factor(step, 112_603)
    assert float(f"{computed:.3e}") == pytest.approx(rate, rel=1e-9, abs=1e-18)


def test_linear_rates_rise_to_the_peak_and_fall_to_zero() -> None:
    schedule = Schedule(warmup=4, decay="linear")
    rates = [schedule.factor(step, 12) for step in range(13)]
    assert rates == pytest.approx([0, 0.25, 0.5, 0.75, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0])


@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_rates_stay_between_zero_and_the_peak_which_ends_the_warm_up(warmup: int, decay: Any) -> None:
    rates = [Schedule(warmup, decay).factor(step, 20) for step in range(25)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert rates[warmup] == max(rates) == 1
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[20:] == [0.0] * 5


@pytest.mark.parametrize("total", [10, 3])
def test_a_warm_up_that_outlasts_the_training_is_refused_with_both_numbers(total: int) -> None:
    with pytest.raises(UserError, match=rf"warmup is 10 steps but training has only {total}; give a shorter"):
        Schedule(warmup=10).check(total)
    Schedule(warmup=10).check(11)


@pytest.fixture
def vit() -> ViT:
    vit = ViT(**TINY)
    vit.set_head("pretrain", 10, 16)
    return vit


def names(vit: nn.Module, group: dict[str, Any]) -> set[str]:
    members = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in vit.named_parameters() if id(parameter) in members}


def test_kernels_decay_and_the_rest_does_not(vit: ViT) -> None:
    decayed, rest = parameter_groups([vit, Supervised(vit, 10)])
    kernels = {"patch_embed.proj.weight", "head.pre_logits.weight", "head.out.weight"}
    kernels |= {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert names(vit, decayed) == kernels
    assert "weight_decay" not in decayed  # the optimizer's own
    assert rest["weight_decay"] == 0.0
    assert names(vit, rest) >= {"cls_token", "pos_embed", "norm.weight", "norm.bias", "patch_embed.proj.bias"}


def test_every_trainable_parameter_is_in_exactly_one_group(vit: ViT) -> None:
    class WithParts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(3))
            self.decoder = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Embedding(3, 3), nn.Conv2d(1, 1, 1))

    parts = WithParts()
    grouped = [id(p) for group in parameter_groups([vit, parts]) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for module in (vit, parts) for p in module.parameters()}
    decayed = parameter_groups([parts])[0]
    assert names(parts, decayed) == {"decoder.0.weight", "decoder.3.weight"}


def test_frozen_parameters_are_left_out_and_no_group_is_empty(vit: ViT) -> None:
    vit.requires_grad_(False)
    assert parameter_groups([vit]) == []
    vit.head.requires_grad_(True)
    groups = parameter_groups([vit])
    assert [names(vit, group) for group in groups] == [
        {"head.pre_logits.weight", "head.out.weight"},
        {"head.pre_logits.bias", "head.out.bias"},
    ]
    vit.requires_grad_(False)
    vit.norm.requires_grad_(True)
    assert [names(vit, group) for group in parameter_groups([vit])] == [{"norm.weight", "norm.bias"}]


def test_groups_are_timms_but_for_the_class_token_and_positions(vit: ViT) -> None:
    # timm leaves these two out only where the model's no_weight_decay names them.
    rest, decayed = param_groups_weight_decay(vit, 0.1, no_weight_decay_list=("cls_token", "pos_embed"))
    own = parameter_groups([vit])
    assert names(vit, own[0]) == names(vit, decayed)
    assert names(vit, own[1]) == names(vit, rest)


def test_weight_decay_shrinks_kernels_alone(vit: ViT) -> None:
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.fill_(1.0)
    optimizer = torch.optim.AdamW(parameter_groups([vit]), lr=0.1, weight_decay=0.5)
    for parameter in vit.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    shrunk = {name for name, p in vit.named_parameters() if math.isclose(p.flatten()[0].item(), 0.95, rel_tol=1e-6)}
    kept = {name for name, p in vit.named_parameters() if bool((p == 1).all())}
    assert shrunk == names(vit, parameter_groups([vit])[0])
    assert len(shrunk | kept) == len(list(vit.parameters()))
