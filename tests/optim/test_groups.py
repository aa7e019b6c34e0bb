"""Learning rates against computed values, parameter groups against timm's, LAMB against timm's."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from timm.optim import Lamb, param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.optim import LAMB, Groups, Schedule, build_optimizer, table

TINY: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 24, "depth": 2, "heads": 3, "mlp_dim": 40}

# 90 epochs of ImageNet at batch 1024, peak 1e-3, 10,000 steps of warm-up (big_vision's vit_s16_i1k).
RATES = {0: 0.0, 1: 1.0e-7, 5_000: 5.0e-4, 10_000: 1.0e-3, 20_000: 9.767e-4, 56_301: 5.763e-4, 100_000: 3.677e-5}


@pytest.mark.parametrize(("step", "rate"), [*RATES.items(), (112_603, 0.0)])
def test_cosine_rates_of_big_visions_90_epochs(step: int, rate: float) -> None:
    computed = 1e-3 * Schedule(warmup=10_000, decay="cosine").over(112_603)(step)
    assert float(f"{computed:.3e}") == pytest.approx(rate, rel=1e-9, abs=1e-18)


def test_linear_rates_rise_to_the_peak_and_fall_to_zero() -> None:
    factor = Schedule(warmup=4, decay="linear").over(12)
    rates = [factor(step) for step in range(13)]
    assert rates == pytest.approx([0, 0.25, 0.5, 0.75, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0])


@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_rates_stay_between_zero_and_the_peak_which_ends_the_warm_up(warmup: int, decay: Any) -> None:
    factor = Schedule(warmup, decay).over(20)
    rates = [factor(step) for step in range(25)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert rates[warmup] == max(rates) == 1
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[20:] == [0.0] * 5


def test_reciprocal_square_root_is_big_visions() -> None:
    # utils.py: lr / sqrt(1 + (step - warmup) / timescale), times min(1, (total - step) / cooldown)
    factor = Schedule(10, "rsqrt", cooldown=20, timescale=30).over(200)
    assert factor(5) == 0.5
    assert factor(10) == 1
    assert factor(40) == pytest.approx(1 / math.sqrt(2))
    assert factor(100) == pytest.approx(0.5)
    assert factor(190) == pytest.approx(0.5 / math.sqrt(7))
    assert factor(200) == 0


def test_a_constant_rate_stays_until_its_cool_down() -> None:
    factor = Schedule(2, "constant", cooldown=4).over(12)
    assert [factor(step) for step in range(13)] == [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    assert Schedule(decay="constant").over(5)(100) == 1


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_a_final_rate_above_zero_is_reached_at_the_end(decay: Any) -> None:
    factor = Schedule(5, decay, final=0.01).over(100)
    assert factor(5) == pytest.approx(1)
    assert factor(99) > factor(100) == pytest.approx(0.01)  # the last step is 99
    assert factor(30) > Schedule(5, decay).over(100)(30)


@pytest.mark.parametrize(("warmup", "steps"), [(30, 30), ("30", 30), ("5 epochs", 50), ("1 epoch", 10), ("10%", 40)])
def test_lengths_are_steps_epochs_or_shares(warmup: int | str, steps: int) -> None:
    factor = Schedule(warmup).over(400, epoch=10)
    assert factor(steps - 1) < 1
    assert factor(steps) == 1
    assert factor(steps + 1) < 1


@pytest.mark.parametrize("warmup", [-1, "five", "-3 epochs", "5 apples", "0.5", "nan%", "inf", "inf%"])
def test_what_is_no_length_is_refused(warmup: int | str) -> None:
    with pytest.raises(UserError, match=r"model\.schedule\.warmup .* is not a number of steps, nor text such as"):
        Schedule(warmup)


def test_epochs_need_a_known_epoch() -> None:
    with pytest.raises(UserError, match="the steps of an epoch are not known here"):
        Schedule("2 epochs").over(100)


@pytest.mark.parametrize("total", [10, 3])
def test_a_warm_up_that_outlasts_the_training_is_refused_with_both_numbers(total: int) -> None:
    with pytest.raises(UserError, match=rf"warmup is 10 steps but training has only {total}; give a shorter"):
        Schedule(warmup=10).over(total)
    Schedule(warmup=10).over(11)


def test_a_cool_down_that_begins_before_the_warm_up_ends_is_refused() -> None:
    with pytest.raises(UserError, match="warmup and cooldown are 6 and 5 steps but training has only 10"):
        Schedule(6, "constant", cooldown=5).over(10)


@pytest.mark.parametrize(
    "wrong",
    [
        {"final": 2.0},
        {"timescale": 0},
        {"lr_per": 0},
        {"final": 0.1, "decay": "constant"},
        {"cooldown": 5},
        {"timescale": 9},
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"model\.schedule\."):
        Schedule(**wrong)


# Groups


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
    with pytest.raises(UserError, match=r"model\.groups\."):
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


# LAMB


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_twenty_steps_of_lamb_are_timms(weight_decay: float, max_grad_norm: float | None) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    start = [draw(8, 5), draw(8), draw(3, 4, 2, 2), torch.zeros(4, 4)]
    own = [nn.Parameter(tensor.clone()) for tensor in start]
    peers = [nn.Parameter(tensor.clone()) for tensor in start]

    def groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": parameters[:2], "weight_decay": weight_decay}, {"params": parameters[2:], "lr": 0.02}]

    shared: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "max_grad_norm": max_grad_norm}
    lamb, peer = LAMB(groups(own), **shared), Lamb(groups(peers), **shared)
    for step in range(20):
        for mine, theirs in zip(own, peers, strict=True):
            mine.grad = draw(*mine.shape) * 10 ** (step % 3 - 1)
            theirs.grad = mine.grad.clone()
        lamb.step()
        peer.step()
    for mine, theirs, before in zip(own, peers, start, strict=True):
        assert (mine - theirs).abs().max() <= 1e-6
        assert (mine - before).abs().max() > 1e-2


def test_lamb_continues_from_its_state() -> None:
    def run(stop: int | None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        parameter = nn.Parameter(torch.ones(3, 3))
        optimizer = LAMB([parameter], lr=0.1, weight_decay=0.1)
        for step in range(6):
            parameter.grad = torch.randn(3, 3, generator=generator)
            optimizer.step()
            if step == stop:
                state = optimizer.state_dict()
                optimizer = LAMB([parameter], lr=0.1, weight_decay=0.1)
                optimizer.load_state_dict(state)
        return parameter.detach()

    assert torch.equal(run(None), run(2))


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"eps": -1.0}, {"betas": (1.0, 0.9)}, {"weight_decay": -0.1}])
def test_lamb_refuses_numbers_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="LAMB takes no"):
        LAMB([nn.Parameter(torch.ones(1))], **wrong)


@pytest.mark.parametrize("norm", [0.0, -1.0])
def test_lamb_refuses_to_clip_to_nothing(norm: float) -> None:
    with pytest.raises(UserError, match="null is no clipping"):
        LAMB([nn.Parameter(torch.ones(1))], max_grad_norm=norm)
