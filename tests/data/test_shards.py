"""Shards: a run sees in them what it sees in the folder, byte for byte, from disk and over HTTP."""

import io
import pickle
import shutil
import tarfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import user_error
from shard_files import Server, _of_folder, tar

from vitlit.data import ImageFolderData, Preprocess, storage
from vitlit.data.dataset import Images
from vitlit.data.folder import hold_out, scan_split, scan_train
from vitlit.data.index import Index
from vitlit.data.shard_index import INDEX
from vitlit.data.shards import is_shards, read_shards
from vitlit.data.stream import TrainStream
from vitlit.data.transforms import train_transform
from vitlit.data.workers import loader
from vitlit.errors import UserError
from vitlit.prepare.shard import run


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(storage, "PAUSES", (0.01, 0.02, 0.03))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def batches(index: Index, workers: int, first: int = 0, steps: int = 8) -> list[list[torch.Tensor]]:
    """Training batches of 8, augmented, from a step on."""
    transform = train_transform(Preprocess((8, 8)), "random_resized", (0.3, 1.0), 0.5)
    found: list[list[torch.Tensor]] = []
    stream = TrainStream(len(index), 8, 5, lambda: first + len(found))
    while len(found) < steps:
        found += loader(Images(index, transform, 5), stream, 8, workers)
    return found[:steps]


def assert_same(one: list[list[torch.Tensor]], other: list[list[torch.Tensor]]) -> None:
    assert len(one) == len(other)
    for ours, theirs in zip(one, other, strict=True):
        assert all(map(torch.equal, map(torch.as_tensor, ours), map(torch.as_tensor, theirs)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("place", ["folder", "shards", "http"])
def test_batches_are_the_folders_from_any_position(
    few: Path, packed: Path, serve: Callable[..., Server], place: str, workers: int
) -> None:
    folder = _of_folder(few).splits["train"]
    root = serve(packed).url if place == "http" else str(packed)
    index = folder if place == "folder" else read_shards(root).splits["train"]
    expected = batches(folder, 0)
    assert_same(batches(index, workers), expected)
    assert_same(batches(index, workers, first=3, steps=5), expected[3:])


def test_classes_splits_and_holdout_are_the_folders(few: Path, packed: Path, tmp_path: Path) -> None:
    classes, rest, held = scan_train(few, 0.25)
    assert held is not None
    found = read_shards(str(packed))
    assert (found.classes, list(found.splits), found.multi_label) == (classes, ["train", "val"], False)
    assert found.splits["val"].names() == scan_split(few / "val", classes).names()
    for ours, theirs in zip((rest, held), hold_out(found.splits["train"], 0.25, classes), strict=True):
        assert ours.names() == theirs.names()
        assert np.array_equal(ours.labels, theirs.labels)


def test_class_folders_alone_are_all_training_images(few: Path, tmp_path: Path) -> None:
    run([str(few / "train"), str(tmp_path / "out")])
    assert list(read_shards(str(tmp_path / "out")).splits) == ["train"]
    data = ImageFolderData(str(tmp_path / "out"), holdout="25%")
    peer = ImageFolderData(str(few / "train"), holdout="25%")
    for split in ("train", "val"):
        assert data.split(split).names() == peer.split(split).names()


def test_a_read_asks_a_server_for_no_more_than_the_image(packed: Path, serve: Callable[..., Server]) -> None:
    server = serve(packed)
    index = read_shards(server.url).splits["val"]
    assert server.requests() == [f"GET /{INDEX} "]
    data = index.read(4)
    _, path, asked = server.requests()[-1].split()
    start, last = map(int, asked.removeprefix("bytes=").split("-"))
    assert len(server.requests()) == 2
    assert (packed / path[1:]).read_bytes()[start : last + 1].endswith(data)
    assert last + 1 - start == len(data) + 512


def test_processes_forked_from_one_that_has_read_over_http_read_and_so_does_it(
    few: Path, packed: Path, serve: Callable[..., Server]
) -> None:
    index = read_shards(serve(packed).url).splits["train"]
    expected = batches(_of_folder(few).splits["train"], 0)
    for workers in (0, 2, 0, 2):
        assert_same(batches(index, workers), expected)


@pytest.mark.parametrize("place", ["shards", "http"])
def test_an_index_is_pickled_for_processes_that_are_not_forked(
    packed: Path, serve: Callable[..., Server], place: str
) -> None:
    index = read_shards(serve(packed).url if place == "http" else str(packed)).splits["train"]
    data = index.read(7)
    assert pickle.loads(pickle.dumps(index)).read(7) == data
    assert index.path(7) == f"{index.files.shards[index.files.parts[7, 0]]}/{index.names()[7].decode()}"  # type: ignore[attr-defined]


def test_what_is_shards(few: Path, packed: Path, tmp_path: Path) -> None:
    tar(tmp_path / "flat/train-0.tar", {})
    tar(tmp_path / "deep/train/0.tar", {})
    for root in ("s3://bucket/set", str(packed), str(tmp_path / "flat"), str(tmp_path / "deep")):
        assert is_shards(root)
    shutil.copytree(few, tmp_path / "unpacked")
    tar(tmp_path / "unpacked/dataset.tar", {})  # the archive that the folders came in
    for root in (str(few), str(tmp_path), str(tmp_path / "missing"), str(tmp_path / "unpacked")):
        assert not is_shards(root)


@pytest.mark.parametrize("place", ["shards", "http"])
@pytest.mark.parametrize("within", [True, False])
def test_a_shard_cut_short_is_an_error_that_says_where(
    own: Path, serve: Callable[..., Server], place: str, within: bool
) -> None:
    server = serve(own)
    index = read_shards(server.url if place == "http" else str(own)).splits["train"]
    files: Any = index.files
    row = int(np.lexsort((files.parts[:, 1], files.parts[:, 0]))[-1])  # the last image
    shard, start, size, _ = files.parts[row].tolist()
    file = own / files.shards[shard]
    length = start + size - 1 if within else start - 600
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UserError) as caught:
        index.read(row)
    message = str(caught.value)
    assert "\n" not in message
    assert f"bytes {start - 512}-{start + size} of" in message
    cut = f"the file is cut short before byte {start + size}"
    assert f"{file.name}, tried 4 times ({cut if within or place != 'http' else '416'}" in message
    assert "the same command continues the run" in message
    if place == "http":
        assert sum("GET" in line and file.name in line and "bytes=" in line for line in server.requests()) == 4
    else:
        with pytest.raises(UserError, match=rf"{file.name} has {length} bytes"):
            read_shards(str(own))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_dies_ends_the_run_and_one_that_is_back_continues_it(
    few: Path, packed: Path, serve: Callable[..., Server], workers: int
) -> None:
    server = serve(packed)
    index = read_shards(server.url).splits["train"]
    transform = train_transform(Preprocess((8, 8)), "random_resized", (0.3, 1.0), 0.5)
    done: list[list[torch.Tensor]] = []

    def train() -> None:
        data: Any = loader(Images(index, transform, 5), TrainStream(len(index), 8, 5, lambda: 0), 8, workers, 1)
        try:
            for batch in data:
                done.append(batch)
                server.stop()
        finally:
            if workers:  # as garbage of the error torch would wait for them, in vain
                data._iterator._shutdown_workers()

    with pytest.raises(UserError, match=r"tried 4 times \(.*[Cc]onnect.*continues the run"):
        train()
    assert 1 <= len(done) < 5
    with pytest.raises(UserError, match=f"cannot read {server.url}/{INDEX}: Connect call failed"):
        read_shards(server.url)
    server.start()
    again = read_shards(server.url).splits["train"]
    expected = batches(_of_folder(few).splits["train"], 0)
    assert_same(done + batches(again, workers, first=len(done), steps=8 - len(done)), expected)


def test_a_server_that_fails_now_and_then_is_asked_again(packed: Path, serve: Callable[..., Server]) -> None:
    server = serve(packed, "failing:3")
    index, local = read_shards(server.url).splits["train"], read_shards(str(packed)).splits["train"]
    assert index.read(0) == local.read(0)
    assert len(server.requests()) == 1 + 4


@pytest.mark.parametrize(
    ("mode", "words"),
    [("failing:4", "503"), ("silent", "no answer within 0.2 seconds")],
)
def test_what_else_servers_do_is_told(
    packed: Path, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, mode: str, words: str
) -> None:
    index = read_shards(serve(packed, mode).url).splits["train"]
    monkeypatch.setattr(storage, "TIMEOUT", 0.2)
    row = int(index.files.parts[:, 1].argmax())  # type: ignore[attr-defined]  # not at a file's beginning
    with pytest.raises(UserError, match=rf"train-00000\d\.tar, tried 4 times \(.*{words}"):
        index.read(row)


def test_a_server_that_ignores_ranges_is_asked_once(packed: Path, serve: Callable[..., Server]) -> None:
    server = serve(packed, "whole")
    index = read_shards(server.url).splits["train"]
    row = int(index.files.parts[:, 1].argmax())  # type: ignore[attr-defined]
    asked = len(server.requests())
    with pytest.raises(UserError, match=r"tar: the server ignores Range; use one that serves parts of files$"):
        index.read(row)
    assert len(server.requests()) == asked + 1


def test_a_missing_shard_and_a_missing_set_are_told(own: Path, serve: Callable[..., Server]) -> None:
    server = serve(own)
    index = read_shards(server.url).splits["val"]
    (own / "val-000000.tar").unlink()
    with pytest.raises(UserError, match="there is no such file"):
        index.read(0)
    with pytest.raises(UserError, match=r"val-000000\.tar has no bytes"):
        read_shards(str(own))
    with pytest.raises(UserError, match="nothing cannot be searched for tars"):
        read_shards(f"{server.url}/nothing")


@pytest.mark.parametrize("place", ["shards", "http"])
def test_a_shard_of_another_making_is_refused_though_its_size_is_the_same(
    own: Path, few: Path, tmp_path: Path, serve: Callable[..., Server], place: str
) -> None:
    file = own / "val-000000.tar"
    before = file.read_bytes()
    with tarfile.open(file) as archive:
        names = archive.getnames()
    moved = names[2:4] + names[:2]  # the first two samples change places
    members = {}
    with tarfile.open(file) as archive:
        for name in moved + names[4:]:
            opened = archive.extractfile(name)
            assert opened is not None
            members[name] = opened.read()
    tar(file, members, tarfile.GNU_FORMAT)
    file.write_bytes(file.read_bytes()[: len(before)])
    assert file.stat().st_size == len(before)
    index = read_shards(serve(own).url if place == "http" else str(own)).splits["val"]
    for i, image in enumerate(index.names()):
        if image.decode() in moved:
            with pytest.raises(
                UserError, match=rf"does not belong to {INDEX}: .* both must be of the same `vitlit data shard`"
            ):
                index.read(i)
        else:
            assert index.read(i) == (few / "val" / image.decode()).read_bytes()


def test_damaged_indices_are_refused_in_one_line(own: Path) -> None:
    file = own / INDEX
    whole = file.read_bytes()
    with np.load(io.BytesIO(whole)) as opened:
        arrays = {name: opened[name] for name in opened.files}

    def damaged(data: bytes) -> None:
        file.write_bytes(data)
        user_error(rf"{INDEX} is damaged", read_shards, str(own))

    def changed(**more: Any) -> bytes:
        buffer = io.BytesIO()
        np.savez(buffer, **{name: value for name, value in (arrays | more).items() if value is not None})
        return buffer.getvalue()

    damaged(b"")
    damaged(b"garbage" * 100)
    damaged(whole[: len(whole) // 2])
    damaged(whole[:2000] + bytes(100) + whole[2100:])
    damaged(pickle.dumps(arrays))
    damaged(changed(train_labels=np.array([Trap()] * 40, object)))
    damaged(changed(sizes=None))
    file.write_bytes(changed())
    read_shards(str(own))


class Trap:
    """An object that must never be unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('unpickled')",)


def test_urls_that_cannot_be_read_are_told() -> None:
    with pytest.raises(UserError, match="foo"):
        read_shards("foo://bucket/set")
    if find_spec("s3fs") is None:
        with pytest.raises(UserError, match="s3fs"):
            read_shards("s3://bucket/set")
