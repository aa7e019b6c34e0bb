"""What a finished run and an evaluation say: the command to go on with, and what was measured."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL, Result, done

from vitlit.cli import summary
from vitlit.weights.checkpoint import open_checkpoint

Command = Callable[..., Result]


def next_command(out: str) -> list[str]:
    """The words of the line that says what may come next, without the program."""
    (line,) = [line for line in out.splitlines() if line.startswith("  next ")]
    program, *words = shlex.split(line.removeprefix("  next "))
    assert Path(program).name == "vitlit"
    return words


def test_what_comes_next_keeps_size_and_patch_and_can_be_copied(vitlit: Command, few: Path, tmp_path: Path) -> None:
    words = next_command(done(vitlit("fit", *SMALL, "--data.root", few, "--model.vit.patch_size", 16)))
    assert words[words.index("--data.image_size") + 1] == "16"
    once = ("--trainer.max_steps", 2, "--model.schedule.warmup", 1, "--trainer.logger", "false")
    words = next_command(done(vitlit(*words, *once, "--data.num_workers", 0)))
    assert words == ["predict", "runs/pretrain-finetuned", str(few / "val"), "--out", "predictions.csv"]
    assert "11 images" in done(vitlit(*words))
    assert (tmp_path / "predictions.csv").is_file()


def test_the_program_is_named_so_that_a_shell_finds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert summary.program() == ".venv/bin/vitlit"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vitlit").touch(0o755)
    assert summary.program() == "vitlit"


def test_an_evaluation_says_of_what_and_keeps_its_numbers(vitlit: Command, finished: Path, few: Path) -> None:
    out = done(vitlit("validate", "runs/pretrain"))
    step = open_checkpoint(finished / "checkpoints" / "best.ckpt")["global_step"]
    assert f"runs/pretrain/checkpoints/best.ckpt (step {step}) on the val split of {few}, 11 images" in out
    kept = json.loads((finished / "validate.json").read_text())
    assert (kept["images"], kept["split"], kept["step"]) == (11, "val", step)
    assert kept["checkpoint"] == str(finished / "checkpoints" / "best.ckpt")
    assert kept["command"] == "vitlit validate runs/pretrain"
    assert f"{kept['metrics']['val/top1']:.6f}"[:6] in out
    last = finished / "checkpoints" / "last.ckpt"
    done(
        vitlit(
            "validate", "runs/pretrain", "--ckpt_path", last, "--trainer.limit_val_batches", 1, "--data.batch_size", 4
        )
    )
    kept = json.loads((finished / "validate.json").read_text())
    assert (kept["images"], kept["step"]) == (4, 6)
