"""The folder of a run: begun, continued, finished, interrupted, refused."""

import csv
import json
import os
import resource
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import SMALL, Result, launched
from torch.distributed import TCPStore

from vitlit.cli import main as vitlit_cli
from vitlit.errors import UserError
from vitlit.run.checkpoints import Last
from vitlit.run.folder import Decision, RunFolder, RunOptions, flatten, longer, seconds
from vitlit.run.lock import Lock
from vitlit.run.ranks import agree, exchange
from vitlit.stages import Stage

Command = Callable[..., Result]
FIT = ("fit", *SMALL, "--model.vit.dropout", "0.1")  # 6 steps, 2 an epoch
SPEED = ("train/images_per_second", "train/data_wait")


def signalled(step: int, *numbers: int, hook: str = "training_step", sanity: bool = False) -> Callable[[], None]:
    """Make a child send itself signals in the midst of a step, or of the validation after so many steps."""

    def before() -> None:
        original = getattr(Stage, hook)

        def patched(self: Stage, *arguments: Any) -> Any:
            if self.trainer.global_step == step and self.trainer.sanity_checking == sanity:
                for number in numbers:
                    os.kill(os.getpid(), number)
                    time.sleep(0.01)
            return original(self, *arguments)

        setattr(Stage, hook, patched)

    return before


def rows(run: Path) -> list[dict[str, str]]:
    """What metrics.csv holds, but for the speed."""
    with (run / "metrics.csv").open(newline="") as file:
        return [{name: cell for name, cell in row.items() if name not in SPEED} for row in csv.DictReader(file)]


def steps(run: Path) -> list[int]:
    return [int(row["step"]) for row in rows(run)]


def checkpoint(run: Path, name: str = "last") -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return loaded


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two trees of tensors and plain values differ in a bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{path}: {a.keys() ^ b.keys()}"]
        return [found for key in a for found in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)}"]
        return [found for i, pair in enumerate(zip(a, b, strict=True)) for found in differences(*pair, f"{path}.{i}")]
    return [] if a == b else [f"{path}: {a} and {b}"]


def files(run: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}


def refused(result: Result, *words: object) -> None:
    """It is one line, with these words in it, and exit code 2."""
    assert result.code == 2, result.err
    assert result.err.startswith("vitlit: error: ")
    assert result.err.count("\n") == 1
    for word in words:
        assert str(word) in result.err


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "pretrain"


@pytest.fixture
def finished(trained: Path, run: Path) -> Path:
    """The folder of a run that is complete."""
    shutil.copytree(trained / "runs", run.parent)
    return run


# The same command again, and another.


def test_a_finished_run_is_said_to_be_complete_and_left_alone(vitlit: Command, few: Path, finished: Path) -> None:
    before = files(finished)
    result = vitlit(*FIT, "--data.root", few, "--data.num_workers", 1, "--data.micro_batch", 8)
    assert result.code == 0
    assert "runs/pretrain is complete" in result.out
    assert "--run.overwrite true" in result.out
    assert files(finished) == before


def test_another_config_is_refused_with_the_differences_and_the_ways_out(
    vitlit: Command, few: Path, finished: Path
) -> None:
    before = files(finished)
    result = vitlit(*FIT, "--data.root", few, "--model.optimizer.lr", 0.5, "--data.batch_size", 8)
    refused(result, "data.batch_size 16 -> 8", "optimizer.init_args.lr 0.001 -> 0.5", "--run.name", "--run.overwrite")
    assert "complete at step 6" in vitlit(*FIT, "--data.root", few, "--trainer.max_steps", 4).out
    assert files(finished) == before


def test_overwriting_begins_again_in_an_empty_folder(vitlit: Command, few: Path, finished: Path) -> None:
    (finished / "notes.txt").write_text("mine")
    result = vitlit(*FIT, "--data.root", few, "--trainer.max_steps", 4, "--run.overwrite", "true")
    assert result.code == 0, result.err
    assert not (finished / "notes.txt").exists()
    assert steps(finished) == [0, 1, 2, 3]
    saved = yaml.safe_load((finished / "config.yaml").read_text())
    assert saved["trainer"]["max_steps"] == 4
    assert saved["run"]["overwrite"] is False


@pytest.mark.parametrize("ends", [(3, 4, 7), (2, 6)])
def test_more_steps_continue_a_finished_run(vitlit: Command, few: Path, run: Path, ends: tuple[int, ...]) -> None:
    head = ""
    for end in ends:
        result = vitlit(*FIT, "--data.root", few, "--trainer.max_steps", end, "--model.schedule.warmup", 1)
        assert result.code == 0, result.err
        assert ("continuing runs/pretrain" in result.out) == bool(head)
        assert not result.err
        assert steps(run) == list(range(end))
        assert rows(run)[-1]["val/top1"]
        assert (run / "metrics.csv").read_text().startswith(head)
        head = (run / "metrics.csv").read_text()
        assert checkpoint(run)["global_step"] == end


def test_more_epochs_continue_a_finished_run(vitlit: Command, few: Path, run: Path) -> None:
    endless = ("--trainer.max_steps", -1, "--model.schedule.warmup", 1)
    for epochs in (1, 3):
        result = vitlit(*FIT, "--data.root", few, *endless, "--trainer.max_epochs", epochs)
        assert result.code == 0, result.err
        assert [row["epoch"] for row in rows(run)] == [str(epoch) for epoch in range(epochs) for _ in range(2)]
        assert steps(run) == list(range(2 * epochs))


def test_a_folder_that_is_no_run_is_refused_even_if_told_to_overwrite(vitlit: Command, few: Path, run: Path) -> None:
    run.mkdir(parents=True)
    (run / "thesis.tex").write_text("mine")
    refused(vitlit(*FIT, "--data.root", few, "--run.overwrite", "true"), "runs/pretrain", "--run.name")
    assert (run / "thesis.tex").read_text() == "mine"


def test_a_run_without_a_checkpoint_is_begun_again_with_another_config(vitlit: Command, few: Path, run: Path) -> None:
    refused(vitlit(*FIT, "--data.root", few, "--model.schedule.warmup", 6), "model.schedule.warmup is 6")
    assert not (run / "checkpoints").exists()
    assert vitlit(*FIT, "--data.root", few).code == 0


@pytest.mark.parametrize("place", ["runs", "runs/pretrain"])
def test_a_file_in_the_place_of_the_folder_is_refused(vitlit: Command, few: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("a file")
    refused(vitlit(*FIT, "--data.root", few), "runs/pretrain", "give another")


def test_a_config_that_a_run_left_repeats_it_bit_for_bit(vitlit: Command, finished: Path) -> None:
    result = vitlit("fit", "--config", finished / "config.yaml", "--run.name", "again")
    assert result.code == 0, result.err
    again = finished.parent / "again"
    assert differences(checkpoint(finished)["state_dict"], checkpoint(again)["state_dict"]) == []
    assert rows(again) == rows(finished)


# Interruptions.


@pytest.mark.parametrize(
    ("number", "hook", "step", "workers"),
    [
        (signal.SIGTERM, "training_step", 0, (0, 2)),
        (signal.SIGTERM, "training_step", 1, (0, 0)),  # ends an epoch
        (signal.SIGINT, "training_step", 2, (2, 2)),
        (signal.SIGTERM, "validation_step", 4, (2, 0)),
        (signal.SIGUSR1, "training_step", 2, (0, 0)),
    ],
)
def test_a_run_that_a_signal_ended_continues_bit_for_bit(
    vitlit: Command, few: Path, finished: Path, number: int, hook: str, step: int, workers: tuple[int, int]
) -> None:
    command = (*FIT, "--data.root", few, "--run.name", "stopped", "--data.num_workers")
    stopped = finished.parent / "stopped"
    result = vitlit(*command, workers[0], before=signalled(step, number, hook=hook))
    assert result.code == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 75}[signal.Signals(number)]
    at = checkpoint(stopped)["global_step"]
    assert at == step + (hook == "training_step")
    name = signal.Signals(number).name
    assert f"stopped by {name} after step {at}; the same command continues the run" in result.out
    assert not result.err
    assert not (stopped / "finished.json").exists()

    result = vitlit(*command, workers[1])
    assert result.code == 0, result.err
    assert "continuing runs/stopped" in result.out
    assert not result.err
    whole, parts = checkpoint(finished), checkpoint(stopped)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "loops"):
        assert differences(whole[key], parts[key], key) == []
    assert differences(checkpoint(finished, "best")["state_dict"], checkpoint(stopped, "best")["state_dict"]) == []
    assert rows(stopped) == rows(finished)


def test_a_time_limit_stops_a_run_which_continues_bit_for_bit(vitlit: Command, few: Path, finished: Path) -> None:
    def ten_minutes() -> None:
        """The third step takes so long."""
        original, clock = Stage.training_step, time.monotonic

        def training_step(self: Stage, *arguments: Any) -> Any:
            if self.trainer.global_step == 2:
                setattr(time, "monotonic", lambda: clock() + 600)  # noqa: B010
            return original(self, *arguments)

        setattr(Stage, "training_step", training_step)  # noqa: B010

    command = (*FIT, "--data.root", few, "--run.name", "stopped", "--run.time_limit")
    stopped = finished.parent / "stopped"
    result = vitlit(*command, "0:10:00", before=ten_minutes)
    assert result.code == 75
    assert "stopped by run.time_limit after step 3; the same command continues the run" in result.out
    assert vitlit(*command, 3600).code == 0
    assert differences(checkpoint(finished)["state_dict"], checkpoint(stopped)["state_dict"]) == []
    assert rows(stopped) == rows(finished)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("01:30:00", 5400), ("1:02:03:04", 93784), ("1-02:03:04", 93784), (5400, 5400), ("90", 90)],
)
def test_a_time_limit_is_hours_minutes_and_seconds(limit: int | str, expected: int) -> None:
    assert seconds(limit) == expected


@pytest.mark.parametrize("limit", ["soon", "1:30", "-5", "0", "", "1:2:3:4:5", "1h"])
def test_a_time_limit_that_is_none_is_refused(limit: str) -> None:
    with pytest.raises(UserError, match="is no time; give HH:MM:SS"):
        seconds(limit)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of SLURM's, whose scontrol notes what it is asked; the file of its notes."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    notes, tool = tmp_path / "scontrol.txt", tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" >> {notes}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    return notes


def test_a_job_that_asks_for_its_end_is_requeued_after_the_save(
    vitlit: Command, few: Path, run: Path, slurm: Path
) -> None:
    for step, number in ((1, signal.SIGTERM), (3, signal.SIGUSR1)):
        result = vitlit(*FIT, "--data.root", few, before=signalled(step, number))
        assert slurm.exists() == (number == signal.SIGUSR1)
    assert slurm.read_text() == "requeue 77\n"
    assert result.code == 75
    assert "SLURM job 77 is requeued" in result.out
    assert checkpoint(run)["global_step"] == 4
    assert not list(run.parent.rglob("hpc_ckpt*"))


def test_a_job_that_is_not_requeued_says_so(
    vitlit: Command, few: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (slurm.parent / "bin" / "scontrol").write_text("#!/bin/sh\necho no such job >&2; exit 1\n")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    result = vitlit(*FIT, "--data.root", few, before=signalled(1, signal.SIGUSR1))
    assert result.code == 75
    assert "scontrol did not requeue job 70_7 (no such job); submit it again" in result.out


# Several processes.


@pytest.mark.parametrize("who", ["group", 0, 1])
def test_a_signal_to_any_process_stops_all_at_one_step(who: str | int, few: Path, tmp_path: Path) -> None:
    def send(children: list[int]) -> None:
        metrics = tmp_path / "runs" / "pretrain" / "metrics.csv"
        while not metrics.exists() or metrics.read_text().count("\n") < 4:
            time.sleep(0.01)
        for child in children:
            if who == "group":
                os.killpg(child, signal.SIGTERM)  # its data workers, too
            elif child == children[int(who)]:
                os.kill(child, signal.SIGTERM)

    flags = ("--data.num_workers", 2, "--trainer.max_steps", 2000, "--trainer.limit_val_batches", 1)
    command = (*FIT, "--data.root", few, *flags)
    results = launched(2, *command, cwd=tmp_path, meanwhile=send)
    assert [result.code for result in results] == [143, 143], [result.err for result in results]
    said = [line for result in results for line in result.out.splitlines() if "stopped by" in line]
    run = tmp_path / "runs" / "pretrain"
    at = checkpoint(run)["global_step"]
    assert said == [f"stopped by SIGTERM after step {at}; the same command continues the run"]
    assert steps(run)[-1] == at - 1
    assert checkpoint(run)["ImageFolderData"]["step"] == at


# Checkpoints.


def test_a_damaged_checkpoint_gives_way_to_the_one_before(vitlit: Command, few: Path, finished: Path) -> None:
    command = (*FIT, "--data.root", few, "--run.name", "stopped")
    stopped = finished.parent / "stopped"
    assert vitlit(*command, before=signalled(4, signal.SIGTERM)).code == 143
    last = stopped / "checkpoints" / "last.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    refused(vitlit("fit", *FIT[1:], "--data.root", few, "--run.name", "x", "--ckpt_path", last), last, "a damaged one")
    result = vitlit(*command)
    assert result.code == 0, result.err
    assert "runs/stopped/checkpoints/last.ckpt is not a checkpoint, or a damaged one: the checksum of" in result.out
    assert "continuing runs/stopped from runs/stopped/checkpoints/previous.ckpt" in result.out
    assert differences(checkpoint(finished)["state_dict"], checkpoint(stopped)["state_dict"]) == []
    assert rows(stopped) == rows(finished)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(vitlit: Command, few: Path, run: Path) -> None:
    assert vitlit(*FIT, "--data.root", few, before=signalled(4, signal.SIGTERM)).code == 143
    for name in ("last", "previous"):
        file = run / "checkpoints" / f"{name}.ckpt"
        file.write_bytes(file.read_bytes()[:-100])
    refused(vitlit(*FIT, "--data.root", few), "last.ckpt is not", "previous.ckpt is not", "--run.overwrite true")


@pytest.mark.parametrize("moment", ["write", "link", "replace"])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    moment: str, vitlit: Command, few: Path, finished: Path
) -> None:
    name = {"write": "fsync"}.get(moment, moment)

    def before() -> None:
        original = getattr(os, name)
        left = [4]

        def deadly(*arguments: Any) -> None:
            left[0] -= moment == "write" or "last.ckpt" in str(arguments)
            if not left[0]:
                if moment == "write":
                    os.ftruncate(arguments[0], 1000)
                os.kill(os.getpid(), signal.SIGKILL)
            original(*arguments)

        setattr(os, name, deadly)

    command = (*FIT, "--data.root", few, "--run.name", "stopped", "--run.save_minutes", 0)
    stopped = finished.parent / "stopped"
    assert vitlit(*command, before=before).code == -signal.SIGKILL
    assert 0 < checkpoint(stopped)["global_step"] < 6
    assert vitlit(*command).code == 0
    assert differences(checkpoint(finished)["state_dict"], checkpoint(stopped)["state_dict"]) == []
    assert rows(stopped) == rows(finished)


def test_checkpoints_are_kept_for_good(vitlit: Command, few: Path, finished: Path) -> None:
    command = (*FIT, "--data.root", few, "--run.name", "kept", "--run.keep_every", 3)  # in and at the end of an epoch
    assert vitlit(*command).code == 0
    kept = finished.parent / "kept"
    names = sorted(path.name for path in (kept / "checkpoints").iterdir())
    assert names == ["best.ckpt", "last.ckpt", "previous.ckpt", "step-3.ckpt", "step-6.ckpt"]
    assert [checkpoint(kept, f"step-{step}")["global_step"] for step in (3, 6)] == [3, 6]
    assert differences(checkpoint(finished)["state_dict"], checkpoint(kept, "step-6")["state_dict"]) == []
    for content in (b"no archive", None):
        (kept / "finished.json").unlink()
        for name in ("last.ckpt", "previous.ckpt"):
            (kept / "checkpoints" / name).unlink()  # the same file as step-6.ckpt
            if content is not None:
                (kept / "checkpoints" / name).write_bytes(content)
        again = vitlit(*command)
        assert "runs/kept/checkpoints/step-6.ckpt, which is older, takes its place" in again.out
        assert again.code == 0
    (kept / "finished.json").unlink()
    for name in ("last", "previous", "step-3", "step-6"):
        (kept / "checkpoints" / f"{name}.ckpt").unlink(missing_ok=True)
    assert "has no checkpoint to continue from, so that it begins again" in vitlit(*command).out
    branch = (*FIT, "--data.root", few, "--run.name", "branch", "--ckpt_path", kept / "checkpoints" / "step-3.ckpt")
    assert vitlit(*branch).code == 0
    assert differences(checkpoint(finished)["state_dict"], checkpoint(kept.parent / "branch")["state_dict"]) == []


def test_a_run_may_be_renamed(vitlit: Command, few: Path, run: Path) -> None:
    assert vitlit(*FIT, "--data.root", few, before=signalled(4, signal.SIGTERM)).code == 143
    run.rename(run.parent / "renamed")
    result = vitlit(*FIT, "--data.root", few, "--run.name", "renamed")
    assert result.code == 0, result.err
    assert "continuing runs/renamed from runs/renamed/checkpoints/last.ckpt" in result.out


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("finished.json", b'{"st', ["finished.json is damaged; remove it"]),
        ("config.yaml", None, ["has no config.yaml", "--run.name"]),
        ("metrics.csv", b"step,\xff\n0,1\n", ["metrics.csv is damaged; move it away"]),
        ("metrics.csv", b"train/loss\n1\n", ["metrics.csv is damaged; move it away"]),
    ],
)
def test_a_damaged_file_of_a_run_is_named(
    file: str, content: bytes | None, words: list[str], vitlit: Command, few: Path, trained: Path, run: Path
) -> None:
    shutil.copytree(trained / "runs" / "pretrain", run)
    (run / file).unlink() if content is None else (run / file).write_bytes(content)
    longer = ["--trainer.max_steps", 7] if file == "metrics.csv" else []
    refused(vitlit(*FIT, "--data.root", few, *longer), *words)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_a_signal_before_training_ends_a_run_with_the_code_of_one_in_it(
    number: signal.Signals, code: int, vitlit: Command, few: Path, run: Path
) -> None:
    def before() -> None:
        def importing(name: str) -> Any:
            os.kill(os.getpid(), number)  # while modules are imported, which takes seconds
            return original(name)

        original = vitlit_cli.import_module
        setattr(vitlit_cli, "import_module", importing)  # noqa: B010

    result = vitlit(*FIT, "--data.root", few, before=before)
    assert result.code == code
    assert f"stopped by {number.name} outside of training; the same command continues the run" in result.out
    assert not run.exists()


def test_a_disk_that_is_too_small_is_refused(vitlit: Command, few: Path, run: Path) -> None:
    def before() -> None:
        setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))  # noqa: B010

    refused(vitlit(*FIT, "--data.root", few, before=before), "the disk of runs/pretrain has 0 MB left", "--run.root")
    assert not run.exists()


def test_a_disk_that_gets_full_leaves_the_checkpoint_before(vitlit: Command, few: Path, finished: Path) -> None:
    """A file may not grow beyond some size, which a write reports as a full disk is."""

    def before() -> None:
        original = Last.save

        def save(self: Last, trainer: Any) -> None:
            if trainer.global_step == 4:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
            original(self, trainer)

        setattr(Last, "save", save)  # noqa: B010

    command = (*FIT, "--data.root", few, "--run.name", "stopped")
    stopped = finished.parent / "stopped"
    refused(vitlit(*command, before=before), "cannot write runs/stopped/checkpoints/last.ckpt: File too large", "room")
    assert not list(stopped.rglob("*.partial"))
    assert checkpoint(stopped)["global_step"] == 2
    assert vitlit(*command).code == 0
    assert differences(checkpoint(finished)["state_dict"], checkpoint(stopped)["state_dict"]) == []


def test_a_killed_run_continues_from_its_last_epoch_and_logs_no_step_twice(
    vitlit: Command, few: Path, run: Path
) -> None:
    longer_epochs = (*FIT, "--data.root", few, "--data.batch_size", 8, "--trainer.max_steps", 10)  # 5 an epoch
    assert vitlit(*longer_epochs, before=signalled(8, signal.SIGKILL)).code == -signal.SIGKILL
    assert steps(run) == list(range(8))
    assert vitlit(*longer_epochs).code == 0
    assert steps(run) == list(range(10))


def test_a_finished_run_that_is_stopped_while_made_longer_is_unfinished(vitlit: Command, few: Path, run: Path) -> None:
    assert vitlit(*FIT, "--data.root", few, "--trainer.max_steps", 4).code == 0
    assert vitlit(*FIT, "--data.root", few, before=signalled(4, signal.SIGTERM)).code == 143
    assert not (run / "finished.json").exists()
    assert "continuing" in vitlit(*FIT, "--data.root", few).out
    assert steps(run) == list(range(6))


def test_a_signal_in_the_last_step_lets_the_run_finish(vitlit: Command, few: Path, run: Path) -> None:
    assert vitlit(*FIT, "--data.root", few, before=signalled(5, signal.SIGTERM)).code == 0
    assert (run / "finished.json").exists()
    assert rows(run)[-1]["val/top1"]


def test_a_second_ctrl_c_stops_at_once(vitlit: Command, few: Path, run: Path) -> None:
    result = vitlit(*FIT, "--data.root", few, before=signalled(1, signal.SIGINT, signal.SIGINT))
    assert result.code == 130
    assert "Traceback" not in result.err
    assert not (run / "checkpoints").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_has_its_exit_code(vitlit: Command, few: Path, number: int) -> None:
    before = signalled(0, number, hook="validation_step", sanity=True)
    result = vitlit(*FIT, "--data.root", few, before=before)
    assert result.code == 128 + number
    assert "Traceback" not in result.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_an_evaluation_has_its_exit_code(
    vitlit: Command, few: Path, finished: Path, number: int
) -> None:
    before = signalled(0, number, hook="validation_step")
    result = vitlit("validate", finished, "--data.batch_size", 4, before=before)
    assert result.code == 128 + number
    assert "Traceback" not in result.err


def test_an_unfinished_run_takes_other_settings_of_how_it_is_computed_alone(
    vitlit: Command, few: Path, run: Path
) -> None:
    result = vitlit(*FIT, "--data.root", few, before=signalled(2, signal.SIGTERM))
    assert result.code == 143
    refused(vitlit(*FIT, "--data.root", few, "--trainer.max_steps", 8), "trainer.max_steps 6 -> 8")
    free = ("--data.micro_batch", 8, "--data.prefetch", 1, "--trainer.enable_progress_bar", "false")
    result = vitlit(*FIT, "--data.root", few, "--data.num_workers", 1, *free, "--trainer.accelerator", "cpu")
    assert result.code == 0, result.err
    assert steps(run) == list(range(6))


# The folder's own decisions.


def folder(tmp_path: Path, **options: Any) -> RunFolder:
    return RunFolder(RunOptions(root=str(tmp_path), **options), "configs/mine.yaml")


def begun(tmp_path: Path, config: dict[str, Any], finished: bool = False) -> RunFolder:
    made = folder(tmp_path)
    made.begin(config, overwrite=False)
    made.last.parent.mkdir()
    torch.save({}, made.last)
    if finished:
        made.finish(6)
    return made


def test_a_run_is_named_by_itself_or_its_config(tmp_path: Path) -> None:
    assert folder(tmp_path).path == tmp_path / "mine"
    assert folder(tmp_path, name="yours").path == tmp_path / "yours"


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../up", "/", "/tmp/up", "a\0b", "a" * 300])
def test_a_name_that_leads_out_of_the_root_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"run\.root"):
        folder(tmp_path, name=name)


def test_runs_of_a_sweep_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    assert folder(tmp_path).name == "mine"  # WANDB_RUN_ID alone is no sweep
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    assert folder(tmp_path).name == "mine-abc123"


def test_an_empty_or_missing_folder_is_begun(tmp_path: Path) -> None:
    assert folder(tmp_path).decide({}, overwrite=False) == Decision("begin", "")
    (tmp_path / "mine").mkdir()
    assert folder(tmp_path).decide({}, overwrite=False) == Decision("begin", "")


def test_a_run_is_continued_until_it_is_finished(tmp_path: Path) -> None:
    config = {"model": {"depth": 2, "vit": None}}
    made = begun(tmp_path, config)
    assert made.decide({"model": {"depth": 2}}, overwrite=False) == Decision("continue", str(made.last))
    made.finish(6)
    assert made.decide(config, overwrite=False) == Decision("finished", "")
    assert made.decide(config, overwrite=True) == Decision("begin", "")


@pytest.mark.parametrize(
    ("key", "value", "free"),
    [
        ("data.num_workers", 4, True),
        ("data.micro_batch", 4, True),
        ("trainer.devices", 4, True),
        ("trainer.logger.init_args.project", "p", True),
        ("run.root", "elsewhere", True),
        ("run.monitor", "val/loss", False),
        ("data.seed", 4, False),
        ("data.batch_size", 4, False),
        ("trainer.precision", "bf16-mixed", False),
        ("trainer.gradient_clip_val", 4, False),
    ],
)
def test_only_settings_of_how_a_run_is_computed_may_differ(tmp_path: Path, key: str, value: Any, free: bool) -> None:
    made = begun(tmp_path, {})
    config: Any = value
    for part in reversed(key.split(".")):
        config = {part: config}
    if free:
        assert made.decide(config, overwrite=False).action == "continue"
    else:
        with pytest.raises(UserError, match=f"{key} None -> {value}"):
            made.decide(config, overwrite=False)


def test_many_differences_are_counted_after_the_first_eight(tmp_path: Path) -> None:
    made = begun(tmp_path, {})
    with pytest.raises(UserError, match="and 3 more"):
        made.decide({f"key{i}": i + 1 for i in range(11)}, overwrite=False)


def test_only_a_finished_run_may_be_made_longer(tmp_path: Path) -> None:
    config, more = {"trainer": {"max_epochs": 2}}, {"trainer": {"max_epochs": 3}}
    made = begun(tmp_path, config)
    with pytest.raises(UserError, match="max_epochs 2 -> 3"):
        made.decide(more, overwrite=False)
    made.finish(6)
    assert made.decide(more, overwrite=False).action == "continue"
    with pytest.raises(UserError, match="lr None -> 1"):
        made.decide({**more, "lr": 1}, overwrite=False)


def test_overwriting_a_link_to_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mine").symlink_to(tmp_path / "elsewhere")
    made = begun(tmp_path, {})
    with pytest.raises(UserError, match="symbolic link"):
        made.begin({}, overwrite=True)
    assert made.last.exists()


@pytest.mark.parametrize(
    ("before", "after", "more"),
    [(2, 3, True), (3, 2, False), (2, 2, False), (2, -1, True), (2, None, True), (-1, 9, False), (None, 9, False)],
)
def test_a_limit_is_longer_if_it_allows_more(before: int | None, after: int | None, more: bool) -> None:
    assert longer(before, after) is more


def test_flattening_joins_keys_and_drops_what_is_none() -> None:
    nested = {"a": {"b": {"c": 1, "d": None}}, "e": [{"f": 2}], "g": {}, "h": False}
    assert flatten(nested) == {"a.b.c": 1, "e": [{"f": 2}], "h": False}


# Agreement among ranks.


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher of this machine, and what a test sets is taken back."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    for name in ("VITLIT_DECISION", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def agreed(decision: Decision, run: Path) -> list[Decision]:
    """What a rank that waits, and rank 0 that decides, take the decision to be."""
    heard: list[Decision] = []
    other = threading.Thread(target=lambda: heard.append(exchange(None, run)), daemon=True)
    other.start()
    time.sleep(0.1)
    assert not heard
    own = exchange(decision, run)
    other.join(10)
    del os.environ["VITLIT_DECISION"]
    return [*heard, own]


@pytest.mark.usefixtures("alone")
def test_one_process_decides_for_those_that_lightning_launches(tmp_path: Path) -> None:
    decision = Decision("continue", "last.ckpt")
    assert exchange(decision, tmp_path) == decision
    assert exchange(None, tmp_path) == decision  # in the environment that they inherit


@pytest.mark.usefixtures("alone")
def test_under_torchrun_all_ranks_hear_the_decision_of_each_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    first, second = Decision("begin", ""), Decision("continue", "last.ckpt")
    assert agreed(first, tmp_path) == [first, first]
    # The store outlives a restart, of which agents on other machines may have counted none. A rank had asked and died.
    store.add(f"vitlit/{tmp_path}/asked", 1)
    store.set("default_pg/0/rank_0", "the address of a process that died")
    assert agreed(second, tmp_path) == [second, second]
    assert not any(name.startswith("default_pg") for name in store.list_keys())
    store.set_timeout(timedelta(seconds=0.2))
    monkeypatch.setattr("torch.distributed.TCPStore", lambda *args, **kwargs: store)
    with pytest.raises(UserError, match="of 2 processes only 1 have come"):
        exchange(first, tmp_path)
    monkeypatch.delenv("VITLIT_DECISION")
    with pytest.raises(UserError, match="rank 0 has not come"):
        exchange(None, tmp_path / "other")


@pytest.mark.usefixtures("alone")
def test_under_slurm_all_ranks_hear_the_decision_of_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    first, second = Decision("begin", ""), Decision("continue", "last.ckpt")
    assert agreed(first, tmp_path / "runs" / "a") == [first, first]
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    assert agreed(second, tmp_path / "runs" / "a") == [second, second]
    assert not list((tmp_path / "runs").iterdir())  # what they met in is removed


@pytest.mark.usefixtures("alone")
def test_processes_of_an_unknown_launcher_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun"):
        exchange(Decision("begin", ""), tmp_path)


def test_ranks_with_different_configs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITLIT_DECISION", "")  # forgotten afterwards
    decided = agree(Decision("begin", ""), tmp_path, {"model": {"lr": 1e-3}})
    assert decided.action == "begin"
    assert agree(None, tmp_path, {"model": {"lr": 1e-3}}) == decided
    with pytest.raises(UserError, match="different configs"):
        agree(None, tmp_path, {"model": {"lr": 1e-2}})


def test_what_rank_0_refuses_ends_the_others_in_silence(few: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "runs", tmp_path / "runs")
    results = launched(2, "fit", *SMALL, "--data.root", few, "--model.vit.dropout", 0.5, cwd=tmp_path)
    assert [result.code for result in results] == [2, 2]
    assert "made with another config (model.init_args.vit.init_args.dropout 0.1 -> 0.5" in results[0].err
    assert results[1].err == ""


def test_two_processes_do_not_work_on_one_run(tmp_path: Path) -> None:
    first, second = (RunFolder(RunOptions(name="x", root=str(tmp_path)), None) for _ in range(2))
    first.begin({"run": {}}, overwrite=False)
    with pytest.raises(
        UserError, match=rf"another process is at work on the run .*x \(.*{os.getpid()}.*; give|another"
    ):
        second.begin({"run": {}}, overwrite=True)
    assert (tmp_path / "x" / "config.yaml").exists()


def lock_of(folder: Path, **holder: Any) -> Lock:
    lock = Lock(folder / ".x.lock")
    lock.path.write_text(json.dumps({"host": "elsewhere", "pid": 12, "job": None, **holder}) + "\n")
    return lock


def test_a_heartbeat_on_another_machine_is_respected_for_two_minutes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"another process is at work on x .*elsewhere"):
        lock_of(tmp_path).take("x")
    lock = lock_of(tmp_path)
    past = time.time() - 121
    os.utime(lock.path, (past, past))
    lock.take("x")
    assert json.loads(lock.path.read_text())["pid"] == os.getpid()
    lock.release()
    assert lock.path.read_text() == ""


def test_the_same_job_or_machine_is_taken_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with pytest.raises(UserError, match="another process"):
        lock_of(tmp_path, job="78").take("x")
    for holder in ({"job": "77"}, {"host": socket.gethostname(), "job": "78"}):
        lock = lock_of(tmp_path, **holder)
        lock.take("x")
        lock.release()


def test_a_lock_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitlit.run.lock.BEAT", 0.01)
    lock = Lock(tmp_path / ".x.lock")
    lock.take("x")
    os.utime(lock.path, (0, 0))
    while lock.path.stat().st_mtime == 0:
        time.sleep(0.01)
    lock.release()


def test_a_run_that_was_made_longer_is_complete_for_the_first_command_too(
    vitlit: Callable[..., Result], few: Path, finished: Path
) -> None:
    assert vitlit(*FIT, "--data.root", few, "--trainer.max_steps", 8).code == 0
    result = vitlit(*FIT, "--data.root", few)
    assert result.code == 0
    assert "is complete" in result.out
