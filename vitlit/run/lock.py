"""The lock of a run: one process at a time, on one machine or on several that share a disk."""

import atexit
import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

from vitlit.errors import UserError

BEAT, STALE = 20, 120  # seconds between heartbeats, and without one until the holder is taken for dead


class Lock:
    """A file that says who is at work, and that its holder touches every 20 seconds.

    On one machine the operating system tells whether the holder is alive (flock). Elsewhere it is taken for dead two
    minutes after its last heartbeat, or where it belongs to the same job, which a cluster has started again.

    Args:
        path: of the file; it stays there, empty when nobody holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._released = threading.Event()

    def take(self, what: str) -> None:
        """Hold it until `release` or the end of the process.

        Args:
            what: it is that is locked, for the message.

        Raises:
            UserError: another process holds it.
            OSError: the file cannot be written.
        """
        self._file = self.path.open("a+")
        alone = self._lock()
        self._file.seek(0)
        holder = self._file.read()
        ours = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        if not alone or self._alive(holder, ours):
            raise UserError(
                f"another process is at work on {what} ({who(holder)}); wait for it, or give another --run.name"
            )
        self._file.truncate(0)
        self._file.write(json.dumps(ours) + "\n")
        self._file.flush()
        if hasattr(os, "register_at_fork"):  # data workers would hold it beyond the kill of this process
            os.register_at_fork(after_in_child=self._leave)
        atexit.register(self.release)
        threading.Thread(target=self._beat, daemon=True, name="run-lock").start()

    def _lock(self) -> bool:
        """Whether no other process of this machine holds the file, as far as the operating system can tell."""
        try:
            import fcntl
        except ImportError:  # Windows
            return True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a network file system without locks: the heartbeat must do
            return True
        return True

    def _alive(self, holder: str, ours: dict[str, Any]) -> bool:
        """Whether who wrote the file is at work on another machine."""
        try:
            theirs = json.loads(holder)
        except ValueError:  # empty, or cut off by the kill of who wrote it
            return False
        if theirs["host"] == ours["host"] or (ours["job"] is not None and theirs["job"] == ours["job"]):
            return False
        probe = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        probe.touch()  # the clock of the disk's machine, not of this one
        now = probe.stat().st_mtime
        probe.unlink()
        return now - self.path.stat().st_mtime < STALE

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            os.utime(self.path)

    def _leave(self) -> None:
        self._released.set()
        self._file.close()

    def release(self) -> None:
        """Let others have it at once."""
        if not self._released.is_set():
            self._released.set()
            self._file.truncate(0)
            self._file.close()


def who(holder: str) -> str:
    """The holder, in words."""
    try:
        about = json.loads(holder)
    except ValueError:  # it has not written yet
        return "it has just begun"
    job = f", job {about['job']}" if about["job"] else ""
    return f"process {about['pid']} on {about['host']}{job}"
