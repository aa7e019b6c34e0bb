"""Decoded images of a split, kept in memory once for all processes of a machine."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils.data import Dataset

from vitlit.data.progress import Progress
from vitlit.data.workers import loader
from vitlit.errors import UserError

MEMORY, CONTAINER = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
AT_ONCE = 64  # images that a worker hands over together, and that the size of all is estimated by

Cache = Literal["none", "memory", "device"]


class Decoded:
    """Images in memory without a name, which the kernel frees with the last process that has it open.

    `sizes` are heights and widths, int64 (N, 2), 0 for an image that cannot be read; `starts` are the images' first
    pixels in `pixels`, uint8 (P, 3), which must not be changed.
    """

    def __init__(self, path: str, count: int) -> None:
        self.file = open(path, "rb")  # noqa: SIM115
        size = os.fstat(self.file.fileno()).st_size
        content = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        self.sizes = content[: 16 * count].view(torch.int64).view(-1, 2).numpy().copy()
        self.starts = self.sizes.prod(1).cumsum() - self.sizes.prod(1)
        self.pixels = content[16 * count :].view(-1, 3)

    @property
    def path(self) -> str:
        """By which any process of the machine can open it."""
        return f"/proc/{os.getpid()}/fd/{self.file.fileno()}"

    def __reduce__(self) -> Any:  # for workers that are not forked
        return Decoded, (self.path, len(self.sizes))

    def __getitem__(self, index: int) -> Tensor | None:
        """A copy of an image as `decode_bytes` gives it, or None if it cannot be read."""
        (height, width), start = self.sizes[index].tolist(), int(self.starts[index])
        image = self.pixels[start : start + height * width].clone()
        return image.view(height, width, 3).permute(2, 0, 1) if height else None


@dataclass(eq=False)
class _Packed(Dataset[Any]):
    """Images one after the other, (pixels, sizes)."""

    images: Any

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images = [self.images.decode(index) for index in indices]
        sizes = [(0, 0) if image is None else image.shape[1:] for image in images]
        pixels = [image.permute(1, 2, 0).flatten() for image in images if image is not None]
        return torch.cat([torch.empty(0, dtype=torch.uint8), *pixels]), torch.tensor(sizes)


def decode_all(images: Any, workers: int, check: Callable[[float], None]) -> Decoded:
    """All of `Images`; `check` raises if there is no room for so many bytes."""
    if not hasattr(os, "memfd_create"):
        raise UserError("data.cache is for Linux; leave it out")
    packed, count, sizes, progress = _Packed(images), len(images), list[Tensor](), Progress()
    some = np.linspace(0, count - 1, min(count, AT_ONCE)).astype(int).tolist()
    check(len(packed.__getitems__(some)[0]) / len(some) * count)
    file = os.fdopen(os.memfd_create("vitlit"), "w+b")
    file.seek(16 * count)
    for pixels, those in loader(packed, range(count), AT_ONCE, workers):
        check(file.tell() + len(pixels))
        file.write(pixels.numpy().data)
        sizes.append(those)
        progress(f"data.cache: {AT_ONCE * len(sizes):,} of {count:,} images are decoded")
    file.seek(0)
    file.write(torch.cat(sizes).numpy().data)
    file.flush()
    return Decoded(f"/proc/self/fd/{file.fileno()}", count)


def decode_once(images: Any, workers: int, cache: Cache, trainer: Any) -> Decoded:
    """All of `Images`, by one rank of a machine with the workers of all; UserError if they do not fit there."""
    device, room = trainer.strategy.root_device, {"the machine": free_memory()}
    if on_gpu := cache == "device" and device.type == "cuda":
        room["the GPU"] = torch.cuda.mem_get_info(device)[0]

    def check(needed: float) -> None:
        for place, free in room.items():
            if needed > free:
                takes = f"the {len(images):,} decoded images take {needed / 1e9:.3g} GB, but {place} has"
                remedy = "give data.cache memory" if place == "the GPU" else "leave it out"
                raise UserError(f"data.cache {cache}: {takes} {free / 1e9:.3g} GB free; {remedy}")

    kept = decode_all(images, workers * trainer.num_devices, check) if trainer.local_rank == 0 else None
    if trainer.world_size > 1:
        told: list[Any] = [None] * trainer.world_size
        distributed.all_gather_object(told, (trainer.node_rank, kept and kept.path))
        path = next(path for node, path in told if path and node == trainer.node_rank)
        kept = kept or Decoded(path, len(images))
        trainer.strategy.barrier()  # until here no rank has closed it
    assert kept is not None
    if on_gpu:
        kept.pixels = kept.pixels.to(device)
        kept.file.close()
    return kept


def free_memory() -> int:
    """Bytes that this process may still use, by the machine and its container."""
    found, limit = re.search(r"MemAvailable: +(\d+)", MEMORY.read_text()), CONTAINER / "memory.max"
    free = int(found[1]) * 1024 if found else 0
    if not limit.is_file() or limit.read_text() == "max\n":
        return free
    used = dict(line.split() for line in (CONTAINER / "memory.stat").read_text().splitlines())
    kept = int((CONTAINER / "memory.current").read_text()) - int(used["file"]) + int(used["shmem"])
    return min(free, int(limit.read_text()) - kept)  # files that were read make room
