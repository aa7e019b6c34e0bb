"""Stochastic depth: what a block drops in training, and how often."""

import pytest
import torch
from test_family import images_for, tiny
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


SAMPLES = 4000


def residuals(block: nn.Module, branch: str) -> tuple[Tensor, Tensor]:
    """What a branch of a block adds to each of SAMPLES equal samples in training, and what it adds to one in eval."""
    other = {"attn": "mlp.fc2", "mlp": "attn.proj"}[branch]
    saved = {name: value.clone() for name, value in block.state_dict().items()}
    with torch.no_grad():
        for parameter in block.get_submodule(other).parameters():
            parameter.zero_()
        x = torch.randn(1, 3, 24)
        alone = block.eval()(x) - x
        added = block.train()(x.expand(SAMPLES, -1, -1)) - x
    block.load_state_dict(saved)
    return added, alone


@pytest.mark.parametrize("branch", ["attn", "mlp"])
def test_stochastic_depth_drops_samples_and_scales_the_others(branch: str) -> None:
    added, alone = residuals(tiny(drop_path=0.3).blocks[-1], branch)
    dropped = (added == 0).all(dim=2).all(dim=1)
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.03)
    torch.testing.assert_close(added[~dropped], (alone / 0.7).expand(int((~dropped).sum()), -1, -1), rtol=0, atol=1e-5)


def test_attention_and_mlp_are_dropped_independently() -> None:
    block = tiny(drop_path=0.5).blocks[-1].train()
    x = torch.randn(1, 3, 24)
    kinds = torch.unique(block(x.expand(SAMPLES, -1, -1)).detach().round(decimals=4), dim=0)
    assert len(kinds) == 4


def test_the_rate_of_stochastic_depth_rises_linearly_from_none() -> None:
    vit = tiny(drop_path=0.6, depth=4)
    shares = [(residuals(block, "mlp")[0] == 0).all(dim=2).all(dim=1).float().mean().item() for block in vit.blocks]
    assert shares[0] == 0
    assert shares == pytest.approx([0, 0.2, 0.4, 0.6], abs=0.03)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_constant_rate_of_stochastic_depth_is_every_blocks(depth: int) -> None:
    """As `dpr = [drop_path_rate for i in range(depth)]` of facebookresearch/deit, models_v2.py."""
    vit = tiny(drop_path=0.4, drop_path_decay="constant", depth=depth)
    shares = [(residuals(block, "attn")[0] == 0).all(dim=2).all(dim=1).float().mean().item() for block in vit.blocks]
    assert shares == pytest.approx([0.4] * depth, abs=0.03)


def test_the_first_block_is_never_dropped() -> None:
    x = torch.randn(50, 3, 24)
    for depth in (1, 2):
        block = tiny(drop_path=0.9, depth=depth).blocks[0]
        assert torch.equal(block.train()(x), block.eval()(x))


def test_stochastic_depth_does_nothing_outside_of_training() -> None:
    vit = tiny(drop_path=0.9)
    plain = tiny()
    plain.load_state_dict(vit.state_dict())
    images = images_for(vit)
    assert torch.equal(vit(images), plain(images))
    assert not torch.equal(vit.train()(images), plain.train()(images))
