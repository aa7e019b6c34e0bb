"""Images per second, and the share of the time that is spent waiting for data."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from small_stage import Memory, fit, pretrain, trainer

from vitlit.data import ImageFolderData


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_throughput_counts_images_not_batches(few: Path) -> None:
    memory = Memory()
    fit(pretrain(), few, {"micro_batch": 4}, logger=memory)
    rates = [value for _, value in memory.rows["train/images_per_second"]]
    assert len(rates) == 5
    assert all(math.isfinite(rate) and rate > 8 for rate in rates)


def test_the_wait_for_data_is_its_share_of_the_time(few: Path) -> None:
    """A loader sleeps for four fifths of the time, a step for the rest."""

    class Slow(ImageFolderData):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            time.sleep(0.2)
            return super().on_before_batch_transfer(batch, dataloader_idx)

    class Busy(Callback):
        def on_before_zero_grad(self, *args: Any) -> None:
            time.sleep(0.05)

    waits = {}
    for name, kind in (("slow", Slow), ("fast", ImageFolderData)):
        memory = Memory()
        slow = kind(str(few), image_size=16, batch_size=4, num_workers=0)
        trainer(max_steps=10, log_every_n_steps=2, callbacks=[Busy()], logger=memory).fit(pretrain(), slow)
        waits[name] = [value for _, value in memory.rows["train/data_wait"]]
    assert len(waits["slow"]) >= 4
    assert all(0.5 < wait < 0.85 for wait in waits["slow"][1:])
    assert all(wait < 0.4 for wait in waits["fast"][1:])
