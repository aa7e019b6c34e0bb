"""A loss or a gradient that is not finite stops the run, and the last good checkpoint is named."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Result, refused
from small_stage import fit, pretrain
from torch import Tensor

from vitlit.data.stream import order
from vitlit.errors import UserError
from vitlit.stages import Stage

Command = Callable[..., Result]


def spoiled(where: str) -> Callable[[], None]:
    """Spoil the loss of the fourth step, which ends the second epoch, or its gradient alone."""

    def before() -> None:
        original = Stage.training_step

        def training_step(self: Stage, batch: Any, index: int) -> Tensor:
            factor = math.nan if self.trainer.global_step == 3 else 1.0
            if where == "loss":
                return original(self, batch._replace(views=[view * factor for view in batch.views]), index)
            loss = original(self, batch, index)
            loss.register_hook(lambda gradient: gradient * factor)
            return loss

        setattr(Stage, "training_step", training_step)  # noqa: B010

    return before


@pytest.mark.parametrize(("where", "words"), [("loss", "the loss of step 3"), ("gradient", "the gradient of step 3")])
def test_a_run_that_overflows_stops_with_sound_checkpoints(
    vitlit: Command, few: Path, tmp_path: Path, where: str, words: str
) -> None:
    result = vitlit("fit", *SMALL, "--data.root", few, before=spoiled(where))
    shown = order(0, 1, 40)[16:32].tolist()
    listed = f"(training images {' '.join(map(str, shown[:8]))} and 8 more) is not finite"
    good = "the last good checkpoint is runs/pretrain/checkpoints/last.ckpt"
    refused(result, f"{words} {listed}", "vitlit data show runs/pretrain --step 3", "learning rate", good)
    for name in ("last", "best"):
        checkpoint = torch.load(tmp_path / "runs" / "pretrain" / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 2
        assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())


def test_a_learning_rate_that_blows_up_stops_the_run_without_a_checkpoint(
    vitlit: Command, few: Path, tmp_path: Path
) -> None:
    flags = ("--model.optimizer.lr", 1e30, "--model.schedule.warmup", 0)
    refused(vitlit("fit", *SMALL, "--data.root", few, *flags), "is not finite")
    assert not (tmp_path / "runs" / "pretrain" / "checkpoints").exists()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_a_loss_that_is_not_finite_stops_the_training(few: Path) -> None:
    with pytest.raises(UserError, match=r"the loss of step \d+ .*is not finite; lower the learning rate"):
        fit(pretrain(lr=1e30), few, max_epochs=5)
