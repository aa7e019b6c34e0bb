"""Which sample comes when: a pure function of (seed, epoch, index), never of hidden state.

Training is one endless stream of global batches, numbered by the optimiser step. Step t lies in epoch t // S, where S
is the number of whole global batches in the data, and takes the t % S-th slice of that epoch's order; what does not
fill a batch is left out of that epoch. So the position of a run is one integer, and the global batch of a step is
the same set on any number of devices.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DistributedSampler

from vitlit.errors import UserError

_ORDER, _SAMPLE, _STEP = range(3)  # what a number is drawn for: the streams must not meet


def mix(*values: int | np.ndarray) -> np.ndarray:
    """Hash integers to uint64 (splitmix64, broadcasting), the same on every machine and in every version."""
    mixed = np.zeros(1, np.uint64)
    for value in values:
        mixed = (mixed ^ np.asarray(value).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


def order(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order of an epoch: a permutation of range(length), int64."""
    return np.argsort(mix(_ORDER, seed, epoch, np.arange(length)), kind="stable")


def seed_sample(seed: int, epoch: int, index: int) -> None:
    """Seed torch's CPU generator for the augmentation of one sample."""
    torch.default_generator.manual_seed(int(mix(_SAMPLE, seed, epoch, index)[0]))


def seed_step(seed: int, step: int, micro: int, rank: int) -> None:
    """Seed torch for dropout and other draws of the model in one micro-batch of one step on one device."""
    torch.manual_seed(int(mix(_STEP, seed, step, micro, rank)[0]))


def split_batch(batch_size: int, micro_batch: int | None, world_size: int) -> tuple[int, int]:
    """Divide a global batch over devices and accumulation.

    Args:
        batch_size: samples of one optimiser step.
        micro_batch: the most samples that one device takes at a time; None for all of its share.
        world_size: the number of devices.

    Returns:
        (samples of a device's micro-batch, micro-batches accumulated in a step).

    Raises:
        UserError: they do not divide evenly; the message names the nearest global batch that does.
    """
    if batch_size < 1 or (micro_batch is not None and micro_batch < 1):
        raise UserError(f"data.batch_size {batch_size} and data.micro_batch {micro_batch} must be at least 1")

    def accumulation(size: int) -> int:
        return 1 if micro_batch is None else -(-size // (world_size * micro_batch))

    accumulate = accumulation(batch_size)
    if batch_size % (world_size * accumulate):
        sizes = range(world_size, 2 * batch_size + world_size, world_size)
        nearest = min(
            (size for size in sizes if size % (world_size * accumulation(size)) == 0),
            key=lambda size: abs(size - batch_size),
        )
        parts = f"{world_size} device{'s' if world_size > 1 else ''}"
        parts += f" x {accumulate} micro-batches" if accumulate > 1 else ""
        raise UserError(
            f"data.batch_size {batch_size} does not divide over {parts}; the nearest that does is {nearest}"
        )
    return batch_size // (world_size * accumulate), accumulate


class TrainStream(DistributedSampler[Any]):
    """One rank's share of the stream, from the run's position on: (epoch, index) pairs.

    It is a DistributedSampler so that Lightning leaves it in place.

    Args:
        length: the number of training images.
        batch_size: the global batch.
        seed: of the order.
        position: gives the number of optimiser steps done, asked whenever an iterator is made. Lightning makes one
            at the start of an epoch, and one in the midst of an epoch where a run is continued.
        rank: of this process.
        world_size: the number of processes; must divide the batch.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, position: Callable[[], int], rank: int = 0, world_size: int = 1
    ) -> None:
        self.length, self.batch_size, self.seed, self.position = length, batch_size, seed, position
        self.share = batch_size // world_size
        self.offset = rank * self.share
        self.steps = length // batch_size

    def __len__(self) -> int:
        return self.steps * self.share

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first = self.position()
        epoch, indices = -1, np.empty(0, np.int64)
        for step in range(first, first + self.steps):
            if step // self.steps != epoch:
                epoch = step // self.steps
                indices = order(self.seed, epoch, self.length)
            start = step % self.steps * self.batch_size + self.offset
            for index in indices[start : start + self.share]:
                yield epoch, int(index)


class EvalShard(DistributedSampler[Any]):
    """Every image exactly once over all ranks: no rank is padded, so metrics are exact."""

    def __init__(self, length: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, length, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
