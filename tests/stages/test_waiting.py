"""No training step waits for the device, except those that log."""

import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import watched
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vitlit.data.views import Photometric, change_colours

aten = torch.ops.aten


class Device(TorchDispatchMode):
    """Meta tensors stand for those of a GPU: they have no numbers, so whatever asks for one is noticed here.

    Operators whose result has a size that depends on numbers, such as nonzero, fail by themselves.
    """

    watching = False

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def watch(self, on: bool) -> None:
        self.watching = on

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if func is aten._local_scalar_dense.default and first is not None and first.is_meta:
            self.note("read a number")
            return 1.0 if first.is_floating_point() else first.dtype != torch.bool
        if func is aten._to_copy.default and first is not None:
            to_device = torch.device(kwargs.get("device") or first.device).type == "meta"
            if to_device != first.is_meta and not kwargs.get("non_blocking"):
                self.note("copied")
            if first.is_meta and not to_device:
                number = 0 if first.is_floating_point() else torch.iinfo(first.dtype).max
                return torch.full(first.shape, number, dtype=first.dtype)
        if func is aten._amp_foreach_non_finite_check_and_unscale_.default:
            return None  # it has no meta kernel; a GPU's, which also gradient scaling uses, does not wait
        if func is aten.copy_.default and args[0].is_meta != args[1].is_meta and not (args[2:] and args[2]):
            self.note("copied")
        return func(*args, **kwargs)

    def note(self, what: str) -> None:
        if self.watching:
            frames = [f"{f.filename}:{f.lineno}" for f in traceback.extract_stack() if "torch/" not in f.filename]
            self.waits.append(" < ".join([what, *frames[-3::-1][:4]]))


class Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        pass


class HostBatches:
    """Batches as a loader leaves them in the host's memory: uint8 images, labels, indices, position."""

    def __init__(self, size: int) -> None:
        images, labels = torch.zeros(size, 16, 16, 3, dtype=torch.uint8), torch.zeros(size, dtype=torch.int64)
        self.batch = [images, labels, torch.arange(size), 0]

    def __len__(self) -> int:
        return 40

    def __iter__(self) -> Iterator[list[Any]]:
        return iter([list(self.batch) for _ in range(len(self))])


class Data(watched.Watched):
    def train_dataloader(self) -> Any:
        return HostBatches(self.micro_batch or self.batch_size)


@pytest.mark.parametrize("recipe", watched.RECIPES)
def test_no_step_between_logs_waits(recipe: str, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "meta", SimpleNamespace(manual_seed=lambda seed: None), raising=False)
    options = {"image_size": 16, "batch_size": 8, "num_workers": 0, "pin_memory": False}
    data = Data(str(few), **{**options, **watched.RECIPES[recipe][1]})
    device = Device()
    place = SingleDeviceStrategy(torch.device("meta"), accelerator=Accelerator(), precision_plugin=Precision())
    with torch.device("meta"):
        stage = watched.RECIPES[recipe][0](tmp_path)
    with device:
        watched.run(recipe, stage, data, tmp_path, device.watch, 2 * watched.EVERY + 2, strategy=place)
    assert device.waits == []


def test_no_change_of_colours_waits() -> None:
    device, kind, keys = Device(), Photometric(jitter=0.8, grey=0.2, blur=0.5, solarise=0.2), np.arange(64)
    assert set(kind.draw(keys, 0)[:, 0].ravel()) == {-1, *range(6)}
    with device:
        view = torch.zeros(64, 3, 16, 16, dtype=torch.uint8, device="meta")
        device.watch(True)
        made = change_colours([view, view], [kind, kind], keys)
    assert device.waits == []
    assert [(each.shape, each.dtype, each.device.type) for each in made] == [(view.shape, torch.float32, "meta")] * 2
