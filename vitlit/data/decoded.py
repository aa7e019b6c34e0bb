"""Decoded images of a split, kept in memory once for all processes of a machine."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils.data import Dataset

from vitlit.data.progress import Progress
from vitlit.data.workers import loader, whole
from vitlit.errors import UserError

MEMORY, CONTAINER = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
AT_ONCE = 64  # images that a worker hands over together, and that the size of all is estimated by

Cache = Literal["none", "memory", "device"]
Decode = Callable[[int], Tensor | None]  # of an image's number: as decode_bytes, or None if it cannot be read
Check = Callable[[float], None]  # raises UserError if there is no room for so many bytes


class Decoded:
    """Images in memory without a name, which the kernel frees with the last process that has it open.

    `sizes` are heights and widths, int64 (N, 2), 0 for an image that cannot be read; `starts` are the images' first
    pixels in `pixels`, uint8 (P, 3), which must not be changed.
    """

    def __init__(self, path: str, count: int) -> None:
        self._file = open(path, "rb")  # noqa: SIM115
        size = os.fstat(self._file.fileno()).st_size
        content = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        self.sizes = content[: 16 * count].view(torch.int64).view(-1, 2).clone()
        self.pixels = content[16 * count :].view(-1, 3)
        areas = self.sizes.prod(1)
        self.starts = areas.cumsum(0) - areas

    def __reduce__(self) -> Any:  # for workers that are not forked
        return Decoded, (path_of(self._file), len(self.sizes))

    def __getitem__(self, index: int) -> Tensor | None:
        """A copy of an image, uint8 (3, H, W), memory (H, W, 3)."""
        height, width = self.sizes[index].tolist()
        start = int(self.starts[index])
        image = self.pixels[start : start + height * width].clone()
        return image.view(height, width, 3).permute(2, 0, 1) if height else None

    def move(self, device: torch.device) -> None:
        """Keep the pixels on a device, and no longer in the machine's memory."""
        self.pixels = self.pixels.to(device)
        self._file.close()


@dataclass(eq=False)
class _Packed(Dataset[Any]):
    """Images one after the other, (pixels, sizes)."""

    decode: Decode
    collate = staticmethod(whole)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images = list(map(self.decode, indices))
        pixels = [image.permute(1, 2, 0).flatten() for image in images if image is not None]
        sizes = [[0, 0] if image is None else image.shape[1:] for image in images]
        return torch.cat([torch.empty(0, dtype=torch.uint8), *pixels]), torch.tensor(sizes)


def path_of(file: BinaryIO) -> str:
    """By which every process of the machine can open a file of this one."""
    return f"/proc/{os.getpid()}/fd/{file.fileno()}"


def decode_all(decode: Decode, count: int, workers: int, check: Check) -> BinaryIO:
    """The content of `Decoded`. There must be room by an estimate first, then for each image."""
    if not hasattr(os, "memfd_create"):
        raise UserError("data.cache is for Linux; leave it out")
    packed = _Packed(decode)
    some = np.linspace(0, count - 1, min(count, AT_ONCE)).astype(int).tolist()
    check(len(packed.__getitems__(some)[0]) / len(some) * count)
    file = os.fdopen(os.memfd_create("vitlit"), "w+b")
    file.seek(16 * count)
    sizes: list[Tensor] = []
    progress = Progress()
    for pixels, those in loader(packed, range(count), AT_ONCE, workers):
        check(file.tell() + len(pixels))
        file.write(pixels.numpy().data)
        sizes.append(those)
        progress(f"data.cache: {AT_ONCE * len(sizes):,} of {count:,} images are decoded")
    file.seek(0)
    file.write(torch.cat(sizes).numpy().data)
    file.flush()
    return file


def decode_once(images: Any, workers: int, cache: Cache, trainer: Any) -> Decoded:
    """All of `Images`, decoded by one rank of a machine; UserError if they do not fit into its memory, or the device.

    `workers` are each device's.
    """
    device, count = trainer.strategy.root_device, len(images)
    room = {"the machine": free_memory()}
    if cache == "device" and device.type == "cuda":
        room["the GPU"] = torch.cuda.mem_get_info(device)[0]

    def check(needed: float) -> None:
        for place, free in room.items():
            if needed > free:
                takes = f"the {count:,} decoded images take {needed / 1e9:.3g} GB, but {place} has {free / 1e9:.3g} GB"
                remedy = "give data.cache memory" if place == "the GPU" else "leave it out"
                raise UserError(f"data.cache {cache}: {takes} free; {remedy}")

    file = decode_all(images.decode, count, workers * trainer.num_devices, check) if trainer.local_rank == 0 else None
    path = path_of(file) if file else ""
    if trainer.world_size > 1:
        told: list[Any] = [None] * trainer.world_size
        distributed.all_gather_object(told, (trainer.node_rank, path))
        path = next(path for node, path in told if path and node == trainer.node_rank)
    kept = Decoded(path, count)
    if trainer.world_size > 1:
        trainer.strategy.barrier()  # until here the rank that decoded has the file open
    if cache == "device":
        kept.move(device)
    return kept


def free_memory() -> int:
    """Bytes that this process may still use, by the machine and its container."""
    found = re.search(r"MemAvailable: +(\d+)", MEMORY.read_text())
    free = int(found[1]) * 1024 if found else 0
    limit = (CONTAINER / "memory.max").read_text().strip() if (CONTAINER / "memory.max").is_file() else "max"
    if limit == "max":
        return free
    used = {name: int(number) for name, number in map(str.split, (CONTAINER / "memory.stat").read_text().splitlines())}
    kept = int((CONTAINER / "memory.current").read_text()) - used["file"] + used["shmem"]  # other files make room
    return min(free, int(limit) - kept)
