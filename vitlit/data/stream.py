"""Which sample comes when: a pure function of (seed, epoch, index), never of hidden state.

Training is one endless stream of global batches, numbered by the optimiser step. Step t lies in epoch t // S, where S
is the number of whole global batches in the data, and takes the t % S-th slice of that epoch's order; what does not
fill a batch is left out of that epoch. So the position of a run is one integer, and the global batch of a step is
the same set on any number of devices.

Rows 2k and 2k + 1 of a global batch are partners, which vitlit.data.mixing mixes.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DistributedSampler

from vitlit.errors import UserError
from vitlit.seeds import BALANCE, ORDER, mix


class Sample(NamedTuple):
    """One item of the training stream.

    Attributes:
        epoch: in which it comes.
        index: of the image.
        repeat: how often this image came before in this epoch, which tells its augmentations apart.
        position: in the stream; step * batch_size + row in the step's global batch.
    """

    epoch: int
    index: int  # type: ignore[assignment]  # not tuple's method
    repeat: int
    position: int


def order(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order of an epoch: a permutation of range(length), int64.

    The lowest bits of the drawn numbers give way to what they are drawn for, so that sorting them, in a fifth of the
    time that argsort takes, leaves the order in those bits.
    """
    numbers = np.arange(length, dtype=np.uint64)
    below = np.uint64((1 << max(length - 1, 0).bit_length()) - 1)
    keys = (mix(ORDER, seed, epoch, numbers) & ~below) | numbers
    keys.sort()
    return (keys & below).astype(np.int64)


def balanced_order(seed: int, epoch: int, labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The order of an epoch that draws every class equally often, up to one draw.

    No image of a class is drawn again before all others of it were. The classes take turns at the odd draw, over the
    epochs.

    Args:
        seed: of the run.
        epoch: counted from 0.
        labels: class numbers of the images, int64 (N,).
        count: the number of draws.

    Returns:
        (image of each draw, how often it was drawn before in this epoch), both int64 (count,).
    """
    sizes = np.bincount(labels)
    present = np.flatnonzero(sizes)
    drawn = present[(epoch * count + order(seed, epoch, count)) % len(present)]  # the class of each draw
    counts = np.bincount(drawn, minlength=len(sizes))
    numbers = np.empty(count, np.int64)  # of each draw within its class
    by_class = np.argsort(drawn, kind="stable")
    numbers[by_class] = np.arange(count) - np.repeat(np.cumsum(counts) - counts, counts)
    images = np.lexsort((mix(BALANCE, seed, epoch, np.arange(len(labels))), labels))  # by class, shuffled within it
    before, place = np.divmod(numbers, sizes[drawn])
    return images[(np.cumsum(sizes) - sizes)[drawn] + place], before


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


def paired_rows(batch_size: int, repeats: int) -> np.ndarray:
    """Which of a batch's samples, listed image by image, each row takes, so that partners are of two images.

    Even rows take the first half in its order, odd rows the second half in strides of `repeats`, so that the copies of
    an image meet different ones. So partners are at least `repeats` apart in the list: what is s before the end of the
    first half meets place repeats - s of the second half, or a later one.

    Raises:
        UserError: the batch is too small for it.
    """
    if repeats == 1:
        return np.arange(batch_size)
    if batch_size < 2 * repeats:
        raise UserError(
            f"data.batch_size {batch_size} is too small for {repeats} repeats of an image and as many of another, with "
            f"which they are paired, mixed or not; give at least {2 * repeats}, or fewer --data.repeats"
            + (f", {batch_size // 2} or less" if batch_size > 3 else "")
        )
    half = -(-batch_size // 2)
    rows = np.empty(batch_size, np.int64)
    rows[0::2] = np.arange(half)
    rows[1::2] = np.concatenate([np.arange(half + copy, batch_size, repeats) for copy in range(repeats)])
    return rows


class TrainStream(DistributedSampler[Any]):
    """One rank's share of the stream of samples, from the run's position on.

    It is a DistributedSampler so that Lightning leaves it in place.

    With repeated augmentation (1901.09335, section 3.2; 2012.12877, section 6) an epoch is as long as without, and has
    so many fewer images. An image's repeats are in one global batch, unless it lies across the border of two.

    Args:
        length: the number of training images.
        batch_size: the global batch.
        seed: of the order.
        position: gives the number of optimiser steps done, asked whenever an iterator is made. Lightning makes one
            at the start of an epoch, and one in the midst of an epoch where a run is continued.
        rank: of this process.
        world_size: the number of processes; must divide the batch.
        repeats: how often an image that is drawn comes, each time augmented anew. Partners are never repeats of one
            draw; with `labels`, an image that is drawn twice may meet itself.
        labels: class numbers, int64 (length,), to draw every class equally often; None to draw every image once.

    Raises:
        UserError: the batch is too small for the repeats.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        position: Callable[[], int],
        rank: int = 0,
        world_size: int = 1,
        repeats: int = 1,
        labels: np.ndarray | None = None,
    ) -> None:
        self.length, self.batch_size, self.seed, self.position = length, batch_size, seed, position
        self.repeats, self.labels = repeats, labels
        self.share = batch_size // world_size
        self.offset = rank * self.share
        self.rows = paired_rows(batch_size, repeats)[self.offset : self.offset + self.share]
        self.steps = length // batch_size

    def __len__(self) -> int:
        return self.steps * self.share

    def _draws(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The images of an epoch, and how often each was drawn before in it."""
        if self.labels is None:
            return order(self.seed, epoch, self.length), np.zeros(self.length, np.int64)
        # No more than are dealt, or what is left out would unbalance the rest.
        return balanced_order(self.seed, epoch, self.labels, -(-self.steps * self.batch_size // self.repeats))

    def __iter__(self) -> Iterator[Sample]:
        first = self.position()
        epoch, indices, before = -1, np.empty(0, np.int64), np.empty(0, np.int64)
        for step in range(first, first + self.steps):
            if step // self.steps != epoch:
                epoch = step // self.steps
                indices, before = self._draws(epoch)
            draws, copies = np.divmod(step % self.steps * self.batch_size + self.rows, self.repeats)
            repeats = before[draws] * self.repeats + copies
            position = step * self.batch_size + self.offset
            for row, (index, repeat) in enumerate(zip(indices[draws].tolist(), repeats.tolist(), strict=True)):
                yield Sample(epoch, index, repeat, position + row)


def global_batch(stream: TrainStream) -> list[Sample]:
    """The samples of one step, that of the stream's position, of a stream that is not shared among ranks."""
    return list(islice(stream, stream.batch_size))


class EvalShare(DistributedSampler[Any]):
    """One rank's share of every image exactly once: no rank is padded, so metrics are exact."""

    def __init__(self, length: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, length, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def eval_batch(length: int, world_size: int, wanted: int) -> int:
    """The batch next to `wanted`, a smaller one first, of which every rank's EvalShare has equally many.

    Under FSDP ranks meet in every batch: one more on one of them would wait for ever.
    """
    fewest, more = divmod(length, world_size)
    if not more:
        return wanted
    return next(size for size in (*range(wanted, 1, -1), *range(wanted + 1, fewest + 2)) if fewest % size)
