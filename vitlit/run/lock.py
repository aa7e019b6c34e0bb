"""The lock of a run: one process at a time, on one machine or on several that share a disk."""

import atexit
import fcntl
import json
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path

from vitlit.errors import UserError

BEAT, STALE = 20, 120  # seconds between heartbeats, and without one until the holder counts as dead
RELEASED, JUST_BEGUN = "released\n", "it has just begun"


class Lock:
    """Numbered files PATH.1, PATH.2, ...; the process that created the highest holds the lock, and keeps touching it.

    A file system, NFS included, lets one process only create the next number, and the highest file is never deleted, so
    only one of several processes replaces a dead holder. On one machine flock tells whether the holder is alive. On
    another it counts as dead two minutes after its last heartbeat, or at once if its job, restarted, is this one's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._released = threading.Event()

    def take(self, what: str) -> None:
        """Hold the lock on `what` until `release` or the end of the process; UserError if another process holds it."""
        newest = max(self._numbers(), default=0)
        holder = self._holder(self._file(newest)) if newest else None
        if holder or not self._create(self._file(newest + 1)):
            about = holder or JUST_BEGUN
            raise UserError(f"another process is at work on {what} ({about}); wait for it, or give another --run.name")
        for number in self._numbers():
            if number <= newest:
                self._file(number).unlink(missing_ok=True)
        os.register_at_fork(after_in_child=self._held.close)  # or data workers would hold it after this process dies
        atexit.register(self.release)
        threading.Thread(target=self._beat, args=(self._file(newest + 1),), daemon=True, name="run-lock").start()

    def release(self) -> None:
        if not self._held.closed:
            self._released.set()
            self._held.seek(0)
            self._held.truncate()
            self._held.write(RELEASED)
            self._held.close()

    def _file(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    def _numbers(self) -> list[int]:
        names = (path.name.removeprefix(f"{self.path.name}.") for path in self.path.parent.iterdir())
        return [int(name) for name in names if name.isdecimal()]

    def _holder(self, file: Path) -> str | None:
        """The process that holds a lock file, in words; None if none does."""
        try:
            with file.open("r+") as held:
                content = held.read()
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    alive: bool | None = False
                except BlockingIOError:
                    alive = True
                except OSError:  # a network file system without locks: the heartbeat decides
                    alive = None
            age = self._age(file)
        except FileNotFoundError:  # a faster process has replaced the holder
            return JUST_BEGUN
        if content == RELEASED:
            return None
        about = json.loads(content) if content.endswith("\n") else {}  # it is about to write it, or was killed
        ended = alive is False and about.get("host") == socket.gethostname()
        restarted = about.get("job") is not None and about["job"] == os.environ.get("SLURM_JOB_ID")
        if not alive and (ended or restarted or age > STALE):
            return None
        job = f", job {about['job']}" if about.get("job") else ""
        return f"process {about['pid']} on {about['host']}{job}" if about else JUST_BEGUN

    def _age(self, file: Path) -> float:
        """Seconds since the last heartbeat, by the clock of the file server."""
        probe = self.path.with_name(f"{self.path.name}.{socket.gethostname()}-{os.getpid()}")
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now - file.stat().st_mtime

    def _create(self, file: Path) -> bool:
        try:
            self._held = file.open("x")
        except FileExistsError:
            return False
        with suppress(OSError):
            fcntl.flock(self._held, fcntl.LOCK_EX)  # waits for a process that is just testing the lock
        about = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        self._held.write(json.dumps(about) + "\n")
        self._held.flush()
        if file != self._file(max(self._numbers())):  # this process's view of the folder was out of date
            self._held.close()
            file.unlink(missing_ok=True)
            return False
        return True

    def _beat(self, file: Path) -> None:
        while not self._released.wait(BEAT):
            with suppress(OSError):  # a network file system may be back at the next beat
                os.utime(file)
