"""LAMB against timm's."""

from typing import Any

import pytest
import torch
from timm.optim import Lamb
from torch import nn

from vitlit.errors import UserError
from vitlit.optim import LAMB


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
