"""Data of 12 bits, of 16 bits and of four channels, from the folder to the device, and through every command."""

import json
import os
import shlex
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import tifffile
import torch
from conftest import SMALL, Result, done, png16, refused, user_error
from lightning.pytorch import Callback, Trainer
from small_stage import TINY
from torch.optim import AdamW
from torchvision.transforms import v2

import vitlit as package
from vitlit.data import ImageFolderData
from vitlit.data.augment import BigVisionRandAugment, ThreeAugment, TimmRandAugment
from vitlit.data.index import Index
from vitlit.data.views import Photometric, Views
from vitlit.images.preprocess import Preprocess
from vitlit.model import ViT
from vitlit.objectives import Distillation, MaskedPatch, Supervised
from vitlit.prepare.check import check
from vitlit.prepare.check import run as run_check
from vitlit.prepare.report import look
from vitlit.prepare.shard import run as write_shards
from vitlit.prepare.suspects import Table, suspects
from vitlit.stages import Pretrain, Stage

Command = Callable[..., Result]
KINDS: dict[str, tuple[int, int, str]] = {  # channels, white, ending
    "12 bits": (1, 4095, "png"),
    "16 bits": (3, 65535, "png"),
    "4 channels": (4, 65535, "tif"),
    "float": (2, 1, "npy"),
}


def write(file: Path, values: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".tif":
        tifffile.imwrite(file, values, photometric="minisblack", planarconfig="contig")
    elif file.suffix == ".npy":
        np.save(file, values)
    else:
        file.write_bytes(png16(values))


def folder(root: Path, kind: str) -> dict[str, np.ndarray]:
    """Stripes across or down, of two classes: 8 images of train and 3 of val each; the values by path."""
    channels, white, ending = KINDS[kind]
    random, lines, written = np.random.default_rng(channels), np.arange(16), {}
    for split, count in (("train", 8), ("val", 3)):
        for label in range(2):
            for i in range(count):
                wave = (np.sin(lines[:, None] * random.uniform(0.3, 1.2, channels) + random.uniform(0, 6)) + 1) / 2
                stripes = np.broadcast_to(wave[None] if label else wave[:, None], (16, 16, channels))
                values = white * (0.7 * stripes + random.uniform(0, 0.3, stripes.shape))
                file = root / split / "ab"[label] / f"{i}.{ending}"
                written[str(file)] = values.astype("f4" if white == 1 else "u2")
                write(file, written[str(file)])
    return written


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("channels") / "four"
    folder(root, "4 channels")
    return root


def measured(values: list[np.ndarray], white: float) -> dict[str, tuple[float, ...]]:
    pixels = np.concatenate([each.reshape(-1, each.shape[-1]) for each in values]) / white
    return {"mean": tuple(pixels.mean(0).tolist()), "std": tuple(pixels.std(0).tolist())}


class Seen(Callback):
    """The batches that a stage was given."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(("train", batch))

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        self.batches.append(("val", batch))


@pytest.mark.parametrize("kind", KINDS)
def test_values_on_the_device_are_the_files(kind: str, tmp_path: Path) -> None:
    channels, white, _ = KINDS[kind]
    written, seen = folder(tmp_path / "data", kind), Seen()
    moments: Any = measured(list(written.values()), white)
    data = ImageFolderData(
        str(tmp_path / "data"),
        image_size=16,
        batch_size=4,
        range=(0, white),
        **moments,
        crop="center",
        crop_ratio=1.0,
        flip=0.0,
        num_workers=0,
    )
    objective: Any = partial(Supervised, num_classes=2)
    stage = Pretrain(vit=ViT(**TINY, in_channels=channels), objective=objective, optimizer=partial(AdamW, lr=1e-3))
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_epochs=1, callbacks=[seen], accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(stage, datamodule=data)
    counts = {"train": 0, "val": 0}
    for split, batch in seen.batches:
        images = batch.views[0].permute(0, 2, 3, 1).double() * torch.tensor(moments["std"]) + torch.tensor(
            moments["mean"]
        )
        for image, index in zip(images.numpy(), batch.indices.tolist(), strict=True):
            assert np.abs(image - written[data.split(split).path(index)] / white).max() <= 1 / 65536
            counts[split] += 1
    assert counts == {"train": 16, "val": 12}  # of which 6 are the sanity check's


def test_four_channels_through_every_command(vitlit: Command, four: Path, tmp_path: Path) -> None:
    said = done(vitlit("data", "check", four, "--range", 0, 65535, "--workers", 0))
    flags = shlex.split(next(line for line in said.splitlines() if "train with" in line))[2:]
    files = [tifffile.imread(file) for file in (four / "train").rglob("*.tif")]
    for name, numbers in measured(files, 65535).items():
        assert json.loads(flags[flags.index(f"--data.{name}") + 1]) == pytest.approx(numbers, rel=1e-3)
    fit = ["fit", *SMALL, "--data.root", four, "--data.batch_size", 8, "--run.name", "four"]
    refused(vitlit(*fit), "cannot read the image", "more than 8 bits or other channels", "--data.range")
    refused(vitlit(*fit, *flags[:2]), "data.range needs data.mean", "`vitlit data check ROOT --range 0 65535`")
    run = tmp_path / "runs" / "four"
    done(vitlit(*fit, *flags, "--data.seed", 1))
    assert (run / "mistakes.png").is_file()
    vit: Any = package.load(run)
    assert vit.config.in_channels == 4
    assert vit.preprocess.range == (0, 65535)
    done(vitlit("validate", run))
    refused(vitlit("validate", run, "--data.range", "[0,4095]"), "data.range is (0.0, 4095.0)", "(0.0, 65535.0)")
    assert "6 images" in done(vitlit("predict", run, four / "val", "--out", tmp_path / "a.csv"))
    refused(vitlit("export", run, tmp_path / "a.onnx"), "of data.range", "--input float")


def test_copies_are_found_by_what_pictures_show(four: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(four, tmp_path / "copied"))
    shutil.copy(root / "train" / "a" / "0.tif", root / "train" / "a" / "copy.tif")
    names = sorted(path.name for path in (root / "train" / "a").iterdir())
    index = Index.of(root / "train" / "a", names, np.full(len(names), -1))
    table = Table(names, ["train"] * len(names), names, np.zeros((len(names), 2)))
    preprocess = Preprocess((16, 16), mean=(0.5,) * 4, std=(0.5,) * 4, range=(0, 65535))
    found = suspects(table, {"train": index}, [], preprocess, k=2)["near_duplicates"]
    assert [row[:4] for row in found if not row[4]] == [("0.tif", "train", "copy.tif", "train")]


def test_a_run_that_stopped_goes_on_as_if_it_had_not(vitlit: Command, four: Path, tmp_path: Path) -> None:
    moments = ["--data.mean", "[0.5,0.5,0.5,0.5]", "--data.std", "[0.3,0.3,0.3,0.3]", "--data.range", "[0,65535]"]
    augment = ["--data.augment", "torchvision.transforms.v2.RandomVerticalFlip", "--data.erasing.prob", 0.5]
    fit = ["fit", *SMALL, "--data.root", four, "--data.batch_size", 8, *moments, *augment, "--data.mixing.mixup", 0.5]
    done(vitlit(*fit, "--run.name", "whole"))

    def stopped() -> None:
        begin = Stage.on_train_batch_start

        def patched(self: Stage, batch: Any, index: int) -> None:
            begin(self, batch, index)
            if self.trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        Stage.on_train_batch_start = patched  # type: ignore[assignment, method-assign]

    assert vitlit(*fit, "--run.name", "parts", before=stopped).code == 143
    assert "continuing" in done(vitlit(*fit, "--run.name", "parts"))
    one, other = (torch.load(tmp_path / "runs" / name / "checkpoints" / "last.ckpt") for name in ("whole", "parts"))
    assert one["global_step"] == other["global_step"] == 6
    assert all(torch.equal(tensor, other["state_dict"][name]) for name, tensor in one["state_dict"].items())


def test_weights_of_photographs_begin_a_network_of_four_channels(
    vitlit: Command, four: Path, work: Path, few: Path
) -> None:
    start = ["--config", "recipes/finetune_folder", "--model.init_from", "runs/pretrain", "--data.image_size", 16]
    fit = ["fit", *start, "--trainer.max_steps", 1, "--data.batch_size", 8, "--trainer.logger", "false"]
    fit += [
        "--data.num_workers",
        0,
        "--run.report",
        "false",
        "--model.schedule.warmup",
        0,
        "--trainer.accelerator",
        "cpu",
    ]
    levels = ["--data.range", "[0,65535]"]
    moments = ["--data.mean", "[0.1,0.2,0.3,0.4]", "--data.std", "[0.5,0.6,0.7,0.8]"]
    refused(vitlit(*fit, "--data.root", four, *levels), "data.range needs data.mean and data.std")
    done(vitlit(*fit, "--data.root", four, *levels, *moments, "--run.name", "four"))
    vit: Any = package.load(work / "runs" / "four")
    assert (vit.config.in_channels, vit.preprocess.range) == (4, (0, 65535))
    assert (vit.preprocess.mean, vit.preprocess.std) == ((0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8))
    theirs: Any = package.load(work / "runs" / "pretrain")
    stems = (each.get_parameter("patch_embed.proj.weight") for each in (vit, theirs))
    four_channels, three = (stem.detach() for stem in stems)
    assert (four_channels - three[:, [0, 1, 2, 0]] * 0.75).abs().max() < 1e-3  # and one step
    again = [*fit, "--model.init_from", "runs/four"]
    done(vitlit(*again, "--data.root", four, "--run.name", "again"))  # with all that came with the weights
    assert package.load(work / "runs" / "again").preprocess == vit.preprocess
    others = vitlit(*again, "--data.root", few, "--run.name", "others")
    refused(others, "cannot read the image", "it has 1 channels, but mean and std have 4 numbers")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ground": "black"}, "data.ground is for RGB of 8 bits, not for data.range"),
        ({"cache": "memory"}, "data.cache is for RGB of 8 bits"),
        ({"photometric": Photometric(jitter=0.1)}, "data.photometric, or data.views, with jitter, grey or solarise"),
        ({"views": [Views(1, 8, solarise=0.1)]}, "data.photometric, or data.views, with jitter, grey or solarise"),
        ({"views": "dino"}, "data.photometric, or data.views, with jitter"),
        ({"augment": ThreeAugment()}, "data.augment"),
        ({"augment": TimmRandAugment()}, "data.augment"),
        ({"augment": BigVisionRandAugment()}, "data.augment: BigVisionRandAugment .* it is for RGB of 8 bits"),
        ({"augment": v2.ColorJitter(0.4)}, "data.augment: ColorJitter fails on an image"),
        ({"augment": v2.RandAugment()}, "data.augment: RandAugment fails on an image"),
        ({"augment": v2.ToDtype(torch.uint8, scale=True)}, r"data.augment makes images uint8 \[4, 16, 16\]"),
    ],
)
def test_what_is_for_eight_bits_is_refused(options: dict[str, Any], words: str, four: Path) -> None:
    moments: Any = {"mean": (0.5,) * 4, "std": (0.5,) * 4, "range": (0, 65535)}
    made = partial(ImageFolderData, str(four), image_size=16, batch_size=8, **moments)
    user_error(words, lambda: made(**options).check("fit", 1))


def test_blur_flips_and_further_views_are_not_refused(four: Path) -> None:
    moments: Any = {"mean": (0.5,) * 4, "std": (0.5,) * 4, "range": (0, 65535)}
    options: dict[str, Any] = {"views": [Views(1, 8, blur=1.0)], "augment": v2.RandomVerticalFlip(), "num_workers": 0}
    data = ImageFolderData(str(four), image_size=16, batch_size=8, **moments, **options)
    data.check("fit", 1)
    batch = next(iter(data.train_dataloader()))
    assert [view.shape for view in batch.views] == [(8, 4, 16, 16), (8, 4, 8, 8)]


def test_the_check_names_other_channels_and_values_beyond(four: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(four, tmp_path / "spoilt"))
    write(root / "train" / "a" / "grey.png", np.full((16, 16, 1), 9, np.uint16))
    write(root / "val" / "b" / "nan.npy", np.full((16, 16, 4), np.nan))
    write(root / "val" / "b" / "flat.npy", np.full((16, 16, 4), 7.0))
    report = check(root, look=partial(look, levels=(0, 65000)), workers=0)
    found = {each.kind: each.reasons for each in report.faults + report.warnings}
    assert found["channels"] == {"train/a/grey.png": "1 instead of 4"}
    assert found["unreadable"] == {"val/b/nan.npy": "some of its values are infinite or no numbers"}
    assert found["uniform"] == {"val/b/flat.npy": "7 to 7"}
    over = [file for file in sorted(four.rglob("*.tif")) if tifffile.imread(file).max() > 65000]
    assert sorted(found.get("beyond", {})) == [str(file.relative_to(four)) for file in over]
    for wrong in (["7"], ["a", "b"], ["2", "1"]):
        user_error("range", run_check, [str(four), "--range", *wrong])


def test_a_class_of_arrays_is_found_but_an_array_in_a_tar_is_not_its_image(tmp_path: Path) -> None:
    folder(tmp_path / "data", "float")
    write_shards([str(tmp_path / "data"), str(tmp_path / "shards")])
    moments: Any = {"mean": (0.5, 0.5), "std": (0.5, 0.5), "range": (0, 1)}
    options: dict[str, Any] = {"image_size": 16, "batch_size": 8, "num_workers": 0, **moments}
    both = [ImageFolderData(str(tmp_path / name), **options) for name in ("data", "shards")]
    for ours, theirs in zip(*(data.train_dataloader() for data in both), strict=True):
        assert torch.equal(ours.views[0], theirs.views[0])


def test_an_objective_of_colours_takes_four_channels_at_most() -> None:
    user_error("MaskedPatch tells colours of at most 4 channels", MaskedPatch, ViT(**TINY, in_channels=5))
    assert MaskedPatch(ViT(**TINY, in_channels=4)).head.out_features == 4096


def test_a_teacher_of_other_values_is_refused() -> None:
    student, teacher = ViT(**TINY, num_classes=2), cast(Any, ViT(**TINY, num_classes=2))
    teacher.preprocess = Preprocess((16, 16))
    objective = Distillation(student, teacher="t", num_classes=2)
    objective.set_teacher(teacher)
    objective.prepare(SimpleNamespace(classes=["a", "b"], preprocess=Preprocess((16, 16))))
    theirs = SimpleNamespace(classes=["a", "b"], preprocess=Preprocess((16, 16), range=(0, 9)))
    user_error("the teacher t sees other channels, or another data.range", objective.prepare, theirs)


def test_transformers_gets_no_processor_for_a_range(tmp_path: Path) -> None:
    vit: Any = ViT(**TINY, num_classes=2)
    vit.preprocess = Preprocess((16, 16), range=(0, 65535))
    user_error("image processors read RGB of 8 bits", package.save_weights, vit, tmp_path / "hf", "hf")
    assert not (tmp_path / "hf").exists()
