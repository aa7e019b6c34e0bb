"""Worker processes: their signals, their garbage, and an error beside them."""

import gc
import os
import signal
from multiprocessing import get_context
from typing import Any

import pytest
import torch
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
