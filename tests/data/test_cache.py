"""The kept scan of a large folder: the same index, and anew where the folder is another."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from vitlit.data import cache
from vitlit.data.folder import scan_split, scan_train
from vitlit.data.index import Names


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that counts as large, and as old enough for its times to tell a change."""
    monkeypatch.setattr(cache, "WORTH", 1)
    root = tmp_path / "root"
    for name in ("train/cat/1.png", "train/cat/deep/er/2.png", "train/dog/3.jpg", "val/cat/4.png", "train/dog/x.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    age(root)
    return root


def age(root: Path) -> None:
    for folder, _, _ in os.walk(root):
        os.utime(folder, (time.time() - 100,) * 2)


def scanned(root: Path) -> list[tuple[str, int]]:
    _, index, _ = scan_train(root)
    return list(zip([name.decode() for name in index.names()], index.labels.tolist(), strict=True))


FOUND = [("cat/1.png", 0), ("cat/deep/er/2.png", 0), ("dog/3.jpg", 1)]


def test_a_scan_is_kept_beside_the_split_and_read_without_looking_again(
    large: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scanned(large) == FOUND
    assert sorted(path.name for path in (large / ".vitlit").iterdir()) == ["train.npz"]
    monkeypatch.setattr("vitlit.data.folder.walk", None)
    capsys.readouterr()
    assert scanned(large) == FOUND
    assert "not read: .txt 1;" in capsys.readouterr().out
    moved = large.rename(large.with_name("moved"))
    assert scanned(moved) == FOUND


def test_a_scan_of_class_folders_in_the_root_is_kept_in_the_root_and_is_no_class(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = (large / "train").rename(large / "own")
    age(large)
    for _ in range(2):
        classes, train, held = scan_train(root, 0.4)
        assert held is not None
        assert (classes, sorted(train.names() + held.names())) == (["cat", "dog"], [name.encode() for name, _ in FOUND])
        assert sorted(path.name for path in root.iterdir()) == [".vitlit", "cat", "dog"]
        assert [path.name for path in (root / ".vitlit").iterdir()] == ["root.npz"]
        assert sorted(path.name for path in large.iterdir()) == ["own", "val"]
        monkeypatch.setattr("vitlit.data.folder.walk", None)
    root.rename(large / "moved")
    assert scan_train(large / "moved", 0.4)[0] == ["cat", "dog"]


@pytest.mark.parametrize("layout", ["train", "root"])
def test_class_folders_of_one_age_that_change_places_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setattr(cache, "WORTH", 1)
    folder = tmp_path / layout
    for name in ("cat/1.png", "dog/2.png"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    for path in (folder / "cat", folder / "dog", folder):
        os.utime(path, (1e9, 1e9))
    assert scan_split(folder, ["cat", "dog"]).names() == [b"cat/1.png", b"dog/2.png"]
    assert cache.kept_at(folder).is_file()
    time.sleep(0.1)  # more than a tick of the clock that folders have their times from
    for one, other in (("cat", "x"), ("dog", "cat"), ("x", "dog")):
        (folder / one).rename(folder / other)
    assert scan_split(folder, ["cat", "dog"]).names() == [b"cat/2.png", b"dog/1.png"]


@pytest.mark.parametrize("change", ["add", "remove", "rename", "add deep", "class", "garbage", "cut"])
def test_a_change_is_noticed(large: Path, change: str) -> None:
    assert scanned(large) == FOUND
    train, kept = large / "train", large / ".vitlit" / "train.npz"
    wanted = list(FOUND)
    if change == "add":
        (train / "dog" / "4.png").touch()
        wanted.append(("dog/4.png", 1))
    elif change == "remove":
        (train / "cat" / "1.png").unlink()
        wanted.pop(0)
    elif change == "rename":
        (train / "dog" / "3.jpg").rename(train / "dog" / "0.jpg")
        wanted[2] = ("dog/0.jpg", 1)
    elif change == "add deep":
        (train / "cat" / "deep" / "er" / "9.png").touch()
        wanted.insert(2, ("cat/deep/er/9.png", 0))
    elif change == "class":
        shutil.copytree(train / "dog", train / "ape")
        wanted = [("ape/3.jpg", 0), *((name, label + 1) for name, label in FOUND)]
    elif change == "garbage":
        kept.write_bytes(b"PK garbage")
    else:
        kept.write_bytes(kept.read_bytes()[:-300])
    assert scanned(large) == wanted
    age(large)
    assert scanned(large) == wanted


def test_a_folder_that_has_just_changed_is_not_kept(large: Path) -> None:
    """Its time may not tell a change that follows at once."""
    (large / "train" / "dog" / "5.png").touch()
    scanned(large)
    assert not (large / ".vitlit").exists() or not list((large / ".vitlit").iterdir())


@pytest.mark.parametrize(
    "damage",
    ["empty", "junk", "cut", "pickled"],
)
def test_a_kept_scan_that_is_damaged_is_made_anew(large: Path, damage: str) -> None:
    assert scanned(large) == FOUND
    file = large / ".vitlit" / "train.npz"
    data = file.read_bytes()
    with np.load(file) as opened:
        arrays = dict(opened)
    if damage == "pickled":
        np.savez(file, **{**arrays, "names": np.array([print], object)})
    else:
        file.write_bytes({"empty": b"", "junk": b"PK\x03\x04" + b"junk" * 99, "cut": data[: len(data) // 2]}[damage])
    assert cache.load(large / "train", ["cat", "dog"]) is None
    assert scanned(large) == FOUND


@pytest.mark.parametrize("layout", ["train", "root"])
def test_small_folders_and_read_only_data_are_left_alone(
    large: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setattr(cache, "WORTH", 4)
    folder = large / "train" if layout == "train" else (large / "train").rename(large / "own")
    kept = cache.kept_at(folder).parent

    def found() -> list[bytes]:
        return scan_split(folder, ["cat", "dog"]).names()

    names = [name.encode() for name, _ in FOUND]
    assert found() == names
    assert not kept.exists()
    monkeypatch.setattr(cache, "WORTH", 1)
    kept.write_text("a file, so that no folder can be made")
    age(large)
    assert found() == names
    assert kept.is_file()


def test_classes_by_another_order_are_numbered_by_it(large: Path) -> None:
    for _ in range(2):
        index = scan_split(large / "val", ["dog", "cat"])
        assert (index.names(), index.labels.tolist()) == ([b"cat/4.png"], [1])


def test_names_are_what_was_packed_and_cost_their_bytes() -> None:
    names = [b"", b"a", "日本".encode(), b"x" * 300, b""]
    packed = Names.pack(names)
    assert list(packed) == [packed[row] for row in range(len(packed))] == names
    assert packed.packed.nbytes == sum(map(len, names))
    with pytest.raises(IndexError):
        packed[5]
    assert len(Names.pack([])) == 0
    assert Names.pack([]).ends.dtype == np.int64
