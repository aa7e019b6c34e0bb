"""Every random draw of a run, by purpose: a pure function of (purpose, seed, step or epoch, index, ...)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

# Purposes. Streams of different purposes never share numbers; a new one goes to the end.
ORDER, SAMPLE, STEP, BALANCE, MIXING, ERASING, REPLACE, VIEW, DRAWS, PHOTOMETRIC = range(10)
LARGEST = 2**64 - 1
CPU = torch.device("cpu")


def global_seed() -> int:
    """What Lightning's seed_everything was last given in this process or the one that began it; 0 by default."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def mix(*values: int | np.ndarray) -> np.ndarray:
    """Hash integers to uint64 (splitmix64, broadcasting), the same on every machine and in every version."""
    return splitmix(np.zeros(1, np.uint64), [np.asarray(value).astype(np.uint64) for value in values])


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
    """Seed torch's CPU generator for one view of a sample, and restore it: without workers the model draws from it."""
    values = (VIEW, seed, epoch, index, repeat, view) if view else (SAMPLE, seed, epoch, index, repeat)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mix_one(*values))
        yield


def first_draw(seed: int, step: int, *where: int) -> int:
    """What `Batch.draws` count from in one step, for a device that does not know its rows in one micro-batch."""
    return mix_one(DRAWS, seed, step, *where) >> 2


def row_draws(seed: int, step: int, rows: range, device: torch.device = CPU) -> torch.Tensor:
    """`Batch.draws` of these rows of a step's global batch, int64."""
    return torch.arange(rows.start, rows.stop, device=device) + first_draw(seed, step)


def seed_step(seed: int, step: int, micro: int, rank: int, device: torch.device = CPU) -> None:
    """Seed torch for the model's draws, such as dropout, in one micro-batch of one step on one device."""
    number = mix_one(STEP, seed, step, micro, rank)
    # torch.manual_seed would keep the stack as text for each kind of device that is not there: a millisecond a step.
    torch.default_generator.manual_seed(number)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(number)


def image_noise(draws: torch.Tensor, count: int) -> torch.Tensor:
    """Noise (B, count), integers below 2^32, that depends only on the images' draws (B,); the same on any device."""
    noise = draws[:, None] * count + torch.arange(count, device=draws.device)
    for _ in range(2):
        noise = ((noise >> 16 ^ noise) * 0x45D9F3B) & 0xFFFFFFFF
    return noise >> 16 ^ noise


def uniform(noise: torch.Tensor) -> torch.Tensor:
    """Noise as float32 in [0, 1), of which no rounding makes 1."""
    return (noise >> 8).float() * 2.0**-24
