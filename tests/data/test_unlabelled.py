"""Folders of images without class folders: data without labels, which only some objectives take."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import small_stage
import torch
import yaml
from conftest import REPOSITORY, SMALL, Result, done
from lightning.pytorch import Trainer
from small_stage import TINY
from test_without_labels import FLAGS

from vitlit.data import cache
from vitlit.data.folder import scan_classes, scan_split, scan_train
from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.objectives import Batch, Objective, Step, Supervised
from vitlit.stages import Pretrain

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def loose(few: Path, tmp_path: Path) -> Path:
    """The few digits, all in ROOT/train and ROOT/val themselves."""
    root = tmp_path / "loose"
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        for image in (few / split).glob("*/*"):
            (root / split / f"{image.parent.name}-{image.name}").symlink_to(image)
    return root


class Mean(Objective):
    """Features that are as near to zero as can be: an objective without labels."""

    def forward(self, vit: ViT, batch: Batch, progress: float) -> Step:
        return Step(vit(batch.views[0]).pow(2).mean())


def fit(root: Path, objective: Callable[[ViT], Objective]) -> Trainer:
    return small_stage.fit(Pretrain(ViT(**TINY), objective, partial(torch.optim.SGD, lr=0.1)), root)


def test_a_folder_without_class_folders_is_data_without_labels(loose: Path) -> None:
    data = small_stage.data(loose)
    assert data.split("train").names() == sorted(map(os.fsencode, os.listdir(loose / "train")))
    assert len(data.split("val")) == 11
    assert data.classes == data.class_counts == []
    assert not data.multi_label
    for split in ("train", "val"):
        assert data.split(split).labels.dtype == np.int64
        assert (data.split(split).labels == -1).all()
    labels = torch.cat([batch.labels for batch in (*data.train_dataloader(), *data.val_dataloader())])
    assert labels.tolist() == [-1] * 51


@pytest.mark.parametrize("below", ["train", ""])
def test_a_holdout_is_cut_by_image(loose: Path, below: str) -> None:
    root = loose if below else loose / "train"
    classes, train, held = scan_train(root, 0.2)
    assert held is not None
    assert (classes, len(train), len(held)) == ([], 32, 8)
    assert not set(train.names()) & set(held.names())
    assert small_stage.data(root, holdout="20%").split("val").names() == held.names()


def test_beside_class_folders_loose_images_are_no_data(few: Path, loose: Path) -> None:
    (loose / "train" / "part").symlink_to(few / "train" / "0")
    classes, index, _ = scan_train(loose)
    assert (classes, index.labels.tolist()) == (["part"], [0] * 10)
    with pytest.raises(UserError, match="holds images but no class folders"):
        small_stage.data(loose).check("fit", 1)


def test_classes_that_only_val_has_are_refused(few: Path, loose: Path) -> None:
    (loose / "val" / "0").symlink_to(few / "val" / "0")
    data = small_stage.data(loose)
    with pytest.raises(UserError, match="has the class '0', which the training images lack"):
        data.split("val")


def test_a_folder_of_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "notes.txt").touch()
    (tmp_path / "train" / ".hidden.png").touch()
    with pytest.raises(UserError, match=r"train holds no class folders, only \.txt 1; images belong in"):
        scan_train(tmp_path)
    with pytest.raises(UserError, match="train holds no image"):
        scan_split(tmp_path / "train", [])


@pytest.mark.parametrize("name", ["train", "photos"])  # whose scan is kept beside it, and in it
def test_a_kept_scan_knows_a_new_image(loose: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "WORTH", 1)
    monkeypatch.setattr(cache, "TICK", -3600.0)
    folder = (loose / "train").rename(loose / name)
    classes, before = scan_classes(folder)
    assert (classes, len(before)) == ([], 40)
    assert cache.kept_at(folder).is_file()
    with monkeypatch.context() as patch:
        patch.setattr("vitlit.data.folder._scan", lambda *_: pytest.fail("scanned again"))
        assert scan_classes(folder)[1].names() == before.names()
    (folder / "new.png").symlink_to(loose / "val" / os.listdir(loose / "val")[0])
    assert len(scan_classes(folder)[1]) == 41


def test_an_objective_without_labels_learns_from_it(loose: Path) -> None:
    trainer = fit(loose, Mean)
    assert trainer.global_step == 5
    watched = {"train/images_per_second", "train/data_wait", "train/memory_gib"}
    assert set(trainer.callback_metrics) == {"train/loss", "train/lr", "val/loss", *watched}


def test_what_needs_labels_refuses_it(loose: Path) -> None:
    with pytest.raises(UserError, match="the data has no classes, which Supervised needs; sort it into folders"):
        fit(loose, partial(Supervised, num_classes=4))
    with pytest.raises(UserError, match=r"data\.balanced needs one label an image, but the data has none"):
        small_stage.data(loose, balanced=True).check("fit", 1)


@pytest.mark.parametrize("holdout", [[], ["--data.holdout", "20%"]])
def test_fit_refuses_it_before_anything_is_written(
    loose: Path, vitlit: Callable[..., Result], tmp_path: Path, holdout: list[str]
) -> None:
    result = vitlit("fit", *SMALL, "--data.root", loose, *holdout)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "the data has no classes, which Supervised needs; sort it into folders" in result.err
    assert not (tmp_path / "runs").exists()


def test_mae_learns_from_it_and_is_finetuned_on_labels(loose: Path, few: Path, vitlit: Callable[..., Result]) -> None:
    given = [*SMALL, "--data.root", loose, "--model.objective", "MAE", "--model.objective.decoder_width", 32]
    result = vitlit("fit", *given, "--model.objective.decoder_depth", 1, "--model.objective.decoder_heads", 2)
    assert result.code == 0, result.err
    assert "40 training and 11 validation images, no labels" in result.out
    assert "best val/loss" in result.out
    assert "--data.root LABELLED_FOLDER" in result.out
    tune = ["--data.image_size", 16, "--data.batch_size", 8, "--data.num_workers", 0, "--trainer.max_steps", 2]
    tune += [
        "--config",
        REPOSITORY / "configs" / "finetune.yaml",
        "--model.schedule.warmup",
        1,
        "--trainer.logger",
        "false",
        "--run.report",
        "false",
        "--model.init_from",
        "runs/pretrain",
    ]
    result = vitlit("fit", *tune, "--data.root", few)
    assert result.code == 0, result.err
    result = vitlit("fit", *tune, "--data.root", loose, "--run.name", "other")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "the data has no classes, which Supervised needs" in result.err


@pytest.mark.parametrize("name", [name for name in FLAGS if name != "mae"])  # the test above has it
def test_every_objective_learns_from_it(name: str, loose: Path, vitlit: Callable[..., Result], run: Path) -> None:
    said = done(vitlit("fit", *SMALL, "--model.vit.patch_size", 4, "--data.root", loose, *FLAGS[name]))
    assert "40 training and 11 validation images, no labels" in said
    assert ("best val/loss" in said) == (name == "masked_patch")
    assert ("the last: no metric tells which is best" in said) == (name != "masked_patch")
    head, *rows = (run / "metrics.csv").read_text().splitlines()
    assert "train/rank" in head
    assert "val/knn" not in head
    assert "val/probe" not in head
    assert len(rows) == 6


def test_shards_of_it_are_refused(loose: Path, vitlit: Callable[..., Result]) -> None:
    result = vitlit("data", "shard", loose, "shards")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "holds no classes, as shards need; train on it as it is" in result.err


@pytest.mark.parametrize("holdout", [[], ["--holdout", "20%"]])
def test_data_check_looks_at_it(loose: Path, vitlit: Callable[..., Result], tmp_path: Path, holdout: list[str]) -> None:
    (loose / "val" / "broken.png").write_text("no image")
    result = vitlit("data", "check", loose, "--json", "report.json", "--workers", 1, *holdout)
    report = json.loads((tmp_path / "report.json").read_text())
    assert result.code == (0 if holdout else 1), result.out + result.err
    faults = {} if holdout else {"unreadable": ["val/broken.png"]}
    assert {fault["kind"]: fault["paths"] for fault in report["faults"]} == faults
    assert report["splits"]["train"]["images"] == (32 if holdout else 40)
    assert report["splits"]["train"]["classes"] == 0
    assert ("32 without labels" if holdout else "40 without labels") in result.out


def test_data_show_lists_it(loose: Path, vitlit: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"root": str(loose), "batch_size": 4}, "model": {}}))
    result = vitlit("data", "show", ".", "--step", 0)
    assert result.code == 0, result.err
    assert [line.split(",")[3] for line in result.out.splitlines()] == ["label", "", "", "", ""]
