"""Data sets of Hugging Face: the same images as those of the folder that they were made of."""

import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import user_error
from test_resume import assert_same, left, survive

from vitlit.data import ImageFolderData


def write(folder: Path, few: Path, **options: Any) -> None:
    """Parquet files of a folder's splits, with the images in the folder's order."""
    folder.mkdir()
    for split in ("train", "val"):
        paths = sorted((few / split).rglob("*.png"))
        cells = [{"bytes": path.read_bytes(), "path": str(path.relative_to(few / split))} for path in paths]
        classes = sorted({path.parent.name for path in paths})
        labels = [classes.index(path.parent.name) for path in paths]
        columns = {"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)}
        content: dict[str, list[Any]] = {"image": cells, "label": labels}
        for name, (kind, make) in options.items():
            columns[name], content[name] = kind, [make(row) for row in range(len(paths))]
        table = datasets.Dataset.from_dict(content, features=datasets.Features(columns))
        table.to_parquet(folder / f"{split if split == 'train' else 'validation'}-00000-of-00001.parquet")


@pytest.fixture
def table(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    write(tmp_path / "table", few)
    return tmp_path / "table"


def batches(root: Path, **options: Any) -> list[Any]:
    data = ImageFolderData(str(root), image_size=16, batch_size=8, num_workers=0, **options)
    return [*data.train_dataloader(), *data.val_dataloader()]


@pytest.mark.parametrize("options", [{}, {"holdout": "25%"}])
def test_batches_are_those_of_the_folder(table: Path, few: Path, options: dict[str, Any]) -> None:
    own, folder = batches(table, **options), batches(few, **options)
    assert len(own) == len(folder) > 2
    for one, other in zip(own, folder, strict=True):
        assert torch.equal(one.views[0], other.views[0])
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.indices, other.indices)


def test_labels_are_texts_numbers_several_or_none(few: Path, tmp_path: Path, table: Path) -> None:
    def classes(name: str, **options: Any) -> tuple[list[str], torch.Tensor]:
        write(tmp_path / name, few, **options)
        data = ImageFolderData(str(tmp_path / name), image_size=16, batch_size=8, num_workers=0)
        data.splits.scan()
        return data.classes, torch.cat([batch.labels for batch in data.val_dataloader()])

    texts = classes("texts", label=(datasets.Value("string"), lambda row: "ba"[row % 2]))
    assert texts[0] == ["a", "b"]
    assert texts[1][:3].tolist() == [1, 0, 1]
    assert classes("numbers", label=(datasets.Value("int64"), lambda row: 10 - row % 3))[0] == ["8", "9", "10"]
    kind = datasets.List(datasets.ClassLabel(names=["x", "y"]))
    several = classes("several", label=(kind, lambda row: [0, 1] if row % 2 else [1]))
    assert several[1][:2].tolist() == [[0, 1], [1, 1]]


def test_a_killed_run_ends_like_an_undisturbed_one_on_the_folder(table: Path, few: Path, tmp_path: Path) -> None:
    for kills, workers, root in ((2, 2, table), (0, 0, few)):
        (tmp_path / str(kills)).mkdir()
        survive(kills, 3, workers, 1, root, tmp_path / str(kills), random.Random(0))
    assert_same(left(tmp_path / "2"), left(tmp_path / "0"))


def test_mistakes_are_one_line(table: Path, few: Path, tmp_path: Path) -> None:
    write(tmp_path / "two", few, photo=(datasets.Image(), lambda row: None))
    assert len(batches(tmp_path / "two")) > 2  # the column image is the one
    write(tmp_path / "which", few, image=(datasets.Value("int64"), int))
    user_error("has no column of images", batches, tmp_path / "which")
    write(tmp_path / "labels", few, kind=(datasets.ClassLabel(names=["x"]), lambda row: 0))
    write(tmp_path / "empty", few, image=(datasets.Image(), lambda row: None))
    user_error("its cell is empty", batches, tmp_path / "empty")
    (tmp_path / "empty" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    user_error("cannot be read by datasets", batches, tmp_path / "empty")
    (tmp_path / "empty" / "train-00000-of-00001.parquet").unlink()
    user_error("training images need one named train", batches, tmp_path / "empty")
