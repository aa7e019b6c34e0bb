"""Muon against torch's, run by hand beside AdamW; its groups; continued runs."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import user_error
from small_stage import TINY, data, distance, state_of, trainer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import SGD, AdamW

from vitlit.model import ViT
from vitlit.objectives import MAE, Supervised
from vitlit.optim import Groups, Muon, Schedule, build_optimizer
from vitlit.stages import Pretrain

HIDDEN = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")


def stage(objective: Any = partial(Supervised, num_classes=4)) -> Pretrain:  # noqa: B008
    torch.manual_seed(0)
    return Pretrain(ViT(**TINY, dropout=0.1), objective, partial(Muon, lr=0.01), Schedule(decay="constant"))


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_ten_steps_are_those_of_torchs_muon_on_each_matrix_and_adamw_on_the_rest(adjust: Any) -> None:
    vit, peer = (ViT(**TINY, num_classes=4) for _ in range(2))
    peer.load_state_dict(vit.state_dict())
    muon = partial(Muon, lr=0.01, weight_decay=0.2, momentum=0.9, adjust_lr_fn=adjust)
    own = build_optimizer(muon, vit.layers(), vit)

    pieces: list[nn.Parameter] = []  # queries, keys and values apart
    kernels: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    stacks: list[tuple[nn.Parameter, list[nn.Parameter]]] = []
    for name, parameter in peer.named_parameters():
        if name.startswith("blocks.") and name.endswith(HIDDEN):
            parts = [nn.Parameter(part.detach().clone()) for part in parameter.chunk(3 if "qkv" in name else 1)]
            stacks.append((parameter, parts))
            pieces += parts
        else:
            (kernels if name in ("patch_embed.proj.weight", "head.weight") else others).append(parameter)
    by_hand = [
        torch.optim.Muon(pieces, lr=0.01, weight_decay=0.2, momentum=0.9, adjust_lr_fn=adjust),
        AdamW(
            [{"params": kernels, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}],
            lr=0.01,
            betas=(0.9, 0.95),
        ),
    ]
    images, labels = torch.randn(8, 3, 16, 16), torch.randint(4, (8,))
    for _ in range(10):
        for network in (vit, peer):
            network.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
        own.step()
        for parameter, parts in stacks:
            assert parameter.grad is not None
            for part, gradient in zip(parts, parameter.grad.chunk(len(parts)), strict=True):
                part.grad = gradient.clone()
        for optimizer in by_hand:
            optimizer.step()
        with torch.no_grad():
            for parameter, parts in stacks:
                parameter.copy_(torch.cat([*parts]))
    for (name, mine), theirs in zip(vit.named_parameters(), peer.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_the_matrices_of_all_blocks_are_muons_and_all_else_is_adamws() -> None:
    decoder: dict[str, Any] = {"mask_ratio": 0.5, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    own = stage(objective=partial(MAE, **decoder))
    layers = own.vit.layers()
    layers["objective"] = {f"objective.{name}": p for name, p in own.objective.named_parameters()}
    optimizer = build_optimizer(own.optimizer, layers, own, Groups(layer_decay=0.5))
    kinds = {id(p): group["matrices"] for group in optimizer.param_groups for p in group["params"]}
    names = {name: kinds[id(p)] for name, p in own.named_parameters()}
    for name, kind in names.items():
        hidden = "blocks." in name and name.endswith(HIDDEN)
        assert kind == (3 if hidden and "qkv" in name else int(hidden)), name
    assert "objective.decoder_blocks.0.attn.qkv.weight" in names
    rates = {group["lr"] for group in optimizer.param_groups if group["matrices"]}
    assert rates == {0.0005 * 10, 0.0025, 0.01}  # the last block, the one before, the decoder


def test_a_continued_run_is_the_undisturbed_one(few: Path, tmp_path: Path) -> None:
    whole, begun, continued = stage(), stage(), stage()
    trainer(max_steps=8, max_epochs=4).fit(whole, data(few))
    first = trainer(max_steps=5, max_epochs=4)
    first.fit(begun, data(few))
    first.save_checkpoint(tmp_path / "half.ckpt")
    trainer(max_steps=8, max_epochs=4).fit(continued, data(few), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert distance(state_of(whole), state_of(begun)) > 0
    assert distance(state_of(whole), state_of(continued)) == 0


def test_other_parameters_and_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="Muon is for matrices"):
        Muon([nn.Parameter(torch.zeros(3))])
    vit = ViT(**TINY, num_classes=4)
    user_error("model.optimizer: .*momentum", build_optimizer, partial(Muon, momentum=-1.0), vit.layers(), vit)
    user_error("2D.*give vitlit.optim.Muon, which has AdamW", build_optimizer, torch.optim.Muon, vit.layers(), vit)


@pytest.mark.parametrize(
    ("make", "fused"),
    [
        (partial(AdamW, lr=0.1), True),
        (partial(SGD, lr=0.1), True),
        (partial(AdamW, lr=0.1, foreach=True), None),
        (partial(AdamW, lr=0.1, fused=False), False),
    ],
)
def test_torchs_optimizers_are_fused_on_a_gpu_unless_the_user_says_otherwise(make: Any, fused: bool | None) -> None:
    def built(device: str) -> Any:
        layer = nn.Linear(2, 2, device=device)
        return build_optimizer(make, {"head": dict(layer.named_parameters())}, layer)

    assert {group["fused"] for group in built("cpu").param_groups} == {make.keywords.get("fused")}
    with FakeTensorMode():
        assert {group["fused"] for group in built("cuda").param_groups} == {fused}
