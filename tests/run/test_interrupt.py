"""Signals, time limits and requeues: a run that they end is saved, and continues bit for bit."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Result, launched
from test_run import FIT, checkpoint, differences, rows, signalled, steps

from vitlit.cli import main as vitlit_cli
from vitlit.stages import Stage

Command = Callable[..., Result]


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
        """Make the third step take this long."""
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


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SLURM job with a scontrol that writes its arguments to a file; the path of that file."""
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
