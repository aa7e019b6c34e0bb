"""The lock of a run: one process works on it, and a dead one is taken over."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from vitlit.errors import UserError
from vitlit.run.folder import RunFolder, RunOptions
from vitlit.run.lock import Lock


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
