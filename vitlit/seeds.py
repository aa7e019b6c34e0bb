"""Every random draw of a run, by purpose: a pure function of (purpose, seed, step or epoch, index, ...)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

# Purposes. Streams of different purposes never share numbers; a new one goes to the end.
ORDER, SAMPLE, STEP, BALANCE, MIXING, ERASING, REPLACE, VIEW = range(8)
LARGEST = 2**64 - 1


def global_seed() -> int:
    """What Lightning's seed_everything was last given in this process or the one that began it; 0 by default."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def mix(*values: int | np.ndarray) -> np.ndarray:
    """Hash integers to uint64 (splitmix64, broadcasting), the same on every machine and in every version."""
    mixed: np.ndarray = splitmix(np.zeros(1, np.uint64), [np.asarray(value).astype(np.uint64) for value in values])
    return mixed


def mix_one(*values: int) -> int:
    """`mix` for single numbers, in an eighth of the time."""
    return int(splitmix(0, [value & LARGEST for value in values]))


def splitmix(mixed: Any, words: list[Any]) -> Any:
    for word in words:
        mixed = ((mixed ^ word) + 0x9E3779B97F4A7C15) & LARGEST
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & LARGEST
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & LARGEST
        mixed = mixed ^ (mixed >> 31)
    return mixed


@contextmanager
def seeded_sample(seed: int, epoch: int, index: int, repeat: int, view: int = 0) -> Iterator[None]:
    """Seed torch's CPU generator to augment one view of a sample, and restore its state afterwards.

    Without data workers the model uses the same generator.
    """
    values = (VIEW, seed, epoch, index, repeat, view) if view else (SAMPLE, seed, epoch, index, repeat)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mix_one(*values))
        yield


def seed_step(seed: int, step: int, micro: int, rank: int) -> None:
    """Seed torch for the model's draws, such as dropout, in one micro-batch of one step on one device."""
    torch.manual_seed(mix_one(STEP, seed, step, micro, rank))
