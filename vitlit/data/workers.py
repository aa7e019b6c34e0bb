"""The processes that load images: how many, and how they end."""

import gc
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # only the main process acts on them
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of all cores, and the period


def cores() -> int:
    """Cores that this process may use, by its affinity and its container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = QUOTA.read_text().partition(" ") if QUOTA.is_file() else ("max", "", "")
    return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))


def count(devices: int) -> int:
    return max(1, cores() // max(1, devices))


class Loader(DataLoader[Any]):
    """A DataLoader whose workers start with the first batch, and outlive a signal to the process group.

    Lightning asks for an iterator before it restores the step, and before the run has its folder.
    """

    to: torch.device | None = None  # where batches come

    def __iter__(self) -> Any:
        # A worker inherits torch's signal handlers, which would end it before `leave_signals` runs, and this process's
        # garbage: collecting an event or a stream of a GPU ends a worker.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        gc.freeze()
        try:
            batches = super().__iter__()
        finally:
            gc.unfreeze()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield from ahead(batches, self.to) if self.to and self.to.type == "cuda" else batches


def ahead(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    """Batches of tensors, made or copied on a device in a stream of its own while the step before runs."""
    backend = torch.get_device_module(device)
    stream, before = backend.Stream(device), None
    stream.wait_stream(backend.current_stream(device))
    while True:
        with backend.stream(stream):
            batch = [p.to(device, non_blocking=True) if torch.is_tensor(p) else p for p in next(batches, ())]
            copied = stream.record_event()
        if before is not None:
            using = backend.current_stream(device)
            using.wait_event(before[1])
            for part in filter(torch.is_tensor, before[0]):
                part.record_stream(using)  # or its memory might be taken while the step still reads it
            yield before[0]
        if not batch:
            return
        before = batch, copied


def loader(
    dataset: Dataset[Any], sampler: Iterable[Any], batch_size: int, workers: int, prefetch: int = 2, pin: bool = False
) -> Loader:
    """Batches in a sampler's order, `prefetch` of them prepared ahead by each of `workers` processes (0: this one).

    A dataset may `collate` its samples, or make whole batches in `__getitems__`.
    """
    if workers:
        # Before Python's own exit, which would wait forever for children that ignore SIGTERM.
        Finalize(None, _end, exitpriority=10)
    return Loader(
        dataset,
        collate_fn=getattr(dataset, "collate", list if hasattr(dataset, "__getitems__") else None),
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=workers > 0,
        worker_init_fn=leave_signals,
    )


def leave_signals(worker: int) -> None:
    """Leave signals to the main process: one to the process group must not end its data workers."""
    for stop in STOP_SIGNALS:
        signal.signal(stop, signal.SIG_IGN)


def _end() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
