"""Which sample comes when: with S global batches in the data, step t takes slice t % S of the order of epoch t // S.

So the step is a run's position, and its global batch is the same set on any number of devices. Rows 2k and 2k + 1 of
one are partners, which vitlit.data.mixing mixes.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from vitlit.errors import UserError
from vitlit.seeds import BALANCE, ORDER, mix


class Sample(NamedTuple):
    """One item of the training stream; `position` is step * batch_size + row in the batch."""

    epoch: int
    index: int  # type: ignore[assignment]  # not tuple's method
    repeat: int
    position: int


def order(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order of an epoch: a permutation of range(length), int64."""
    # Each number replaces the lowest bits of its random key, which is sorted in a fifth of argsort's time.
    numbers = np.arange(length, dtype=np.uint64)
    low_bits = np.uint64((1 << max(length - 1, 0).bit_length()) - 1)
    keys = (mix(ORDER, seed, epoch, numbers) & ~low_bits) | numbers
    keys.sort()
    return (keys & low_bits).astype(np.int64)


def balanced_order(seed: int, epoch: int, labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(image of each draw, how often it was drawn before), int64 (count,) each, for labels int64 (N,).

    Classes are drawn equally often, within one, and an image again once all of its class have been.
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
    """(samples of a device's micro-batch, at most `micro_batch` if given; micro-batches accumulated in a step)."""
    accumulate = -(-batch_size // (world_size * (micro_batch or batch_size)))
    parts = world_size * accumulate
    if batch_size % parts:
        over, fits = f"{world_size} devices x {accumulate} micro-batches", parts * -(-batch_size // parts)
        raise UserError(f"data.batch_size {batch_size} does not divide over {over}; the next that does is {fits}")
    return batch_size // parts, accumulate


def paired_rows(batch_size: int, repeats: int) -> np.ndarray:
    """The sample that each row of a batch takes from a list by image, so that partners are different images.

    Even rows take the first half in order, odd rows the second half in strides of `repeats`, so that the copies of an
    image have different partners, at least `repeats` apart in the list.
    """
    if repeats == 1:
        return np.arange(batch_size)
    if batch_size < 2 * repeats:
        raise UserError(f"data.batch_size is {batch_size}; give at least {2 * repeats}, or fewer --data.repeats")
    half = -(-batch_size // 2)
    rows = np.empty(batch_size, np.int64)
    rows[0::2] = np.arange(half)
    rows[1::2] = np.concatenate([np.arange(half + copy, batch_size, repeats) for copy in range(repeats)])
    return rows


@dataclass(eq=False)
class TrainStream(DistributedSampler[Any]):
    """One rank's share of the stream of samples, for an epoch's number of steps from the run's position on.

    It is a DistributedSampler so that Lightning does not replace it. With repeated augmentation (1901.09335, section
    3.2; 2012.12877, section 6) an epoch keeps its length and has fewer images; an image's repeats are in one global
    batch, or in two neighbours. With `labels`, int64 (length,), classes are balanced, and an image that is drawn twice
    may meet itself. `position` returns the number of optimiser steps done, whenever an iterator is made.
    """

    length: int
    batch_size: int
    seed: int
    position: Callable[[], int]
    rank: int = 0
    world_size: int = 1
    repeats: int = 1
    labels: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.share = self.batch_size // self.world_size
        self.offset = self.rank * self.share
        self.rows = paired_rows(self.batch_size, self.repeats)[self.offset : self.offset + self.share]
        self.steps = self.length // self.batch_size

    def __len__(self) -> int:
        return self.steps * self.share

    def _draws(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if self.labels is None:
            return order(self.seed, epoch, self.length), np.zeros(self.length, np.int64)
        # No more draws than are used: leaving some out would unbalance the classes.
        return balanced_order(self.seed, epoch, self.labels, -(-self.steps * self.batch_size // self.repeats))

    def __iter__(self) -> Iterator[Sample]:
        first, epoch = self.position(), -1
        for step in range(first, first + self.steps):
            if step // self.steps != epoch:
                epoch = step // self.steps
                indices, before = self._draws(epoch)
            draws, copies = np.divmod(step % self.steps * self.batch_size + self.rows, self.repeats)
            repeats = before[draws] * self.repeats + copies
            position = step * self.batch_size + self.offset
            for row, (index, repeat) in enumerate(zip(indices[draws].tolist(), repeats.tolist(), strict=True)):
                yield Sample(epoch, index, repeat, position + row)

    @staticmethod
    def check(saved: dict[str, Any], settings: dict[str, Any]) -> None:
        """UserError if a checkpoint's stream is not that of these settings."""
        for name, value in settings.items():
            if (had := saved.get(name, value)) == value:
                continue
            remedy = "restore the data" if name in ("images", "names") else f"give --data.{name} {had}"
            difference = "images of other names or labels" if name == "names" else f"{name} {had}, this one has {value}"
            raise UserError(f"the checkpoint's run had {difference}: {remedy}, or start another with --model.init_from")


class EvalShare(DistributedSampler[Any]):
    """One rank's share of every image, or of so many, exactly once: no rank is padded, so metrics are exact."""

    def __init__(self, length: int, rank: int = 0, world_size: int = 1, most: int | None = None) -> None:
        self.count = min(length, length if most is None else most)  # of all ranks, spread over the images
        self.indices = [place * length // self.count for place in range(rank, self.count, world_size)]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def spread(loader: Any, most: int, rank: int = 0, world_size: int = 1) -> EvalShare | None:
    """A rank's share of so many images, spread over those of a loader; None if its dataset has no order to pick by."""
    indexed = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    if not indexed or loader.batch_sampler is None:
        return None
    return EvalShare(len(loader.dataset), rank, world_size, most)


def eval_batch(length: int, world_size: int, wanted: int) -> int:
    """The batch size nearest to `wanted`, smaller ones first, with equally many batches in every rank's EvalShare."""
    # Under FSDP ranks meet in every batch: one that has one more would wait for ever.
    fewest, more = divmod(length, world_size)
    if not more:
        return wanted
    return next(size for size in (*range(wanted, 1, -1), *range(wanted + 1, fewest + 2)) if fewest % size)


def set_accumulation(trainer: Any, micro_batches: int, steps: int) -> None:
    """Accumulate so many micro-batches in each of an epoch's steps, unless a setting of the Trainer contradicts."""
    if trainer.overfit_batches:  # Lightning would replace the sampler
        raise UserError("trainer.overfit_batches reads images unseeded and unmixed; give limit_train_batches")
    if trainer.accumulate_grad_batches not in (1, micro_batches):
        raise UserError("trainer.accumulate_grad_batches follows from data.batch_size and micro_batch; leave it out")
    trainer.accumulate_grad_batches = micro_batches
    limit, batches = trainer.limit_train_batches, micro_batches * steps
    batches = min(limit, batches) if isinstance(limit, int) else int(limit * batches)
    if batches < 1:
        raise UserError(f"there is nothing to train with trainer.limit_train_batches {limit}; give more")
    interval = trainer.val_check_interval
    if isinstance(interval, int) and trainer.check_val_every_n_epoch and interval > batches:
        raise UserError(f"val_check_interval is {interval}; give at most {batches}, or check_val_every_n_epoch null")
    if batches % micro_batches:
        raise UserError(f"trainer.limit_train_batches must be a multiple of a step's {micro_batches} micro-batches")
    # Lightning does not know that the loader starts at the run's position.
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
