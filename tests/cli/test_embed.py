"""`vitlit embed` and `vitlit data check --weights`: features as tables, and what is planted in a folder is listed."""

import csv
import importlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Result, done, refused
from PIL import Image, ImageOps
from pyarrow import parquet
from test_evaluate import save

from vitlit import load

Command = Callable[..., Result]


@pytest.fixture
def root(few: Path, tmp_path: Path) -> Path:
    """The few digits with a mirrored copy of a training image in val."""
    folder = Path(shutil.copytree(few, tmp_path / "digits"))
    source = min((folder / "train" / "2").iterdir())
    ImageOps.mirror(Image.open(source)).save(folder / "val" / "2" / "copy.bmp")
    return folder


@pytest.fixture
def work_(vitlit: Command, tmp_path: Path) -> Command:
    save(tmp_path / "a.safetensors")

    def before() -> None:
        os.environ["XDG_CACHE_HOME"] = "cache"
        for name in ("features", "suspects"):
            setattr(importlib.import_module(f"vitlit.prepare.{name}"), "count", lambda devices: 0)  # noqa: B010

    return lambda *arguments, first=before: vitlit(*arguments, before=first)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open() as opened:
        return list(csv.DictReader(opened))


def test_both_formats_hold_what_the_network_gives(work_: Command, few: Path, tmp_path: Path) -> None:
    for out in ("deep/out.npz", "out.parquet"):
        assert "51 images, 16 features" in done(work_("embed", "a.safetensors", few, out))
    arrays = np.load(tmp_path / "deep" / "out.npz")
    table = parquet.read_table(tmp_path / "out.parquet")
    paths = [path for split in ("train", "val") for path in sorted((few / split).rglob("*.png"))]
    vit: Any = load(tmp_path / "a.safetensors")
    with torch.inference_mode():
        pooled = vit.outputs(vit.preprocess(paths))[1].numpy()
    assert arrays["features"].dtype == np.float32
    np.testing.assert_allclose(arrays["features"], pooled, atol=1e-5)
    assert [few / path for path in arrays["path"]] == paths
    assert arrays["split"].tolist() == ["train"] * 40 + ["val"] * 11
    assert arrays["class"].tolist() == [path.parent.name for path in paths]
    for name in ("path", "split", "class"):
        assert table[name].to_pylist() == arrays[name].tolist()
    assert np.array_equal(np.array(table["features"].to_pylist(), np.float32), arrays["features"])


def test_a_split_alone_and_folders_without_splits_or_classes(work_: Command, few: Path, tmp_path: Path) -> None:
    done(work_("embed", "a.safetensors", few, "val.npz", "--split", "val"))
    assert set(np.load(tmp_path / "val.npz")["split"]) == {"val"}
    done(work_("embed", "a.safetensors", few / "val", "classes.npz"))
    assert np.load(tmp_path / "classes.npz")["class"].tolist() == [*"00011122233"]
    out = done(work_("embed", "a.safetensors", few / "val" / "0", "flat.npz", "--neighbours", 2))
    assert set(np.load(tmp_path / "flat.npz")["class"]) == {""}
    assert "flat-label_errors.csv: not written" in out


def test_neighbours_list_the_planted_copy_and_wrong_labels(work_: Command, root: Path, tmp_path: Path) -> None:
    done(work_("embed", "a.safetensors", root, "out.npz", "--neighbours", 5))
    pairs = {(row["path"], row["other"]): row for row in rows(tmp_path / "out-near_duplicates.csv")}
    source = min((root / "train" / "2").iterdir()).relative_to(root)
    assert pairs[str(source), "val/2/copy.bmp"]["other_split"] == "val"
    errors = rows(tmp_path / "out-label_errors.csv")
    assert all(row["label"] != row["guess"] and row["path"].split("/")[1] == row["label"] for row in errors)
    assert [float(row["label_probability"]) for row in errors] == sorted(float(r["label_probability"]) for r in errors)


def test_check_lists_them_and_draws_them(work_: Command, root: Path, tmp_path: Path) -> None:
    (root / "val" / "3" / "broken.png").write_bytes(b"no image")  # is reported, and else left out
    result = work_("data", "check", root, "--weights", "a.safetensors", "--sheets", "sheets", "--workers", 0)
    assert result.code == 1, result.err
    assert "FAULT unreadable (1)" in result.out
    assert "near_duplicate" in result.out
    assert "val/2/copy.bmp" in result.out.partition("of train and val")[2]
    assert "warning label_error" in result.out
    for name in ("near_duplicate", "label_error"):
        assert Image.open(tmp_path / "sheets" / f"{name}.png").width == 1208


def test_mistakes_are_one_line(work_: Command, few: Path, tmp_path: Path) -> None:
    refused(work_("embed", "a.safetensors", few, "out.csv"), "out.csv", ".parquet or .npz")
    refused(work_("embed", "a.safetensors", few, "out.npz", "--split", "test"), "no folder test")
    refused(work_("embed", "a.safetensors", few, "out.npz", "--neighbours", 0), "neighbours is 0")
    refused(work_("embed", "a.safetensors", "none", "out.npz"), "ROOT none is not a folder; give ROOT a folder")
    (tmp_path / "out-label_errors.csv").touch()
    refused(work_("embed", "a.safetensors", few, "out.npz", "--neighbours", 5), "out-label_errors.csv exists")
    refused(work_("data", "check", few, "--sheets", "sheets"), "--weights")
    hidden = lambda: sys.modules.update({"pyarrow": None})  # type: ignore[dict-item]  # noqa: E731
    refused(work_("embed", "a.safetensors", few, "out.parquet", first=hidden), "pip install pyarrow")
    assert not list(tmp_path.glob("out.*"))
