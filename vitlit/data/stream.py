"""Which sample comes when: a pure function of (seed, epoch, index), never of hidden state.

Training is one endless stream of global batches, numbered by the optimiser step. With S whole global batches in the
data, step t lies in epoch t // S and takes slice t % S of that epoch's order; images that do not fill a batch are left
out of that epoch. So one integer is the position of a run, and a step's global batch is the same set on any number of
devices.

Rows 2k and 2k + 1 of a global batch are partners, which vitlit.data.mixing mixes.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DistributedSampler

from vitlit.errors import UserError
from vitlit.seeds import BALANCE, ORDER, mix


class Sample(NamedTuple):
    """One item of the training stream.

    Attributes:
        epoch: counted from 0.
        index: the image's.
        repeat: how often this image came before in this epoch; each repeat is augmented differently.
        position: in the stream: step * batch_size + row in the step's global batch.
    """

    epoch: int
    index: int  # type: ignore[assignment]  # not tuple's method
    repeat: int
    position: int


def order(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order of an epoch: a permutation of range(length), int64.

    The lowest bits of each random key are replaced by its number, so sorting the keys leaves the order in these bits,
    in a fifth of argsort's time.
    """
    numbers = np.arange(length, dtype=np.uint64)
    low_bits = np.uint64((1 << max(length - 1, 0).bit_length()) - 1)
    keys = (mix(ORDER, seed, epoch, numbers) & ~low_bits) | numbers
    keys.sort()
    return (keys & low_bits).astype(np.int64)


def balanced_order(seed: int, epoch: int, labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The order of an epoch of `count` draws in which every class is drawn equally often, give or take one.

    A class's images are all drawn once before any is drawn again. Over the epochs the classes take turns at the extra
    draw. `labels` are the images' class numbers, int64 (N,).

    Returns:
        (image of each draw, how often it was drawn before in this epoch), both int64 (count,).
    """
    sizes = np.bincount(labels)
    present = np.flatnonzero(sizes)
    classes = present[(epoch * count + order(seed, epoch, count)) % len(present)]  # of each draw
    counts = np.bincount(classes, minlength=len(sizes))
    numbers = np.empty(count, np.int64)  # of each draw within its class
    by_class = np.argsort(classes, kind="stable")
    numbers[by_class] = np.arange(count) - np.repeat(np.cumsum(counts) - counts, counts)
    images = np.lexsort((mix(BALANCE, seed, epoch, np.arange(len(labels))), labels))  # by class, shuffled within it
    before, place = np.divmod(numbers, sizes[classes])
    return images[(np.cumsum(sizes) - sizes)[classes] + place], before


def split_batch(batch_size: int, micro_batch: int | None, world_size: int) -> tuple[int, int]:
    """Divide a global batch over devices that take at most `micro_batch` samples at a time; None: their whole share.

    Returns:
        (samples of a device's micro-batch, micro-batches accumulated in a step).

    Raises:
        UserError: the batch does not divide evenly; the message names the nearest one that does.
    """

    def accumulation(size: int) -> int:
        return 1 if micro_batch is None else -(-size // (world_size * micro_batch))

    def divides(size: int) -> bool:
        return size % (world_size * accumulation(size)) == 0

    accumulate = accumulation(batch_size)
    if not divides(batch_size):
        sizes = filter(divides, range(1, 2 * batch_size + world_size))
        nearest = min(sizes, key=lambda size: abs(size - batch_size))
        raise UserError(
            f"data.batch_size {batch_size} does not divide over {world_size} devices x {accumulate} micro-batches; "
            f"the nearest that does is {nearest}"
        )
    return batch_size // (world_size * accumulate), accumulate


def paired_rows(batch_size: int, repeats: int) -> np.ndarray:
    """The sample that each row of a batch takes from a list by image, so that partners are different images.

    Even rows take the first half in order, odd rows the second half in strides of `repeats`, so that the copies of an
    image have different partners. Partners are at least `repeats` apart in the list: a sample s before the end of the
    first half meets place repeats - s of the second half, or a later one.

    Raises:
        UserError: the batch is too small.
    """
    if repeats == 1:
        return np.arange(batch_size)
    if batch_size < 2 * repeats:
        raise UserError(
            f"data.batch_size {batch_size} is too small for {repeats} repeats of two images, which are paired, mixed "
            f"or not; give at least {2 * repeats}, or fewer --data.repeats"
            + (f", {batch_size // 2} or less" if batch_size > 3 else "")
        )
    half = -(-batch_size // 2)
    rows = np.empty(batch_size, np.int64)
    rows[0::2] = np.arange(half)
    rows[1::2] = np.concatenate([np.arange(half + copy, batch_size, repeats) for copy in range(repeats)])
    return rows


class TrainStream(DistributedSampler[Any]):
    """One rank's share of the stream of samples, for an epoch's number of steps from the run's position on.

    It is a DistributedSampler so that Lightning does not replace it. With repeated augmentation (1901.09335, section
    3.2; 2012.12877, section 6) an epoch keeps its length and has fewer images. An image's repeats are in one global
    batch, unless they lie across the border of two.

    Args:
        length: the number of training images.
        batch_size: the global batch.
        seed: for the order.
        position: returns the number of optimiser steps done, whenever an iterator is made: at the start of an epoch,
            or in the middle of one when a run is resumed.
        rank: this process's.
        world_size: the number of processes; must divide the batch.
        repeats: how often a drawn image comes, augmented anew each time. Partners are never repeats of one draw; with
            `labels`, an image that is drawn twice may meet itself.
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
        # No more draws than are used: leaving some out would unbalance the classes.
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


class EvalShare(DistributedSampler[Any]):
    """One rank's share of every image exactly once: no rank is padded, so metrics are exact."""

    def __init__(self, length: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, length, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def eval_batch(length: int, world_size: int, wanted: int) -> int:
    """The batch size nearest to `wanted`, smaller ones first, with equally many batches in every rank's EvalShare.

    Under FSDP ranks meet in every batch: one that has one more would wait for ever.
    """
    fewest, more = divmod(length, world_size)
    if not more:
        return wanted
    return next(size for size in (*range(wanted, 1, -1), *range(wanted + 1, fewest + 2)) if fewest % size)
