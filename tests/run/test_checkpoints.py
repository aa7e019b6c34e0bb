"""Checkpoints: a damaged one, a full disk or a kill leaves the one before."""

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Result, refused
from test_run import FIT, checkpoint, differences, rows, signalled, steps

from vitlit.run.checkpoints import Last

Command = Callable[..., Result]


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

        partial = Path("runs/stopped/checkpoints/.last.ckpt.partial")

        def deadly(*arguments: Any) -> None:
            if moment == "write":
                left[0] -= partial.exists() and os.path.samestat(os.fstat(arguments[0]), partial.stat())
            else:
                left[0] -= "last.ckpt" in str(arguments)
            if not left[0]:
                if moment == "write":
                    os.truncate(partial, 1000)
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
    assert names == ["best.ckpt", "last.ckpt", "step-3.ckpt", "step-6.ckpt"]  # previous.ckpt served until the end
    assert [checkpoint(kept, f"step-{step}")["global_step"] for step in (3, 6)] == [3, 6]
    assert differences(checkpoint(finished)["state_dict"], checkpoint(kept, "step-6")["state_dict"]) == []
    for content in (b"no archive", None):
        (kept / "finished.json").unlink()
        for name in ("last.ckpt", "previous.ckpt"):
            (kept / "checkpoints" / name).unlink(missing_ok=True)  # last.ckpt is the same file as step-6.ckpt
            if content is not None:
                (kept / "checkpoints" / name).write_bytes(content)
        again = vitlit(*command)
        assert "runs/kept/checkpoints/step-6.ckpt, which is older, takes its place" in again.out
        assert again.code == 0
    (kept / "finished.json").unlink()
    for name in ("last", "previous", "step-3", "step-6"):
        (kept / "checkpoints" / f"{name}.ckpt").unlink(missing_ok=True)
    assert "has no checkpoint to continue from, so it begins again" in vitlit(*command).out
    branch = (*FIT, "--data.root", few, "--run.name", "branch", "--ckpt_path", kept / "checkpoints" / "step-3.ckpt")
    assert vitlit(*branch).code == 0
    assert differences(checkpoint(finished)["state_dict"], checkpoint(kept.parent / "branch")["state_dict"]) == []


def test_a_disk_that_gets_full_leaves_the_checkpoint_before(vitlit: Command, few: Path, finished: Path) -> None:
    """A limit on the size of files makes a write fail as a full disk does."""

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
