"""The lines of progress that a training prints where there is no terminal."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from small_stage import data, pretrain, trainer

from vitlit.callbacks import Lines, progress


class Clock(Callback):
    """Makes a step take ten seconds, and keeps the figures that are there to show after each validation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.shown: list[tuple[bool, dict[str, str]]] = []
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: self.now))

    def on_train_batch_start(self, *_: Any) -> None:
        self.now += 10

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.now += 100 if trainer.sanity_checking else 0
        self.shown.append((trainer.sanity_checking, progress.progress(trainer)))


def lines(few: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **options: Any) -> list[str]:
    """What is printed of two epochs of five steps, after a sanity check of two batches."""
    clock = Clock(monkeypatch)
    runner = trainer(max_epochs=2, num_sanity_val_steps=2, callbacks=[clock, Lines()])
    capsys.readouterr()
    runner.fit(pretrain(), data(few), **options)
    (sanity, figures), (later, accuracy), *_ = clock.shown
    assert (sanity, figures, later) == (True, {}, False)  # and so the bar shows nothing of it
    assert accuracy["top-1"].endswith(" %")
    return capsys.readouterr().out.splitlines()


def test_a_line_a_minute_says_how_much_time_is_left(
    few: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The time of the sanity check is not that of steps, and its accuracy, of a few images, is not shown."""
    first, later, last = lines(few, monkeypatch, capsys)
    assert first == "epoch 1  step 1 of 10  0:01:30 left"
    assert later.startswith("epoch 2  step 7 of 10  0:00:30 left  loss ")
    assert "top-1" in later
    assert last.startswith("epoch 2  step 10 of 10  loss ")
    assert "left" not in last


def test_a_run_that_continues_counts_its_own_steps(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = trainer(max_epochs=1)
    runner.fit(pretrain(), data(few))
    runner.save_checkpoint(tmp_path / "five.ckpt")
    first, last = lines(few, monkeypatch, capsys, ckpt_path=tmp_path / "five.ckpt", weights_only=True)
    assert first.startswith("epoch 2  step 6 of 10  0:00:40 left")
    assert last.startswith("epoch 2  step 10 of 10")
