"""Worker processes: their signals, their garbage, and an error beside them; and batches copied ahead."""

import gc
import itertools
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler, TensorDataset

from vitlit.data import workers as data_workers


def test_a_signal_does_not_end_a_worker_that_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = data_workers.leave_signals

    def signalled(worker: int) -> None:  # in the worker, as late as it can come
        os.kill(os.getpid(), signal.SIGTERM)
        prepare(worker)

    monkeypatch.setattr(data_workers, "leave_signals", signalled)
    numbers = TensorDataset(torch.arange(8))
    assert len(list(data_workers.loader(numbers, SequentialSampler(numbers), 2, 2))) == 4
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


class Bound:
    """Garbage that only its own process may collect, as what belongs to a GPU is."""

    def __init__(self) -> None:
        self.own, self.cycle = os.getpid(), self

    def __del__(self) -> None:
        if os.getpid() != self.own:
            os.abort()


class Collecting(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        gc.collect()
        return index


def test_a_worker_does_not_collect_what_the_main_process_left() -> None:
    gc.disable()  # as late as it can come
    try:
        Bound()
        assert len(list(data_workers.loader(Collecting(), range(4), 2, 2))) == 2
    finally:
        gc.enable()
        gc.collect()  # or a process forked by a later test would
    assert gc.get_freeze_count() == 0


def test_an_error_beside_data_workers_ends_the_process() -> None:
    """They ignore SIGTERM, with which Python would end them before it waits for them."""

    def fail() -> None:
        kept.append(iter(data_workers.loader(numbers, SequentialSampler(numbers), 2, 1)))
        next(kept[0])
        raise ValueError("on purpose")

    numbers, kept = TensorDataset(torch.arange(8)), list[Any]()
    process = get_context("fork").Process(target=fail)
    process.start()
    process.join()
    assert process.exitcode == 1


class Backend:
    """Notes what is asked of a device's streams."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.current, self.events = Side(self, "step"), itertools.count()

    def Stream(self, device: torch.device) -> "Side":
        return Side(self, "copy")

    def current_stream(self, device: torch.device) -> "Side":
        return self.current

    @contextmanager
    def stream(self, stream: "Side") -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


@dataclass
class Side:
    backend: Backend
    name: str

    def wait_stream(self, other: "Side") -> None:
        self.backend.calls.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> int:
        return next(self.backend.events)

    def wait_event(self, event: int) -> None:
        self.backend.calls.append(f"{self.name} waits for copy {event}")


def test_a_batch_is_copied_while_the_one_before_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend()
    monkeypatch.setattr(torch, "get_device_module", lambda device: backend)
    monkeypatch.setattr(Tensor, "record_stream", lambda part, stream: backend.calls.append(f"{stream.name} keeps it"))

    def batches() -> Iterator[list[Any]]:
        for number in range(3):
            backend.calls.append(f"{backend.current.name} takes {number}")
            yield [torch.tensor(number), number]

    for tensor, number in data_workers.ahead(batches(), torch.device("cpu")):
        backend.calls.append(f"{backend.current.name} uses {int(tensor)} {number}")
    assert backend.calls == [
        *("copy waits for step", "copy takes 0", "copy takes 1", "step waits for copy 0", "step keeps it"),
        *("step uses 0 0", "copy takes 2", "step waits for copy 1", "step keeps it", "step uses 1 1"),
        *("step waits for copy 2", "step keeps it", "step uses 2 2"),
    ]
    assert list(data_workers.ahead(iter([]), torch.device("cpu"))) == []
