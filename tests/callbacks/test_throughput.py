"""Images per second, and the share of the time that is spent waiting for data."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from small_stage import Memory, fit, pretrain, trainer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitlit.callbacks import Throughput
from vitlit.callbacks.progress import progress
from vitlit.data import ImageFolderData
from vitlit.objectives import Batch, Step, Supervised


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_throughput_counts_images_not_batches(few: Path) -> None:
    memory = Memory()
    fit(pretrain(), few, {"micro_batch": 4}, logger=memory)
    rates = [value for _, value in memory.rows["train/images_per_second"]]
    assert len(rates) == 2  # of five steps, the last
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


def test_the_first_steps_in_which_a_compiler_works_do_not_count(few: Path) -> None:
    class Compiling(Callback):
        def on_before_zero_grad(self, trainer: Any, *args: Any) -> None:
            time.sleep(2 if trainer.global_step == 0 else 0)

    memory = Memory()
    trainer(max_epochs=2, log_every_n_steps=5, callbacks=[Compiling()], logger=memory).fit(
        pretrain(), ImageFolderData(str(few), image_size=16, batch_size=8, num_workers=0)
    )
    assert all(rate > 5 * 8 / 2 for _, rate in memory.rows["train/images_per_second"])


def test_mfu_is_the_work_of_a_second_by_what_the_device_could_do(few: Path) -> None:
    """The work is that of a real step, which torch counts."""
    stage, memory, throughput = pretrain(), Memory(), Throughput(peak_tflops=0.001)
    runner = trainer(logger=memory)
    runner.callbacks[-1] = throughput  # type: ignore[attr-defined]
    runner.fit(stage, ImageFolderData(str(few), image_size=16, batch_size=8, num_workers=0))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        images = torch.randn(8, 3, 16, 16)
        stage.objective(stage.vit, Batch.of([images, torch.zeros(8).long()]), 0.0).loss.backward()
    each = counter.get_total_flops() / 8
    rates, shares = (memory.rows[f"train/{name}"] for name in ("images_per_second", "mfu"))
    assert len(rates) == len(shares) == 2
    for (_, rate), (_, share) in zip(rates, shares, strict=True):
        assert share == pytest.approx(rate * each / 1e9, rel=1e-6)
    assert progress(runner)["MFU"].endswith(" %")


def test_the_meter_changes_no_number(few: Path) -> None:
    rows = []
    for peak in (None, 1.0):
        memory = Memory()
        runner = trainer(logger=memory)
        runner.callbacks[-1] = Throughput(peak)  # type: ignore[attr-defined]
        torch.manual_seed(0)
        runner.fit(pretrain(dropout=0.3), ImageFolderData(str(few), image_size=16, batch_size=8, num_workers=0))
        assert ("train/mfu" in memory.rows) == (peak is not None)
        rows.append(memory.rows["train/loss"])
    assert rows[0] == rows[1]


def test_an_objective_that_reads_values_trains_without_mfu(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Reading(Supervised):
        def forward(self, vit: Any, batch: Batch, progress: float) -> Step:
            step = super().forward(vit, batch, progress)
            return step._replace(loss=step.loss * (1 + 0 * step.loss.item()))

    stage = pretrain()
    stage.objective = Reading(stage.vit, num_classes=4)
    memory = Memory()
    runner = trainer(logger=memory)
    runner.callbacks[-1] = Throughput(1.0)  # type: ignore[attr-defined]
    runner.fit(stage, ImageFolderData(str(few), image_size=16, batch_size=8, num_workers=0))
    assert "train/mfu" not in memory.rows
    assert capsys.readouterr().out.count("train/mfu is not logged: Reading needs more than shapes") == 1
