"""Decoded images that are kept: the same batches, in memory that is shared, bounded, and gone with the run."""

import csv
import gc
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SMALL, Result, command, done, launched, user_error
from PIL import Image
from test_loaders import Recorder, assert_same, folder_data, trainer
from torch import Tensor
from torchvision.transforms import v2

from vitlit.data import decoded
from vitlit.data.augment import TimmRandAugment
from vitlit.data.decoded import Decoded
from vitlit.data.erasing import Erasing
from vitlit.data.mixing import Mixing
from vitlit.data.views import Views
from vitlit.images import preprocess
from vitlit.objectives import Batch
from vitlit.stages import Stage

VARIED: list[dict[str, Any]] = [
    {"crop": "inception", "crop_scale": (0.3, 1.0), "repeats": 2, "erasing": Erasing(0.5), "mixing": Mixing(0.8, 1.0)},
    {"crop": "random_resized", "views": [Views(2, 8)], "micro_batch": 4, "interpolation": "bilinear"},
    {"crop": "pad", "balanced": True},
    {"crop": "simple"},
    {"crop": "resmall", "crop_ratio": 0.6},
    {"crop": "center", "squash": True, "crop_ratio": 0.7},
]


@pytest.fixture(scope="module")
def photo_folder(photos: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of photographs, of other sizes each: 24 and 6, in two classes."""
    root = tmp_path_factory.mktemp("parts")
    draw = torch.Generator().manual_seed(0)
    for number in range(30):
        left, top, width, height = torch.randint(10, 200, (4,), generator=draw).tolist()
        path = root / ("train" if number < 24 else "val") / str(number % 2) / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photos[number % 2].crop((left, top, left + width, top + height)).save(path)
    return root


def batches(root: Path, **options: Any) -> tuple[list[Batch], list[Batch]]:
    """What two epochs of a Trainer get, from training and validation."""
    module = Recorder()
    trainer().fit(module, folder_data(root, **options))
    return module.train_batches, module.val_batches


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{**VARIED[0], "augment": [TimmRandAugment()]}, *VARIED[1:2]])
def test_batches_from_memory_are_the_same_bit_for_bit(few: Path, options: dict[str, Any], workers: int) -> None:
    plain = batches(few, **options)
    kept = batches(few, **options, cache="memory", num_workers=workers)
    for ours, theirs in zip(kept, plain, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("cache", ["memory", "device"])
def test_after_the_loaders_are_made_no_file_is_read(photo_folder: Path, tmp_path: Path, cache: Any) -> None:
    root = Path(shutil.copytree(photo_folder, tmp_path / "copy"))
    plain, data = folder_data(root), folder_data(root, cache=cache, num_workers=1)
    expected = [list(plain.train_dataloader()), list(plain.val_dataloader())]
    loaders: list[Any] = [data.train_dataloader(), data.val_dataloader()]
    shutil.rmtree(root)
    assert [loader.batches.num_workers for loader in loaders] == [int(cache == "memory")] * 2
    for loader, batches in zip(loaders, expected, strict=True):
        for ours, theirs in zip(loader, batches, strict=True):
            assert_alike(ours, theirs)


def assert_alike(ours: Batch, theirs: Batch) -> None:
    """The same, but for some of 10,000 pixels, which may be a level off."""
    assert torch.equal(ours.labels, theirs.labels)
    assert torch.equal(ours.indices, theirs.indices)
    for one, other in zip(ours.views, theirs.views, strict=True):
        off = (one - other).abs()
        assert off.max() < 1.01 * 2 / 255
        assert (off > 0.01 / 255).float().mean() < 1e-3


@pytest.mark.parametrize("options", VARIED)
def test_batches_made_on_the_device_are_the_same_within_a_level(photo_folder: Path, options: dict[str, Any]) -> None:
    plain, kept = (batches(photo_folder, **options, cache=cache) for cache in ("none", "device"))
    for ours, theirs in zip(kept, plain, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert_alike(one, other)


class Blacken(v2.Transform):
    """Changes the image that it is given."""

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        return inpt.mul_(0)


def test_a_transform_that_writes_into_its_image_leaves_what_is_kept(few: Path) -> None:
    same = {"image_size": 8, "crop": "center", "crop_ratio": 1.0, "flip": 0.0}
    data = folder_data(few, cache="memory", augment=Blacken(), **same)
    loader: Any = data.train_dataloader()
    kept = loader.batches.dataset.kept.pixels
    before = kept.clone()
    assert all(batch.views[0].max() == -1 for batch in loader)
    assert torch.equal(kept, before)


@pytest.mark.parametrize("cache", ["memory", "device"])
def test_what_cannot_be_read_is_replaced_as_without_a_cache(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Any
) -> None:
    monkeypatch.chdir(tmp_path)  # where the list of them is kept
    root = Path(shutil.copytree(few, tmp_path / "broken"))
    for file in sorted((root / "train" / "1").iterdir())[:2]:
        file.write_bytes(b"no image")
    lists = {}
    for name in ("none", cache):
        data = folder_data(root, cache=name, on_bad_image="skip", crop="center")
        lists[name] = list(data.train_dataloader())
    assert_same(lists[cache], lists["none"])
    data = folder_data(root, cache=cache)
    assert "train/1" in user_error(r"cannot read .*; --data\.on_bad_image skip trains and", data.train_dataloader)


def memory_files() -> list[str]:
    """The open files and the mappings of this process that are kept images."""
    links = [os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    return [name for name in (*links, *Path("/proc/self/maps").read_text().splitlines()) if "memfd:vitlit" in name]


def test_the_memory_has_no_name_and_is_given_back(few: Path) -> None:
    before = os.listdir("/dev/shm")
    data = folder_data(few, cache="memory")
    loader = data.train_dataloader()
    assert memory_files()
    assert os.listdir("/dev/shm") == before
    data.teardown("fit")
    del loader
    gc.collect()
    assert memory_files() == []
    trainer(max_epochs=1).fit(Recorder(), data)
    del data  # with its trainer, which has the loaders
    gc.collect()
    assert memory_files() == []


def test_workers_that_are_not_forked_have_the_same_images(few: Path) -> None:
    kept = folder_data(few, cache="memory").train_dataloader().batches.dataset.kept  # type: ignore[union-attr]
    copy: Decoded = pickle.loads(pickle.dumps(kept))
    assert all(torch.equal(copy[number], kept[number]) for number in range(40))  # type: ignore[arg-type]
    assert copy.pixels.data_ptr() != kept.pixels.data_ptr()


def test_what_does_not_fit_is_refused_with_what_it_takes(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 40 * 8 * 8 * 3
    monkeypatch.setattr(decoded, "free_memory", lambda: size - 1)
    data = folder_data(few, cache="memory")
    message = user_error("data.cache memory: the 40 decoded images take", data.train_dataloader)
    assert f"take {size / 1e9:.3g} GB, but the machine has {(size - 1) / 1e9:.3g} GB free" in message
    monkeypatch.setattr(decoded, "free_memory", lambda: size + 16 * 40)
    assert len(data.train_dataloader()) == 5


class Growing:
    """Ten images, of which those that are looked at first are small."""

    def __len__(self) -> int:
        return 10

    def decode(self, number: int) -> Tensor:
        return torch.zeros(3, 8, 8 if number in (0, 9) else 800, dtype=torch.uint8)


def test_images_that_prove_to_be_larger_are_refused_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded, "AT_ONCE", 2)
    monkeypatch.setattr(decoded, "free_memory", lambda: 50_000)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    alone = SimpleNamespace(local_rank=0, world_size=1, num_devices=1, strategy=strategy)
    user_error("the machine has 5e-05 GB", decoded.decode_once, Growing(), 0, "memory", alone)
    monkeypatch.setattr(decoded, "free_memory", lambda: 500_000)
    assert len(decoded.decode_once(Growing(), 0, "memory", alone).pixels) == 8 * (16 + 8 * 800)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40_000, 80_000))
    strategy.root_device = torch.device("cuda", 0)
    message = user_error("the GPU has 4e-05 GB free", decoded.decode_once, Growing(), 0, "device", alone)
    assert message.endswith("give data.cache memory")


def test_a_container_may_have_less_than_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = decoded.free_memory()
    assert machine > 1 << 20
    monkeypatch.setattr(decoded, "CONTAINER", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert decoded.free_memory() == pytest.approx(machine, rel=0.5)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 200000\nfile 500000\nshmem 100000\n")
    assert decoded.free_memory() == 700_000  # what is of other files makes room, but no shared memory


def test_transforms_of_the_host_are_refused_on_the_device(few: Path) -> None:
    data = folder_data(few, cache="device", augment=[TimmRandAugment()])
    assert "give memory" in user_error("data.cache device .* data.augment", data.check, "fit", 1)


def metrics(folder: Path) -> list[list[str]]:
    """The losses and the accuracies that a run has logged."""
    rows = csv.DictReader((folder / "runs" / "pretrain" / "metrics.csv").open())
    return [[row[name] for name in ("step", "train/loss", "val/loss", "val/top1")] for row in rows]


def test_two_ranks_share_what_one_of_them_has_decoded(few: Path, tmp_path: Path) -> None:
    def decode_on_one() -> None:
        if os.environ["RANK"] == "1":
            setattr(preprocess, "decode_bytes", None)  # noqa: B010

    flags = ("fit", *SMALL, "--data.root", few, "--model.vit.dropout", 0.1)
    (tmp_path / "cached").mkdir()
    (tmp_path / "plain").mkdir()
    cached = launched(2, *flags, "--data.cache", "memory", cwd=tmp_path / "cached", before=decode_on_one)
    plain = launched(2, *flags, cwd=tmp_path / "plain")
    for result in (*cached, *plain):
        assert result.code == 0, result.err
    assert metrics(tmp_path / "cached") == metrics(tmp_path / "plain")


def stop_in_step_2() -> None:
    original = Stage.training_step

    def patched(self: Stage, batch: Any, index: int) -> dict[str, Any]:
        if self.trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, index)

    setattr(Stage, "training_step", patched)  # noqa: B010


def test_a_run_that_was_stopped_continues_with_a_cache(
    few: Path, trained: Path, tmp_path: Path, vitlit: Callable[..., Result]
) -> None:
    flags = ("fit", *SMALL, "--data.root", few, "--model.vit.dropout", 0.1)
    assert vitlit(*flags, before=stop_in_step_2).code == 143
    done(vitlit(*flags, "--data.cache", "memory"))
    assert metrics(tmp_path) == metrics(trained)


def test_a_run_on_the_device_continues_bit_for_bit(few: Path, tmp_path: Path) -> None:
    flags = ("fit", *SMALL, "--data.root", few, "--data.cache", "device")
    for name, before in (("whole", int), ("stopped", stop_in_step_2)):
        (tmp_path / name).mkdir()
        assert command(*flags, cwd=tmp_path / name, before=before).code == (143 if name == "stopped" else 0)
    done(command(*flags, cwd=tmp_path / "stopped"))
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
