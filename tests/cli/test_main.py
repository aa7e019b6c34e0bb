"""The command line before a run: help, configs, bugs and the exit codes."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, Result, command, done, refused

from vitlit import __version__, doctor
from vitlit.cli.main import HELP, explain
from vitlit.errors import UserError
from vitlit.stages import Stage

Command = Callable[..., Result]


@pytest.mark.parametrize("command", ["validate", "test", "predict", "fit"])
def test_a_command_without_a_config_says_what_it_takes(vitlit: Command, command: str) -> None:
    refused(vitlit(command), f"{command} needs --config CONFIG")


@pytest.mark.parametrize("name", ["pretrain", "configs/pretrain.yaml"])
def test_a_shipped_config_is_found_by_its_name_in_any_folder(vitlit: Command, tmp_path: Path, name: str) -> None:
    refused(vitlit("fit", "--config", name, "--data.root", "nowhere"), "data.root nowhere")


def debug() -> None:
    os.environ["VITLIT_DEBUG"] = "1"


def bug() -> None:
    def training_step(*arguments: object) -> None:
        raise RuntimeError("a bug")

    setattr(Stage, "training_step", training_step)  # noqa: B010


def test_vitlit_debug_shows_a_mistakes_traceback(vitlit: Command) -> None:
    result = vitlit("fit", *SMALL, "--data.root", "nowhere", before=debug)
    assert result.code == 1
    assert "Traceback" in result.err
    assert "UserError: data.root nowhere" in result.err


def test_a_bug_keeps_its_traceback(vitlit: Command, few: Path) -> None:
    result = vitlit("fit", *SMALL, "--data.root", few, before=bug)
    assert result.code == 1
    assert "Traceback" in result.err
    assert "RuntimeError: a bug" in result.err
    assert "vitlit: error" not in result.err


def test_a_mistake_is_found_behind_the_errors_that_it_caused() -> None:
    bug, mistake = RuntimeError("a bug"), UserError("a\nmistake")
    assert explain(bug) is None
    bug.__cause__ = RuntimeError("another")
    bug.__cause__.__context__ = mistake
    assert explain(bug) == "a mistake"


def test_help_version_and_unknown_commands_answer_without_torch() -> None:
    code = """if True:
        import sys
        from vitlit.cli.main import main
        codes = [main(line.split()) for line in ("", "--help fit", "--version", "config pretrain", "fti", "frobnicate",
                                                "data show nowhere --step 1")]
        print(codes, [name for name in ("torch", "lightning", "wandb", "numpy") if name in sys.modules])
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == f"{HELP}{HELP}vitlit {__version__}\n{Path(SMALL[1]).read_text()}[0, 0, 0, 0, 2, 2, 2] []\n"
    assert result.stderr.splitlines() == [
        "vitlit: error: no command 'fti'; did you mean fit?",
        "vitlit: error: no command 'frobnicate'; vitlit --help lists them",
        "vitlit: error: nowhere is not the folder of a run; `vitlit runs ROOT` lists those in ROOT",
    ]


def test_config_lists_and_prints_what_is_shipped(vitlit: Command) -> None:
    assert "\n  pretrain\n" in done(vitlit("config"))
    assert done(vitlit("config", "pretrain")) == Path(SMALL[1]).read_text()
    refused(vitlit("config", "pretrian"), "did you mean pretrain?")


@pytest.mark.parametrize("arguments", [["digits"], ["digits", "a", "b"], ["--out", "a"], ["imagenet", "a"]])
def test_data_says_how_it_is_used(vitlit: Command, arguments: list[str]) -> None:
    refused(vitlit("data", *arguments), "vitlit data", "--help says more")


def test_predict_says_first_what_it_takes(vitlit: Command) -> None:
    usage, _, about, *_ = done(vitlit("predict", "--help")).splitlines()
    assert usage == "usage: vitlit predict RUN PHOTOS... [--out FILE.csv] [--KEY VALUE ...]"
    assert about == "Classify PHOTOS: images, or folders searched to their depth."


@pytest.mark.parametrize(
    "arguments", ["config", "data check --help", "data show runs/pretrain --step 3", "data check images"]
)
def test_a_reader_that_goes_ends_a_command_in_silence(arguments: str, work: Path, few: Path) -> None:
    (work / "images").symlink_to(few)
    reader, writer = os.pipe()
    os.close(reader)
    result = command(*arguments.split(), cwd=work, before=lambda: os.dup2(writer, 1))
    os.close(writer)
    assert (result.code, result.err) == (141, "")


def test_so_it_does_where_nothing_is_buffered(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)

    def unbuffered() -> None:  # as PYTHONUNBUFFERED makes it
        raw: Any = io.FileIO(1, "w", closefd=False)
        sys.stdout = io.TextIOWrapper(raw, write_through=True)
        os.dup2(writer, 1)

    result = command("config", cwd=tmp_path, before=unbuffered)
    os.close(writer)
    assert (result.code, result.err) == (141, "")


def test_another_pipe_that_breaks_is_a_bug(vitlit: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: list[str]) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(doctor, "run", broken)
    result = vitlit("doctor")
    assert result.code == 1
    assert "BrokenPipeError" in result.err


def test_data_lists_its_commands_and_each_has_help(vitlit: Command) -> None:
    for arguments in (["data"], ["data", "--help"], ["data", "digits", "-h"]):
        assert all(name in done(vitlit(*arguments)) for name in ("cifar10", "imagenet", "check", "shard"))
    assert "TARS" in done(vitlit("data", "imagenet", "--help"))
    for arguments in (["data", "check"], ["data", "shard"], ["benchmark"], ["benchmark", "data"]):
        assert "ROOT" in done(vitlit(*arguments, "--help"))
