"""How fast training is, and how much of the time it waits for data."""

import time
from typing import Any

import torch


class Clock:
    """Counts images, and the time between the end of a batch and the beginning of the next, or before the first.

    On a GPU, where the host runs ahead, that is the time that the device has nothing to compute, between events in its
    own queue. It includes the copy of the batch to the device.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        """Begin anew, with nothing counted: something else than training has taken time."""
        self._reset()
        self._ended = self._now()

    def _reset(self) -> None:
        self._begun, self._images, self._waited = time.perf_counter(), 0, 0.0
        self._gaps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def _now(self) -> Any:
        if not self._events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin_batch(self) -> None:
        """A batch is there, on the device."""
        now = self._now()
        if isinstance(self._ended, float):
            self._waited += now - self._ended
        else:
            self._gaps.append((self._ended, now))

    def end_batch(self, images: int) -> None:
        """A batch of so many images was trained on, on all devices."""
        self._ended = self._now()
        self._images += images

    def lap(self) -> tuple[float, float]:
        """(images per second, share of the time that was waited for data) since the last lap; waits for a GPU."""
        if self._gaps:
            self._gaps[-1][1].synchronize()
        elapsed = time.perf_counter() - self._begun
        waited = self._waited + sum(ended.elapsed_time(begun) / 1000 for ended, begun in self._gaps)
        speed = self._images / elapsed
        self._reset()
        return speed, min(1.0, waited / elapsed)
