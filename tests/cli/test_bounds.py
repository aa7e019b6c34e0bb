"""Command lines and environments that make no sense end in one line, before anything large is asked for."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL, Result, done, refused
from lightning.pytorch.loggers import CSVLogger

import vitlit
from vitlit.data.splits import Splits
from vitlit.files import expand

Command = Callable[..., Result]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--trainer.num_nodes 2", "trainer.num_nodes is 2: start each node with torchrun or srun"),
        ("--model.vit.drop_path_subset true", "drop_path_subset does nothing without model.vit.drop_path"),
        ("--run.root ~nobody-here/x", "there is no ~nobody-here"),
        ("--data.root $NO_SUCH_PLACE/x", "there is no $NO_SUCH_PLACE"),
    ],
)
def test_what_no_machine_has_is_refused(vitlit: Command, few: Path, tmp_path: Path, flags: str, words: str) -> None:
    refused(vitlit("fit", *SMALL, "--data.root", few, *flags.split()), words)
    assert not (tmp_path / "runs").exists()


def test_an_environment_that_no_launcher_left_is_named(vitlit: Command, few: Path) -> None:
    result = vitlit("fit", *SMALL, "--data.root", few, before=lambda: os.environ.update(RANK="1"))
    refused(result, "by the environment this is process 1, but none is 0")


def test_a_logger_that_fails_is_left_out_and_the_training_goes_on(vitlit: Command, few: Path, tmp_path: Path) -> None:
    def before() -> None:
        def fail(self: Any, metrics: Any, step: int | None = None) -> None:
            raise FileNotFoundError("media/table.json")

        CSVLogger.log_metrics = fail  # type: ignore[method-assign]

    logger = "{class_path: CSVLogger, init_args: {save_dir: board}}"
    result = vitlit("fit", *SMALL, "--data.root", few, "--trainer.logger", logger, before=before)
    assert done(result).count("CSVLogger failed (FileNotFoundError: media/table.json) and is left out") == 1
    assert (tmp_path / "runs" / "pretrain" / "finished.json").is_file()


def test_home_and_variables_are_replaced_in_every_path(vitlit: Command, few: Path, tmp_path: Path) -> None:
    def before() -> None:
        os.environ.update(HOME=str(tmp_path / "home"), IMAGES=str(few.parent))

    logger = "{class_path: CSVLogger, init_args: {save_dir: ~/board}}"
    flags = ("--data.root", f"$IMAGES/{few.name}", "--run.root", "~/runs", "--trainer.logger", logger)
    done(vitlit("fit", *SMALL, *flags, before=before))
    run = tmp_path / "home" / "runs" / "pretrain"
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["root"] == str(few)
    assert (tmp_path / "home" / "board").is_dir()
    assert "is complete at step 6" in vitlit("fit", *SMALL, *flags, before=before).out
    done(vitlit("predict", "~/runs/pretrain", few / "val" / "0", "--out=$HOME/out.csv", before=before))
    assert (tmp_path / "home" / "out.csv").is_file()
    assert not {path.name for path in tmp_path.iterdir()} & {"~", "$HOME", "$IMAGES", "runs"}


def test_home_and_variables_are_replaced_in_python(trained: Path, few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(trained))
    monkeypatch.setenv("IMAGES", str(few))
    assert vitlit.load("~/runs/pretrain").classes == vitlit.load("$HOME/runs/pretrain").classes == ["0", "1", "2", "3"]
    assert len(Splits("${IMAGES}", 0.0, None)["train"]) == 40
    assert expand("hf:a/$b") == "hf:a/$b"
    assert expand("s3://a/~b") == "s3://a/~b"
