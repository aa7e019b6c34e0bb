"""The processes that load images: how many, and how they end."""

import gc
import multiprocessing
import os
import signal
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # only the main process acts on them
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of all cores, and of which period


def cores() -> int:
    """Cores that this process may use: those it may run on, and no more than its container's quota is worth."""
    affinity = getattr(os, "sched_getaffinity", None)  # on Linux alone
    found = len(affinity(0)) if affinity else os.cpu_count() or 1
    share, _, period = QUOTA.read_text().partition(" ") if QUOTA.is_file() else ("max", "", "")
    return found if share == "max" else max(1, min(found, int(share) // int(period)))


def count(devices: int) -> int:
    """One a core that this process may use, shared among its devices."""
    return max(1, cores() // max(1, devices))


class Loader(DataLoader[Any]):
    """A DataLoader whose workers outlive a signal to the process group, and leave this process's objects alone."""

    def __iter__(self) -> Any:
        # What a worker that begins inherits: torch's handlers would end it before `leave_signals` is called, and
        # garbage of this process, where it holds an event or a stream of a GPU, ends a worker that collects it.
        if not self.num_workers:
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        gc.freeze()
        try:
            return super().__iter__()
        finally:
            gc.unfreeze()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def loader(
    dataset: Dataset[Any], sampler: Sampler[Any], batch_size: int, workers: int, prefetch: int = 2, pin: bool = False
) -> DataLoader[Any]:
    """Batches of a dataset in a sampler's order.

    Args:
        dataset: of the images.
        sampler: what items come in which order.
        batch_size: items of a batch; the last may have fewer.
        workers: processes that load; 0 for this one.
        prefetch: batches that a worker prepares ahead.
        pin: whether batches are put into pinned memory.
    """
    if workers:
        end_at_exit()
    return Loader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=workers > 0,
        worker_init_fn=leave_signals,
    )


def leave_signals(worker: int) -> None:
    """Let the main process alone act on signals: one to the process group must not end its data workers."""
    for stop in STOP_SIGNALS:
        signal.signal(stop, signal.SIG_IGN)


def end_at_exit() -> None:
    """Kill data workers before Python's own exit, which would wait for ever for children that ignore SIGTERM."""
    Finalize(None, _end, exitpriority=10)


def _end() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
