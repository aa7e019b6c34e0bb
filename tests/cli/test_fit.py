"""`vitlit fit`: what it trains on, measures, logs and refuses."""

import csv
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SMALL, Result, done, refused
from PIL import Image
from test_loggers import recorded

Command = Callable[..., Result]


def columns(run: Path) -> set[str]:
    with (run / "metrics.csv").open(newline="") as file:
        return set(next(csv.reader(file)))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def data(few: Path, tmp_path: Path) -> Path:
    """A copy of the few images, to be spoilt."""
    return Path(shutil.copytree(few, tmp_path / "images"))


def spoil_nothing_there(root: Path) -> str:
    shutil.rmtree(root)
    return "is not a folder"


def spoil_empty(root: Path) -> str:
    shutil.rmtree(root)
    root.mkdir()
    return "--data.holdout 10%"


def spoil_no_classes(root: Path) -> str:
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    return "holds no class folders"


def spoil_empty_class(root: Path) -> str:
    for image in (root / "train" / "2").iterdir():
        image.unlink()
    return "train/2 holds no image"


def spoil_flat_val(root: Path) -> str:
    for image in list((root / "val").glob("*/*")):
        image.rename(root / "val" / f"{image.parent.name}-{image.name}")
    for folder in [path for path in (root / "val").iterdir() if path.is_dir()]:
        folder.rmdir()
    return "images but no class folders"


def spoil_strange_val_class(root: Path) -> str:
    (root / "val" / "zebra").mkdir()
    return "'zebra'"


def spoil_no_val(root: Path) -> str:
    shutil.rmtree(root / "val")
    return "--data.holdout 10%"


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_nothing_there,
        spoil_empty,
        spoil_no_classes,
        spoil_empty_class,
        spoil_flat_val,
        spoil_strange_val_class,
        spoil_no_val,
    ],
)
def test_folders_laid_out_otherwise_are_refused_before_anything_is_written(
    vitlit: Command, data: Path, tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    remedy = spoil(data)
    refused(vitlit("fit", *SMALL, "--data.root", data), data, remedy)
    assert not (tmp_path / "runs").exists()


def test_files_that_are_not_read_and_images_that_do_not_fill_a_batch_are_told_once(vitlit: Command, data: Path) -> None:
    (data / "train" / "1" / "x.heic").touch()
    out = done(vitlit("fit", *SMALL, "--data.root", data, "--data.batch_size", 9, "--trainer.max_steps", 9))
    assert out.count("not read") == out.count(f"{data}/train: not read: .heic 1; `vitlit data check` names them\n") == 1
    assert out.count("4 steps an epoch, each time without 4 other images\n") == 1
    short = ("--data.batch_size", 8, "--trainer.limit_train_batches", 3, "--run.name", "short")
    out = done(vitlit("fit", *SMALL, "--data.root", data, *short))
    assert "3 steps an epoch, of the 5 that the images fill, by trainer.limit_train_batches\n" in out


def test_a_class_without_validation_images_is_said_in_one_line(vitlit: Command, data: Path) -> None:
    shutil.rmtree(data / "val" / "3")
    out = done(vitlit("fit", *SMALL, "--data.root", data))
    assert [line for line in out.splitlines() if " lacks " in line] == [f"{data}/val lacks 1 of 4 classes, such as '3'"]


@pytest.mark.parametrize(("kind", "workers"), [("text.png", 0), ("cut.png", 0), ("cut.jpg", 2)])
def test_an_image_that_cannot_be_read_is_named(vitlit: Command, data: Path, kind: str, workers: int) -> None:
    original = min((data / "train" / "1").iterdir())
    spoilt = original.with_name(kind)
    if kind == "text.png":
        spoilt.write_text("not an image")
    else:
        Image.open(original).resize((64, 64)).save(spoilt)
        spoilt.write_bytes(spoilt.read_bytes()[: spoilt.stat().st_size // 2])
    original.unlink()
    result = vitlit("fit", *SMALL, "--data.root", data, "--data.num_workers", workers)
    refused(result)
    assert result.err.startswith(f"vitlit: error: cannot read the image {spoilt}: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(vitlit: Command, few: Path) -> None:
    refused(vitlit("fit", *SMALL, "--data.root", few, "--trainer.accelerator", "gpu"), "gpu", "cpu")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--trainer.max_steps -1 --trainer.max_epochs -1", "training has no end"),
        ("--model.schedule.warmup 6", "model.schedule.warmup is 6 steps but training has only 6"),
    ],
)
def test_a_training_that_cannot_end_well_is_refused_before_it_begins(
    vitlit: Command, few: Path, tmp_path: Path, flags: str, words: str
) -> None:
    refused(vitlit("fit", *SMALL, "--data.root", few, *flags.split()), words, "trainer.max_steps")
    assert not (tmp_path / "runs" / "pretrain" / "checkpoints").exists()


@pytest.mark.parametrize(("classes", "top5"), [(2, False), (3, False), (6, True)])
def test_metrics_have_their_names(vitlit: Command, digits: Path, tmp_path: Path, classes: int, top5: bool) -> None:
    for split in ("train", "val"):
        for label in range(classes):
            (tmp_path / "part" / split).mkdir(parents=True, exist_ok=True)
            (tmp_path / "part" / split / str(label)).symlink_to(digits / split / str(label))
    done(vitlit("fit", *SMALL, "--data.root", "part"))
    names = {"train/loss", "train/lr", "train/images_per_second", "train/data_wait", "train/memory_gib"}
    names |= {"val/loss", "val/top1", "val/top1_macro"}
    assert columns(tmp_path / "runs" / "pretrain") == {"step", "epoch", "unix_seconds"} | names | (
        {"val/top5"} if top5 else set()
    )


def test_one_class_is_refused(vitlit: Command, few: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "one" / split).mkdir(parents=True)
        (tmp_path / "one" / split / "0").symlink_to(few / split / "0")
    refused(vitlit("fit", *SMALL, "--data.root", "one", "--data.batch_size", 8), "at least 2")


def test_bfloat16_trains(vitlit: Command, few: Path) -> None:
    assert "is complete" in done(vitlit("fit", *SMALL, "--data.root", few, "--trainer.precision", "bf16-mixed"))


@pytest.mark.parametrize("share", ["10%", "0.1"])
def test_a_share_of_plain_class_folders_is_held_out(vitlit: Command, few: Path, share: str) -> None:
    out = done(vitlit("fit", *SMALL, "--data.root", few / "train", "--data.holdout", share))
    assert "36 training and 4 validation images, 4 classes" in out


def test_digits_are_made_where_the_default_folder_is_missing(vitlit: Command, tmp_path: Path) -> None:
    once = ("--trainer.max_steps", 1, "--model.schedule.warmup", 0)
    assert "1,438 training and 359 validation images" in done(vitlit("fit", *SMALL, *once))
    assert len(list((tmp_path / "data" / "digits" / "train").iterdir())) == 10


def test_nothing_is_made_where_another_folder_is_missing_or_the_default_is_there(
    vitlit: Command, tmp_path: Path
) -> None:
    refused(vitlit("fit", *SMALL, "--data.root", "data/digit"), "data/digit is not a folder")
    assert not (tmp_path / "data").exists()
    (tmp_path / "data" / "digits").mkdir(parents=True)
    refused(vitlit("fit", *SMALL), "data/digits has no folder train")
    assert not list((tmp_path / "data" / "digits").iterdir())


def test_a_run_is_logged_to_wandb(vitlit: Command, few: Path, tmp_path: Path) -> None:
    out = done(vitlit("fit", *SMALL, "--data.root", few, "--trainer.logger", "vitlit.loggers.Wandb"))
    run = tmp_path / "runs" / "pretrain"
    (logged,) = (run / "wandb").glob("offline-run-*")
    assert f"wandb sync runs/pretrain/wandb/{logged.name}\n" in out
    history, config = recorded(logged)
    assert config["config"]["data"]["batch_size"] == 16
    assert config["classes"] == ["0", "1", "2", "3"]
    for row in table(run / "metrics.csv"):
        for name in ("train/loss", "train/lr", "val/top1"):
            if row[name]:
                values = [r[name] for r in history if r.get("trainer/global_step") == int(row["step"]) and name in r]
                assert values == pytest.approx([float(row[name])])
    tables = {name for row in history for name in row if "/" not in name}
    assert {"mistakes", "confusion"} <= {name.partition(".")[0] for name in tables}


def test_a_run_without_validation_says_that_none_is_best(vitlit: Command, few: Path) -> None:
    result = vitlit("fit", *SMALL, "--data.root", few, "--trainer.limit_val_batches", 0)
    assert result.code == 0, result.err
    assert "none is best" in result.out


def test_a_loss_that_rose_is_said_at_the_end(vitlit: Command, few: Path) -> None:
    out = done(vitlit("fit", *SMALL, "--data.root", few, "--model.optimizer.lr", 10, "--model.schedule.warmup", 0))
    assert re.search(r"vitlit: warning: train/loss rose from 1\.\d+ to [\d,.]+; lower the learning rate\n", out)
    assert "rose" not in done(vitlit("fit", *SMALL, "--data.root", few, "--run.name", "b"))
