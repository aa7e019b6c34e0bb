"""Shards made elsewhere: indexed once, and refused in one line where they cannot be understood."""

import fcntl
import io
import json
import shutil
import tarfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL
from shard_files import Server, levels, png, tar

from vitlit.data import storage
from vitlit.data.shard_index import INDEX
from vitlit.data.shards import read_shards
from vitlit.errors import UserError


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(storage, "PAUSES", (0.01, 0.02, 0.03))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def numbered(level: int, label: str) -> dict[str, bytes]:
    return {f"{level:04d}.png": png(level), f"{level:04d}.cls": label.encode()}


def lettered(level: int, label: str) -> dict[str, bytes]:
    return {f"sub/{level:04d}.json": json.dumps({"label": label, "n": 1}).encode(), f"sub/{level:04d}.PNG": png(level)}


def counted(level: int, label: str) -> dict[str, bytes]:
    return {f"{level:04d}.json": json.dumps({"cls": int(label)}).encode(), f"{level:04d}.png": png(level)}


def foldered(level: int, label: str) -> dict[str, bytes]:
    return {f"./{label}/": b"", f"./{label}/{level:04d}.png": png(level)}


LABELS = ["10", "2", "2", "0", "10", "0"]
WORDS = ["tench", "ape", "ape", "zoo", "tench", "zoo"]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize(
    ("sample", "labels", "classes"),
    [
        (numbered, LABELS, ["0", "2", "10"]),
        (numbered, WORDS, ["ape", "tench", "zoo"]),
        (counted, LABELS, ["0", "2", "10"]),
        (lettered, WORDS, ["ape", "tench", "zoo"]),
        (foldered, WORDS, ["ape", "tench", "zoo"]),
        (foldered, LABELS, ["0", "10", "2"]),  # as the folder's
    ],
)
@pytest.mark.parametrize("name", ["x-train-{:05d}.tar x_validation-{:03d}.tar", "train/{}.tar val/{}.tar"])
def test_sets_made_elsewhere_are_indexed_once(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    sample: Callable[[int, str], dict[str, bytes]],
    labels: list[str],
    classes: list[str],
    name: str,
    form: int,
) -> None:
    root, (train, val) = tmp_path / "set", name.split()
    for number in range(3):
        shard: dict[str, bytes] = {"README.md": b"hello"}
        for level in (2 * number, 2 * number + 1):
            shard |= sample(level, labels[level])
        tar(root / train.format(number), shard, form)
    tar(root / val.format(0), sample(77, labels[0]), form)
    for printed in (True, False):
        found = read_shards(str(root))
        said = capsys.readouterr().out
        assert said.count("\n") == printed
        assert ("indexed 4 shards, images: 6 of train, 1 of val, in 3 classes" in said) == printed
        assert (found.classes, found.multi_label) == (classes, False)
        assert levels(found.splits["train"]) == list(range(6))
        assert [classes[label] for label in found.splits["train"].labels] == labels
        assert levels(found.splits["val"]) == [77]
        assert [classes[label] for label in found.splits["val"].labels] == labels[:1]
    assert (root / INDEX).is_file()


def test_a_set_is_indexed_again_when_a_shard_changes_or_comes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "set"
    tar(root / "train-0.tar", numbered(1, "0") | numbered(2, "1"))
    assert levels(read_shards(str(root)).splits["train"]) == [1, 2]
    tar(root / "train-1.tar", numbered(3, "1"))
    assert levels(read_shards(str(root)).splits["train"]) == [1, 2, 3]
    tar(root / "train-0.tar", numbered(4, "0") | numbered(5, "1"))  # of the same size
    assert levels(read_shards(str(root)).splits["train"]) == [4, 5, 3]
    (root / "classes.txt").write_text("ape\nzoo\n")
    assert read_shards(str(root)).classes == ["ape", "zoo"]
    assert capsys.readouterr().out.count(": indexed ") == 4


def test_a_set_on_a_server_is_indexed_into_the_users_cache(
    tmp_path: Path, serve: Callable[..., Server], capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "set"
    tar(root / "test/0.tar", numbered(1, "0") | numbered(2, "2"))
    (root / "classnames.txt").write_text("ape\ncat\nzoo\n")
    server = serve(root)
    for count in (1, 0):
        found = read_shards(server.url)
        assert (found.classes, list(found.splits)) == (["ape", "cat", "zoo"], ["test"])
        assert (levels(found.splits["test"]), found.splits["test"].labels.tolist()) == ([1, 2], [0, 2])
        assert capsys.readouterr().out.count(": indexed ") == count
    assert len(list((tmp_path / "cache/vitlit").glob("*.npz"))) == 1
    assert not (root / INDEX).exists()
    tar(root / "test/1.tar", numbered(3, "1"))
    assert levels(read_shards(server.url).splits["test"]) == [1, 2, 3]
    tar(root / "test/1.tar", numbered(4, "1") | {"pad.bin": bytes(20_000)})
    assert levels(read_shards(server.url).splits["test"]) == [1, 2, 4]
    read_shards(str(root))  # which is then kept beside it, and of use wherever it is copied to
    assert capsys.readouterr().out.count(": indexed ") == 3
    shutil.rmtree(tmp_path / "cache")
    assert levels(read_shards(server.url).splits["test"]) == [1, 2, 4]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("place", ["folder", "http"])
def test_of_processes_that_come_together_one_indexes_a_set_and_the_others_wait(
    tmp_path: Path, serve: Callable[..., Server], capfd: pytest.CaptureFixture[str], place: str
) -> None:
    root = tmp_path / "set"
    for shard in range(2):
        tar(root / f"train-{shard}.tar", numbered(shard, "0"))
    server = serve(root)
    url = server.url if place == "http" else str(root)

    def scans() -> int:
        return sum("bytes=" in line for line in server.requests())

    read_shards(url)
    alone = scans()
    assert alone == (2 if place == "http" else 0)
    kept = root / INDEX if place == "folder" else next((tmp_path / "cache/vitlit").glob("*.npz"))
    kept.unlink()
    said = capfd.readouterr().out
    ranks = [get_context("fork").Process(target=read_shards, args=(url,), daemon=True) for _ in range(3)]
    with next((tmp_path / "cache/vitlit").glob("*.lock")).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for rank in ranks:
            rank.start()
        time.sleep(2)  # for them to come to the lock
        assert [rank.is_alive() for rank in ranks] == [True] * 3
        assert not kept.exists()
        fcntl.flock(lock, fcntl.LOCK_UN)  # the forked ones have the file open, too
    for rank in ranks:
        rank.join(60)
    said += capfd.readouterr().out
    assert [rank.exitcode for rank in ranks] == [0] * 3
    assert said.count(": indexed 2 shards") == 2  # the one alone, and one of the three
    assert scans() == 2 * alone
    assert kept.is_file()


def test_a_run_asks_a_server_once_for_what_is_there(
    own: Path, serve: Callable[..., Server], vitlit: Callable[..., Any]
) -> None:
    (own / INDEX).unlink()
    server = serve(own)
    fit = ("fit", *SMALL, "--data.root", server.url, "--trainer.fast_dev_run", 1)
    result = vitlit(*fit)
    assert result.code == 0, result.err
    assert [server.requests().count(f"GET /{name} ") for name in ("", INDEX, "classes.txt")] == [1, 1, 1]
    tar(own / "train-000003.tar", {"a.png": png(9), "a.cls": b"3"})  # what comes later, the next run sees
    assert "41 training" in vitlit(*fit).out


def test_where_nothing_can_be_kept_a_set_is_indexed_each_time(
    tmp_path: Path, serve: Callable[..., Server], capsys: pytest.CaptureFixture[str]
) -> None:
    tar(tmp_path / "set/train-0.tar", numbered(1, "0"))
    (tmp_path / "cache").write_text("a file, so that no folder can be made")
    url = serve(tmp_path / "set").url
    for _ in range(2):
        assert levels(read_shards(url).splits["train"]) == [1]
        assert capsys.readouterr().out.count("indexed 1 shards") == 1


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"a.png": b"x"}, "a.png has no label"),
        ({"a.png": b"x", "a.jpg": b"x", "a.cls": b"1"}, "two images of one sample"),
        ({"a.b.png": b"x", "a.cls": b"1"}, "a.b.png has a dot"),
        ({"a.png": b"x", "a.json": b"{"}, "a.json is no JSON"),
        ({"a.png": b"x", "a.json": b'{"label": 0.5}'}, "0.5"),
        ({"a.png": b"x", "a.json": b"[" * 100_000}, "train-0.tar cannot be indexed"),
        ({"a.cls": b"1"}, "hold no image"),
        ({"a.png": b"x", "a.cls": bytes([255])}, "train-0.tar cannot be indexed"),
    ],
)
def test_sets_that_cannot_be_understood_are_refused(tmp_path: Path, members: dict[str, bytes], words: str) -> None:
    tar(tmp_path / "train-0.tar", members)
    with pytest.raises(UserError, match=words) as caught:
        read_shards(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / INDEX).exists()


def test_classes_that_train_or_the_file_of_names_lacks_are_refused(tmp_path: Path) -> None:
    tar(tmp_path / "train-0.tar", numbered(0, "0"))
    tar(tmp_path / "val-0.tar", numbered(1, "5"))
    with pytest.raises(UserError, match=r"0001\.png has the label 5, not in the training images"):
        read_shards(str(tmp_path))
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"label 5, not in classes\.txt"):
        read_shards(str(tmp_path))
    tar(tmp_path / "notes.tar", {})
    with pytest.raises(UserError, match=r"notes\.tar is of no split"):
        read_shards(str(tmp_path))


def header(size: bytes, kind: bytes = b"0", name: bytes = b"a.png") -> bytes:
    """A tar's header with any size field."""
    block = bytearray(name.ljust(124, b"\0") + size.ljust(12, b"\0") + b"0".rjust(11) + b"\0" + b" " * 8 + kind)
    block = block.ljust(512, b"\0")
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "tail",
    [
        header(b"\xff" * 12),  # -1
        header(b"\xff" * 10 + b"\xfe\x00", name=b"a.bin"),  # so that the next header is this one again, for ever
        header(b"\x80" + b"\x7f" * 11),  # 9e25 bytes
        header(b"77777777777"),  # 8 GiB
        header(b"00000002000"),  # a little more than there is
        header(b"\x80" + b"\x7f" * 11, b"L"),  # of a long name
        header(b"\xff" * 10 + b"\xf0\x00", b"L"),
        header(b"00000000024", b"x") + b"20 size=-1024\n".ljust(512, b"\0") + header(b"00000000000"),
        b"no header".ljust(512, b"x"),
    ],
)
def test_hostile_sizes_and_damaged_headers_are_refused(tmp_path: Path, tail: bytes) -> None:
    tar(tmp_path / "train-0.tar", numbered(0, "0"))
    whole = (tmp_path / "train-0.tar").read_bytes()
    (tmp_path / "train-0.tar").write_bytes(whole[: 4 * 512] + tail + bytes(1024))
    with pytest.raises(UserError, match=r"train-0\.tar cannot be indexed") as caught:
        read_shards(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_label_of_endless_digits_is_a_name(tmp_path: Path) -> None:
    tar(tmp_path / "train-0.tar", {"a.png": png(1), "a.cls": b"9" * 5000})
    assert read_shards(str(tmp_path)).classes == ["9" * 5000]


def test_links_folders_and_names_that_lead_outside_are_of_no_account(tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    with tarfile.open(root / "train-0.tar", "w") as archive:
        for name, kind in (("a/l.png", tarfile.SYMTYPE), ("a/h.png", tarfile.LNKTYPE), ("a/d.png", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("../../evil/x.png")
        info.size = len(png(3))
        archive.addfile(info, io.BytesIO(png(3)))
    found = read_shards(str(root))
    assert (found.classes, levels(found.splits["train"])) == (["evil"], [3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "set"]
    assert sorted(path.name for path in root.rglob("*")) == [INDEX, "train-0.tar"]
