"""Parameter groups against timm's."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.optim import Groups, build_optimizer, table

TINY: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 24, "depth": 2, "heads": 3, "mlp_dim": 40}


@pytest.fixture
def vit() -> ViT:
    vit = ViT(**TINY)
    vit.set_head("pretrain", 10, 16)
    return vit


def adamw(lr: float = 0.1, weight_decay: float = 0.5) -> Any:
    return partial(torch.optim.AdamW, lr=lr, weight_decay=weight_decay)


def optimizer_of(vit: ViT, groups: Groups = Groups(), **options: Any) -> torch.optim.Optimizer:
    return build_optimizer(adamw(**options), vit.layers(), vit, groups)


def names(vit: nn.Module, group: dict[str, Any]) -> set[str]:
    members = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in vit.named_parameters() if id(parameter) in members}


def settings(vit: ViT, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay by parameter."""
    found = {}
    for group in optimizer.param_groups:
        for name in names(vit, group):
            assert name not in found
            found[name] = (group["lr"], group["weight_decay"])
    return found


def test_the_layers_hold_every_parameter_once_in_the_order_of_the_forward_pass() -> None:
    options: dict[str, Any] = {"distilled": True, "registers": 2, "norm": "pooled"}
    vit = ViT(**TINY, num_classes=3, **options)
    layers = vit.layers()
    assert list(layers) == ["embed", "blocks.0", "blocks.1", "norm", "head"]
    held = [name for layer in layers.values() for name in layer]
    assert sorted(held) == sorted(name for name, _ in vit.named_parameters())
    assert set(layers["embed"]) == {
        *("cls_token", "dist_token", "reg_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"),
    }
    assert set(layers["norm"]) == {"fc_norm.weight", "fc_norm.bias"}
    assert all(name.startswith("blocks.1.") for name in layers["blocks.1"])
    assert set(layers["head"]) == {f"{head}.{kind}" for head in ("head", "head_dist") for kind in ("weight", "bias")}
    pooled = ViT(**TINY, pool="map").layers()
    assert any(name.startswith("attn_pool.") for name in pooled["head"])


def test_kernels_decay_and_the_rest_does_not(vit: ViT) -> None:
    found = settings(vit, optimizer_of(vit))
    kernels = {"patch_embed.proj.weight", "head.pre_logits.weight", "head.out.weight"}
    kernels |= {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert {name for name, (_, decay) in found.items() if decay == 0.5} == kernels
    assert {name for name, (_, decay) in found.items() if decay == 0.0} == found.keys() - kernels
    assert len(optimizer_of(vit).param_groups) == 2


def test_every_trainable_parameter_is_in_exactly_one_group(vit: ViT) -> None:
    vit.requires_grad_(False)
    vit.head.requires_grad_(True)
    assert settings(vit, optimizer_of(vit)).keys() == {
        f"head.{part}.{kind}" for part in ("pre_logits", "out") for kind in ("weight", "bias")
    }
    vit.requires_grad_(False)
    with pytest.raises(UserError, match=r"no parameter is trainable"):
        optimizer_of(vit)


def test_a_parameter_that_no_layer_holds_is_refused_by_name(vit: ViT) -> None:
    vit.extra = nn.Parameter(torch.zeros(2))
    with pytest.raises(UserError, match="the parameter extra is in no layer"):
        optimizer_of(vit)
    vit.extra.requires_grad_(False)
    optimizer_of(vit)


def test_groups_are_timms_but_for_the_class_token_and_positions(vit: ViT) -> None:
    # timm leaves these two out only where the model's no_weight_decay names them.
    rest, decayed = param_groups_weight_decay(vit, 0.5, no_weight_decay_list=("cls_token", "pos_embed"))
    found = settings(vit, optimizer_of(vit))
    assert {name for name, (_, decay) in found.items() if decay} == names(vit, decayed)
    assert {name for name, (_, decay) in found.items() if not decay} == names(vit, rest)


# reference: MAE's util/lr_decay.py for 12 blocks and 0.65
LEVELS = {"pos_embed": 0.003697, "blocks.0.attn.qkv.bias": 0.005688, "blocks.5.mlp.fc1.weight": 0.049022}
LEVELS |= {"blocks.11.norm2.weight": 0.65, "norm.weight": 1.0, "head.weight": 1.0}


def deep() -> ViT:
    return ViT(**{**TINY, "depth": 12}, num_classes=3)


def test_layer_decay_has_the_levels_of_mae() -> None:
    vit = deep()
    found = settings(vit, optimizer_of(vit, Groups(layer_decay=0.65), lr=1.0))
    assert {name: float(f"{found[name][0]:.4g}") for name in LEVELS} == pytest.approx(LEVELS, rel=1e-3)
    assert len({rate for rate, _ in found.values()}) == 14


def test_layer_decay_is_timms_but_for_the_final_norm() -> None:
    import timm

    peer = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=3)
    scales = {
        id(p): group["lr_scale"] for group in param_groups_layer_decay(peer, layer_decay=0.7) for p in group["params"]
    }
    vit = ViT.from_preset("Ti/16", num_classes=3)
    vit.blocks = vit.blocks[:3]
    found = settings(vit, optimizer_of(vit, Groups(layer_decay=0.7), lr=1.0))
    # timm counts the final norm to the last block, MAE to the head.
    theirs = {n: 1.0 if n.startswith("norm.") else scales[id(p)] for n, p in peer.named_parameters()}
    assert {name: rate for name, (rate, _) in found.items()} == pytest.approx(theirs)


def test_layer_decay_outlives_a_torch_scheduler() -> None:
    vit = deep()
    optimizer = optimizer_of(vit, Groups(layer_decay=0.65), lr=1.0)
    scheduler = CosineAnnealingLR(optimizer, 2000)
    for _ in range(1000):
        optimizer.step()
        scheduler.step()
    found = settings(vit, optimizer)
    assert len({rate for rate, _ in found.values()}) == 14
    assert found["blocks.11.norm2.weight"][0] == pytest.approx(0.65 / 2, rel=1e-6)
    assert found["norm.weight"][0] == pytest.approx(1 / 2, rel=1e-6)


def test_multiples_by_pattern_act_beside_layer_decay_and_in_place_of_the_mask(vit: ViT) -> None:
    groups = Groups(0.5, lr={"patch_embed.*": 0.2, "*.bias": 3.0}, weight_decay={"pos_embed": 1.0, "head.*": 0.1})
    found = settings(vit, optimizer_of(vit, groups, lr=1.0, weight_decay=2.0))
    assert found["patch_embed.proj.weight"] == pytest.approx((0.125 * 0.2, 2.0))
    assert found["patch_embed.proj.bias"] == pytest.approx((0.125 * 0.2 * 3, 0.0))
    assert found["pos_embed"] == pytest.approx((0.125, 2.0))
    assert found["head.out.weight"] == pytest.approx((1.0, 0.2))
    assert found["head.out.bias"] == pytest.approx((3.0, 0.2))
    assert found["blocks.1.mlp.fc1.weight"] == pytest.approx((0.5, 2.0))


@pytest.mark.parametrize("wrong", [{"lr": {"blocs.*": 0.1}}, {"weight_decay": {"nothing": 0.0}}])
def test_a_pattern_that_matches_nothing_is_refused(vit: ViT, wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"model\.groups\.\w+ '(blocs\.\*|nothing)' matches no trainable parameter"):
        optimizer_of(vit, Groups(**wrong))


@pytest.mark.parametrize("wrong", [{"layer_decay": 0.0}, {"layer_decay": 1.1}, {"lr": {"*": -1.0}}])
def test_multiples_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"model\.groups"):
        Groups(**wrong)


def test_weight_decay_shrinks_kernels_alone(vit: ViT) -> None:
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.fill_(1.0)
    optimizer = optimizer_of(vit)
    for parameter in vit.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    shrunk = {name for name, p in vit.named_parameters() if math.isclose(p.flatten()[0].item(), 0.95, rel_tol=1e-6)}
    kept = {name for name, p in vit.named_parameters() if bool((p == 1).all())}
    assert shrunk == {name for name, (_, decay) in settings(vit, optimizer).items() if decay}
    assert len(shrunk | kept) == len(list(vit.parameters()))


def test_the_table_counts_every_parameter_and_shows_what_differs(vit: ViT) -> None:
    head, *rows = table(optimizer_of(vit, Groups(layer_decay=0.5))).splitlines()
    assert head.split() == ["layers", "tensors", "parameters", "peak", "lr", "weight", "decay"]
    assert len(rows) == 8
    counted = sum(int(row.split()[-3].replace(",", "")) for row in rows)
    assert counted == sum(p.numel() for p in vit.parameters())
    assert rows[0].split()[0] == "embed"
    assert rows[0].split()[-2:] in (["0.0125", "0.5"], ["0.0125", "0"])
    assert rows[-1].startswith(("norm to head", "head"))
