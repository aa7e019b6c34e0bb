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
    affinity = getattr(os, "sched_getaffinity", None)  # only on Linux
    allowed = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota, _, period = QUOTA.read_text().partition(" ") if QUOTA.is_file() else ("max", "", "")
    return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))


def count(devices: int) -> int:
    return max(1, cores() // max(1, devices))


class Loader(DataLoader[Any]):
    """A DataLoader whose workers start with the first batch, and outlive a signal to the process group.

    Lightning asks for an iterator before it restores the step, and before the run has its folder. Batches come on the
    `device`, if it is a GPU.
    """

    def __init__(self, *args: Any, device: torch.device | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.device = device

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
        yield from ahead(batches, self.device) if self.device and self.device.type == "cuda" else batches


def ahead(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    """Each batch on a device, made or copied on a stream of its own while the step before it runs."""
    backend = torch.get_device_module(device)
    stream, waiting = backend.Stream(device), None
    stream.wait_stream(backend.current_stream(device))
    while True:
        with backend.stream(stream):
            batch = next(batches, None)
            moved = batch and [part.to(device, non_blocking=True) if torch.is_tensor(part) else part for part in batch]
            copied = stream.record_event()
        if waiting is not None:
            yield arrived(*waiting, backend.current_stream(device))
        if moved is None:
            return
        waiting = moved, copied


def arrived(batch: list[Any], copied: Any, stream: Any) -> list[Any]:
    """A batch for use on a stream, once it is copied; its memory is not given to another while that works on it."""
    stream.wait_event(copied)
    for part in batch:
        if torch.is_tensor(part) and part.is_cuda:
            part.record_stream(stream)
    return batch


def loader(
    dataset: Dataset[Any],
    sampler: Iterable[Any],
    batch_size: int,
    workers: int,
    prefetch: int = 2,
    pin: bool = False,
    device: torch.device | None = None,
) -> DataLoader[Any]:
    """Batches in a sampler's order, `prefetch` of them prepared ahead by each of `workers` processes (0: this one).

    A dataset may `collate` its samples, or make whole batches in `__getitems__`.
    """
    if workers:
        end_at_exit()
    return Loader(
        dataset,
        device=device,
        collate_fn=getattr(dataset, "collate", None),
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=workers > 0,
        worker_init_fn=leave_signals,
    )


def whole(batch: Any) -> Any:
    """The `collate` of a dataset that makes whole batches."""
    return batch


def leave_signals(worker: int) -> None:
    """Leave signals to the main process: one to the process group must not end its data workers."""
    for stop in STOP_SIGNALS:
        signal.signal(stop, signal.SIG_IGN)


def end_at_exit() -> None:
    """Kill data workers before Python's own exit, which would wait forever for children that ignore SIGTERM."""
    Finalize(None, _end, exitpriority=10)


def _end() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
