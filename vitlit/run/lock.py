"""The lock of a run: one process at a time, on one machine or on several that share a disk."""

import atexit
import socket
import time
from contextlib import suppress
from pathlib import Path

from filelock import SoftFileLease, Timeout

from vitlit.errors import UserError

SILENT = 60  # seconds without a heartbeat, after which a process elsewhere counts as dead


def held(path: Path) -> bool:
    """Whether a process gave a sign, in the last minute, of holding the lock."""
    with suppress(OSError):
        return time.time() - path.stat().st_mtime < SILENT
    return False


def take(path: Path, what: str) -> SoftFileLease:
    """Hold the lock on `what` until it is released or the process ends; UserError if another process holds it.

    A dead process is replaced: at once if it was on this machine, else when no heartbeat of it came for a minute.
    """
    lock, about = SoftFileLease(path, lease_duration=SILENT), "it has just begun"
    for patience in (0, 1.5 * SILENT):
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            if (owner := lock.owner) is not None:
                about = f"process {owner.pid} on {owner.hostname}"
            if owner is None or owner.hostname == socket.gethostname():
                break
            if not patience:
                print(f"{what} was left to {about}: waiting {SILENT} s for a sign of it", flush=True)
        else:
            atexit.register(lock.release)
            return lock
    raise UserError(f"another process is at work on {what} ({about}); wait for it, or give another --run.name")
