"""Images that cannot be read: an error that names them, or a run that goes on, says which, and knows when to stop."""

import csv
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from vitlit.data.bad_images import BadImages
from vitlit.data.dataset import Images
from vitlit.data.folder import scan_train
from vitlit.data.index import FolderFiles, Index, Names, StorageUserError
from vitlit.data.stream import Sample, TrainStream
from vitlit.errors import UserError


@pytest.fixture
def broken(few: Path, tmp_path: Path) -> Path:
    """The few digits, of which two of class 1 cannot be read: one is empty, one cut short."""
    root = tmp_path / "broken"
    shutil.copytree(few, root)
    first, second, *_ = sorted((root / "train" / "1").iterdir())
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes()[:40])
    return root


def rows(file: Path) -> list[list[str]]:
    with file.open(newline="") as opened:
        return list(csv.reader(opened))


def batches(root: Path, file: Path, workers: int, start: int = 0, epochs: int = 2) -> list[list[Tensor]]:
    """Two epochs' images, labels and indices in batches of 8, from a step on."""
    _, index, _ = scan_train(root)
    found: list[list[Tensor]] = []
    while start < 5 * epochs:
        position = start
        stream = TrainStream(len(index), 8, 3, lambda position=position: position)  # type: ignore[misc]
        images = Images(index, lambda image: image, 7, BadImages(file, len(index)))
        found += DataLoader(images, 8, sampler=stream, num_workers=workers)
        start += 5
    return found


def same(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) for left, right in pairs for a, b in zip(left, right, strict=True))


def test_another_of_the_class_comes_in_place_always_the_same_with_any_workers(broken: Path, tmp_path: Path) -> None:
    _, index, _ = scan_train(broken)
    bad = {
        i for i in range(len(index)) if index.path(i) in {str(p) for p in sorted((broken / "train/1").iterdir())[:2]}
    }
    runs = [batches(broken, tmp_path / f"{workers}.csv", workers) for workers in (0, 1, 2)]
    for run in runs:
        indices = torch.cat([batch[2] for batch in run])
        labels = torch.cat([batch[1] for batch in run])
        assert not bad & set(indices.tolist())
        assert labels.tolist() == index.labels[indices.numpy()].tolist()
        for epoch in (indices[:40], indices[40:]):
            assert torch.bincount(torch.from_numpy(index.labels)[epoch]).tolist() == [10, 10, 10, 10]
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])
    assert same(batches(broken, tmp_path / "later.csv", 0, start=5), runs[0][5:])
    epochs = [
        [i for i in torch.cat([b[2] for b in half]).tolist() if index.labels[i] == 1]
        for half in (runs[0][:5], runs[0][5:])
    ]
    assert sorted(epochs[0]) != sorted(epochs[1])  # drawn anew


def test_the_list_has_each_image_once_with_its_reason(broken: Path, tmp_path: Path) -> None:
    file = tmp_path / "bad.csv"
    for _ in range(2):  # the second as a run that is continued
        batches(broken, file, workers=2)
    head, *listed = rows(file)
    assert head == ["path", "reason"]
    found = {path: reason for path, reason in listed if path != "path"}  # two workers may both write the header
    assert set(found) == {str(path) for path in sorted((broken / "train" / "1").iterdir())[:2]}
    assert all(reason and path not in reason for path, reason in found.items())
    assert len(listed) <= 4  # two workers may meet one at the same moment


def test_without_skip_it_is_an_error_that_names_the_way_out(broken: Path) -> None:
    _, index, _ = scan_train(broken)
    with pytest.raises(UserError, match=r"cannot read the image .*/train/1/.*; --data\.on_bad_image skip trains"):
        Images(index, lambda image: image)[Sample(0, 10, 0, 0)]


@pytest.mark.parametrize("workers", [0, 2])
def test_jpegs_that_decode_though_damaged_are_told_once_and_by_name(
    few: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: int
) -> None:
    for number, path in enumerate(sorted((few / "train").glob("*/*"))):
        copy = tmp_path / "train" / path.parent.name / f"{path.stem}.jpg"
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("RGB").save(copy)
        if number % 8 == 0:
            copy.write_bytes(copy.read_bytes()[:-2] + bytes(40) + b"\xff\xd9")
    batches(tmp_path, tmp_path / "bad.csv", workers)
    out, err = capfd.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert re.fullmatch(r"vitlit: warning: .*/train/\d/\d+\.jpg is damaged, but was decoded \(Corrupt .*", lines[0])
    assert 2 <= len(lines) <= 2 * max(workers, 1)  # of two loaders; two workers may meet one at the same moment


def test_a_class_of_which_nothing_can_be_read_is_an_error(broken: Path, tmp_path: Path) -> None:
    for path in (broken / "train" / "2").iterdir():
        path.write_bytes(b"")
    _, index, _ = scan_train(broken)
    images = Images(index, lambda image: image, 0, BadImages(tmp_path / "bad.csv", 2000))
    with pytest.raises(UserError, match=r"no image can be read of the class of .*/train/2/.*bad\.csv"):
        images[Sample(0, 25, 0, 0)]


def test_storage_that_fails_is_no_bad_image(tmp_path: Path) -> None:
    """A server that is away says nothing of the image, which must not be replaced."""

    class Away(FolderFiles):
        def read(self, row: int) -> bytes:
            raise StorageUserError("the server cannot be reached")

    index = Index(Away("s3://bucket", Names.pack([b"a.png"])), np.arange(2), np.zeros(2, np.int64))
    images = Images(index, lambda image: image, 0, BadImages(tmp_path / "bad.csv", 2))
    for item in (0, Sample(0, 0, 0, 0)):
        with pytest.raises(StorageUserError, match=r"^the server cannot be reached$"):
            images[item]
    assert not (tmp_path / "bad.csv").exists()


@pytest.mark.parametrize(("images", "most"), [(40, 10), (1000, 10), (5000, 50)])
def test_a_hundredth_may_be_bad_and_ten_in_any_case(tmp_path: Path, images: int, most: int) -> None:
    lists = [BadImages(tmp_path / "bad.csv", images) for _ in range(2)]  # of two workers
    for number in range(most):
        lists[number % 2].note(f"{number}.png", "no image")
        lists[number % 2].note(f"{number}.png", "no image")
    with pytest.raises(UserError, match=rf"{most + 1} images cannot be read, {most} may be skipped"):
        lists[0].note("one more, ü.png", "no image")
    assert rows(tmp_path / "bad.csv")[1:] == [[f"{n}.png", "no image"] for n in range(most)] + [
        ["one more, ü.png", "no image"]
    ]


def test_a_run_skips_and_lists_and_a_run_without_stops(
    vitlit: Callable[..., Any], broken: Path, tmp_path: Path
) -> None:
    stopped = vitlit("fit", *SMALL, "--data.root", broken, "--data.num_workers", 2)
    assert (stopped.code, stopped.err.count("\n")) == (2, 1)
    assert "cannot read the image" in stopped.err
    assert "on_bad_image skip" in stopped.err
    skips = ("fit", *SMALL, "--data.root", broken, "--data.on_bad_image", "skip", "--run.name", "skips")
    # Without a logger, which would make the folder, and over another run's, whose list goes.
    for more in (("--trainer.logger", "false", "--data.num_workers", 2), ("--run.overwrite", "true")):
        going = vitlit(*skips, *more)
        assert going.code == 0, going.err
        assert len(rows(tmp_path / "runs" / "skips" / "bad_images.csv")) == 3

    photos = broken / "train" / "1"
    stopped = vitlit("predict", tmp_path / "runs" / "skips", photos, "--data.on_bad_image", "error")
    assert (stopped.code, stopped.err.count("\n")) == (2, 1)
    assert "; --data.on_bad_image skip trains and predicts without it" in stopped.err
    for _ in range(2):  # the list is that of the last
        (tmp_path / "out.csv").unlink(missing_ok=True)
        told = vitlit("predict", tmp_path / "runs" / "skips", photos, "--data.on_bad_image", "skip", "--out", "out.csv")
        assert told.code == 0, told.err
        assert "8 images; 2 could not be read, see out-bad.csv" in told.out
        assert {row[0] for row in rows(tmp_path / "out-bad.csv")[1:]} == {
            str(path) for path in sorted(photos.iterdir())[:2]
        }
    assert [row[0] for row in rows(tmp_path / "out.csv")[1:]] == [str(path) for path in sorted(photos.iterdir())[2:]]


def test_a_prediction_of_nothing_is_an_error(vitlit: Callable[..., Any], few: Path, tmp_path: Path) -> None:
    assert vitlit("fit", *SMALL, "--data.root", few, "--run.name", "one").code == 0
    (tmp_path / "text.jpg").write_text("no image")
    result = vitlit("predict", "runs/one", "text.jpg", "--data.on_bad_image", "skip", "--out", "out.csv")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "out.csv is empty; 1 could not be read, see out-bad.csv" in result.err


def test_evaluation_stops_at_a_bad_image_either_way(vitlit: Callable[..., Any], few: Path, tmp_path: Path) -> None:
    root = tmp_path / "holed"
    shutil.copytree(few, root)
    sorted((root / "val" / "2").iterdir())[0].write_bytes(b"no image")
    result = vitlit("fit", *SMALL, "--data.root", root, "--data.on_bad_image", "skip")
    assert result.code == 2
    assert "cannot read the image" in result.err
    assert "but evaluates on every image" in result.err
