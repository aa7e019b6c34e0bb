"""The lock of a run: one process works on it, and a dead one is taken over."""

import os
import signal
import socket
import time
from functools import partial
from pathlib import Path

import pytest
from conftest import finish, start

from vitlit.errors import UserError
from vitlit.run.folder import RunFolder, RunOptions
from vitlit.run.lock import take


def test_two_processes_do_not_work_on_one_run(tmp_path: Path) -> None:
    first, second = (RunFolder(RunOptions(name="x", root=str(tmp_path)), None) for _ in range(2))
    first.begin({"run": {}})
    with pytest.raises(UserError, match=rf"at work on the run .*x \(process {os.getpid()} on .*another --run.name"):
        second.begin({"run": {}})
    first.lock.release()
    second.begin({"run": {}})
    assert {path.name for path in (tmp_path / "x").iterdir()} == {".lock", "config.yaml"}


def hold(lock: Path, host: str) -> int:
    """In a child, as if on this host: hold the lock until it is killed; 3 if another holds it."""
    setattr(socket, "gethostname", lambda: host)  # noqa: B010
    try:
        take(lock, "x")
    except UserError:
        return 3
    lock.with_name("held").touch()
    time.sleep(100)
    return 0


@pytest.mark.parametrize("host", [socket.gethostname(), "elsewhere"])
def test_a_living_process_is_respected_and_a_dead_one_replaced(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vitlit.run.lock.SILENT", 0.5)
    lock, here = tmp_path / ".lock", host == socket.gethostname()
    child = start(partial(hold, lock, host), tmp_path)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match=rf"another process is at work on x \(process {child} on {host}\); wait"):
        take(lock, "x")
    os.kill(child, signal.SIGKILL)
    finish(child, tmp_path)
    began = time.monotonic()
    take(lock, "x").release()
    assert here or time.monotonic() - began > 0.4  # it might only be slow
    assert capsys.readouterr().out.count(f"x was left to process {child} on elsewhere: waiting") == 2 * (not here)
    assert not lock.exists()


def test_of_many_machines_that_find_a_dead_one_together_one_takes_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitlit.run.lock.SILENT", 0.5)
    dead = start(partial(hold, tmp_path / ".lock", "host9"), tmp_path)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    os.kill(dead, signal.SIGKILL)
    finish(dead, tmp_path)
    children = [start(partial(hold, tmp_path / ".lock", f"host{i}"), tmp_path, str(i)) for i in range(4)]
    codes: dict[int, int] = {}
    while len(codes) < 3:
        for child in set(children) - set(codes):
            ended, status = os.waitpid(child, os.WNOHANG)
            codes |= {child: os.waitstatus_to_exitcode(status)} if ended else {}
        time.sleep(0.01)
    assert set(codes.values()) == {3}
    (winner,) = set(children) - set(codes)
    os.kill(winner, signal.SIGKILL)
    os.waitpid(winner, 0)
