"""The lock of a run: one process works on it, and a dead one is taken over."""

import errno
import json
import os
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import finish, start

from vitlit.errors import UserError
from vitlit.run.folder import RunFolder, RunOptions
from vitlit.run.lock import Lock


def test_two_processes_do_not_work_on_one_run(tmp_path: Path) -> None:
    first, second = (RunFolder(RunOptions(name="x", root=str(tmp_path)), None) for _ in range(2))
    first.begin({"run": {}})
    with pytest.raises(
        UserError, match=rf"another process is at work on the run .*x \(.*{os.getpid()}.*; give|another"
    ):
        second.begin({"run": {}})
    assert (tmp_path / "x" / "config.yaml").exists()


def lock_of(folder: Path, **holder: Any) -> tuple[Lock, Path]:
    """A lock that another machine holds, and its file."""
    held = folder / ".x.lock.3"
    held.write_text(json.dumps({"host": "elsewhere", "pid": 12, "job": None, **holder}) + "\n")
    return Lock(folder / ".x.lock"), held


def taken(lock: Lock) -> bool:
    try:
        lock.take("x")
    except UserError:
        return False
    return True


def test_a_heartbeat_on_another_machine_is_respected_for_two_minutes(tmp_path: Path) -> None:
    lock, held = lock_of(tmp_path)
    with pytest.raises(UserError, match=r"another process is at work on x \(process 12 on elsewhere\); .*--run.name"):
        lock.take("x")
    past = time.time() - 121
    os.utime(held, (past, past))
    lock.take("x")
    (held,) = tmp_path.iterdir()  # the number of the dead process is gone
    assert json.loads(held.read_text())["pid"] == os.getpid()
    assert not taken(Lock(lock.path))
    lock.release()
    assert taken(Lock(lock.path))


def test_the_same_job_or_machine_is_taken_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with pytest.raises(UserError, match=r"another process .*, job 78\)"):
        lock_of(tmp_path, job="78")[0].take("x")
    for holder in ({"job": "77"}, {"host": socket.gethostname(), "job": "78"}):
        lock, _ = lock_of(tmp_path, **holder)
        lock.take("x")
        lock.release()
        for file in tmp_path.iterdir():
            file.unlink()


def test_a_process_that_has_not_written_who_it_is_holds_the_lock(tmp_path: Path) -> None:
    lock, held = lock_of(tmp_path)
    held.write_text('{"host": "elsew')
    with pytest.raises(UserError, match="it has just begun"):
        lock.take("x")
    os.utime(held, (0, 0))  # and was killed
    assert taken(lock)


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("before", ["nobody", "released", "dead"])
def test_of_many_machines_that_start_together_one_takes_the_lock(
    locks: bool, before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process has its own host name; without flock, as on some network file systems, O_EXCL must be enough."""
    if before == "released":
        lock = Lock(tmp_path / ".x.lock")
        lock.take("x")
        lock.release()
    elif before == "dead":
        os.utime(lock_of(tmp_path)[1], (0, 0))

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if not locks:
        monkeypatch.setattr("fcntl.flock", no_locks)
    for _ in range(4):
        begin = time.monotonic() + 0.05

        def compete(number: int, begin: float = begin) -> int:
            setattr(socket, "gethostname", lambda: f"host{number}")  # noqa: B010
            while time.monotonic() < begin:
                pass
            won = taken(Lock(tmp_path / ".x.lock"))
            time.sleep(0.2)  # the winner lives while others try
            return int(won)

        children = [start(partial(compete, number), tmp_path, str(number)) for number in range(4)]
        results = [finish(child, tmp_path, str(number)) for number, child in enumerate(children)]
        assert sum(result.code for result in results) == 1, [result.err for result in results]
        assert not any(result.err for result in results)
        (held,) = tmp_path.glob(".x.lock.*")
        os.utime(held, (0, 0))  # the winner was killed


def test_a_process_with_an_outdated_view_of_the_folder_does_not_take_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, held = lock_of(tmp_path)
    views = iter([[], [1, 3]])
    monkeypatch.setattr(lock, "_numbers", lambda: next(views))
    assert not taken(lock)
    assert list(tmp_path.iterdir()) == [held]


def test_a_lock_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitlit.run.lock.BEAT", 0.01)
    lock = Lock(tmp_path / ".x.lock")
    lock.take("x")
    (held,) = tmp_path.iterdir()
    os.utime(held, (0, 0))
    while held.stat().st_mtime == 0:
        time.sleep(0.01)
    lock.release()
