"""Shards: other programs read what is written, and a run sees in them what it sees in the folder, byte for byte."""

import fcntl
import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image

from vitlit.data import ImageFolderData, Preprocess, shards
from vitlit.data.dataset import Images
from vitlit.data.folder import hold_out, scan_split, scan_train
from vitlit.data.index import Index
from vitlit.data.manifest import Manifest, read_manifest
from vitlit.data.shards import INDEX, is_shards, read_shards
from vitlit.data.stream import TrainStream
from vitlit.data.transforms import train_transform
from vitlit.data.workers import loader
from vitlit.errors import UserError
from vitlit.prepare.shard import run, write

SERVER = """
import http.server, os, re, sys, time
folder, log, port, mode = sys.argv[1], open(sys.argv[2], "a", buffering=1), int(sys.argv[3]), sys.argv[4]
failing = int(mode.partition(":")[2] or 0)

class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    def __init__(self, *arguments):
        super().__init__(*arguments, directory=folder)
    def do_GET(self):
        global failing
        asked = re.fullmatch(r"bytes=(\\d+)-(\\d+)", self.headers.get("Range") or "")
        log.write(f"{self.command} {self.path} {asked[0] if asked else ''}\\n")
        path = self.translate_path(self.path)
        if asked is None or mode == "whole" or not os.path.isfile(path):
            return super().do_GET()
        if failing > 0:
            failing -= 1
            return self.send_error(503)
        if mode == "silent":
            time.sleep(5)
        start, end = int(asked[1]), min(int(asked[2]) + 1, os.path.getsize(path))
        if start >= end:
            return self.send_error(416)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{os.path.getsize(path)}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        with open(path, "rb") as file:
            file.seek(start)
            self.wfile.write(file.read(end - start))
    def log_message(self, *arguments):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


class Server:
    """A web server in a process of its own, which can be killed and started again at its address."""

    def __init__(self, folder: Path, log: Path, mode: str) -> None:
        self.folder, self.log, self.mode, self.port = folder, log, mode, 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        arguments = [self.folder, self.log, self.port, self.mode]
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, *map(str, arguments)], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def requests(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(folder: Path, mode: str = "parts") -> Server:
        servers.append(Server(folder, tmp_path / f"requests{len(servers)}.log", mode))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shards, "PAUSES", (0.01, 0.02, 0.03))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def packed(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits of `few` in four shards, three of them of train."""
    out = tmp_path_factory.mktemp("packed") / "shards"
    write(_of_folder(few), out, 30_000)
    return out


@pytest.fixture
def own(packed: Path, tmp_path: Path) -> Path:
    """A copy of them to damage."""
    return Path(shutil.copytree(packed, tmp_path / "own"))


def _of_folder(root: Path) -> Manifest:
    classes, train, _ = scan_train(root)
    return Manifest(classes, {"train": train, "val": scan_split(root / "val", classes)}, False)


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
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def tar(file: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=form) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def png(level: int, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, level).save(buffer, "PNG")
    return buffer.getvalue()


def levels(index: Index) -> list[int]:
    """The grey of each image."""
    return [int(np.asarray(Image.open(io.BytesIO(index.read(i))))[0, 0]) for i in range(len(index))]


# What is written


def test_python_reads_the_tars_and_finds_every_file_with_its_bytes_and_class(packed: Path, few: Path) -> None:
    assert sorted(file.name for file in packed.iterdir()) == [
        "classes.txt", INDEX, "train-000000.tar", "train-000001.tar", "train-000002.tar", "val-000000.tar",
    ]  # fmt: skip
    for split in ("train", "val"):
        found: dict[str, bytes] = {}
        for file in sorted(packed.glob(f"{split}-*.tar")):
            assert file.stat().st_size <= 30_000
            with tarfile.open(file) as archive:
                for member in archive:
                    opened = archive.extractfile(member)
                    assert opened is not None
                    assert (member.mtime, member.uid, member.uname) == (0, 0, "")
                    found[member.name] = opened.read()
        files = {str(path.relative_to(few / split)): path.read_bytes() for path in (few / split).glob("*/*")}
        assert {name: data for name, data in found.items() if name.endswith(".png")} == files
        assert all(found[name.replace(".png", ".cls")] == name.split("/")[0].encode() for name in files)
        assert len(found) == 2 * len(files)


def test_webdataset_reads_the_tars(packed: Path, few: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    for split, count in (("train", 40), ("val", 11)):
        urls = [str(file) for file in sorted(packed.glob(f"{split}-*.tar"))]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
        assert len(samples) == count
        for sample in samples:
            pixels = Image.open(few / split / f"{sample['__key__']}.png").convert("RGB")
            assert np.array_equal(sample["png"], np.asarray(pixels))
            assert sample["cls"] == int(sample["__key__"].split("/")[0])


def test_a_sequential_reader_gets_mixed_classes(packed: Path) -> None:
    with tarfile.open(packed / "train-000000.tar") as archive:
        labels = [name[0] for name in archive.getnames() if name.endswith(".png")]
    assert len(set(labels)) == 4
    assert sum(a != b for a, b in pairwise(labels)) > len(labels) / 3


def test_the_same_folder_gives_the_same_bytes(packed: Path, few: Path, tmp_path: Path) -> None:
    write(_of_folder(few), tmp_path / "again", 30_000)
    for file in packed.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_names_with_dots_of_equal_stems_of_other_alphabets_and_of_great_length(tmp_path: Path) -> None:
    names = ["a/x.png", "a/x.y.png", "a/x_y.png", "a/x.webp", "a/größe 日本.PNG", f"a/{'long' * 40}.png", "b/1/x.png"]
    for level, name in enumerate(names):
        file = tmp_path / "root/train" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(level))
    _, index, _ = scan_train(tmp_path / "root")
    assert run([str(tmp_path / "root"), str(tmp_path / "out")]) == 0
    packed = read_shards(str(tmp_path / "out")).splits["train"]
    assert packed.names() == index.names()
    assert levels(packed) == levels(index)
    with tarfile.open(tmp_path / "out/train-000000.tar") as archive:
        images = [name for name in archive.getnames() if not name.endswith(".cls")]
        assert set(archive.getnames()) - set(images) == {f"{name.rpartition('.')[0]}.cls" for name in images}
    assert len({name.rpartition(".")[0] for name in images}) == len(names)
    assert all(name.rpartition("/")[2].count(".") == 1 for name in images)


def test_a_manifests_labels_and_groups_are_kept(few: Path, tmp_path: Path) -> None:
    names = [str(path.relative_to(few)) for path in sorted(few.glob("train/*/*"))]
    lines = [f"{name},{'a|b' if i % 3 else ''},g{i // 4}" for i, name in enumerate(names)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,group", *lines]))
    assert run([str(few), str(tmp_path / "out"), "--manifest", str(tmp_path / "labels.csv")]) == 0
    given, found = read_manifest(tmp_path / "labels.csv", few), read_shards(str(tmp_path / "out"))
    assert (found.classes, found.multi_label) == (["a", "b"], True)
    held = [hold_out(each.splits["train"], 0.2, each.classes) for each in (given, found)]
    for ours, theirs in zip(*held, strict=True):
        assert ours.names() == theirs.names()
        assert np.array_equal(ours.labels, theirs.labels)
        assert [ours.read(i) for i in range(len(ours))] == [theirs.read(i) for i in range(len(theirs))]
    (tmp_path / "out" / INDEX).unlink()
    alone = read_shards(str(tmp_path / "out"))  # by what the tars say
    assert (alone.classes, alone.multi_label) == (["a", "b"], True)
    labels = dict(zip(given.splits["train"].names(), given.splits["train"].labels.tolist(), strict=True))
    assert dict(zip(alone.splits["train"].names(), alone.splits["train"].labels.tolist(), strict=True)) == labels


def test_short_side_resizes_what_is_larger_and_leaves_the_rest_alone(tmp_path: Path) -> None:
    ramp = np.add.outer(np.arange(60), np.arange(90)).astype(np.uint8)
    (tmp_path / "root/train/a").mkdir(parents=True)
    Image.fromarray(ramp).save(tmp_path / "root/train/a/large.png")
    Image.fromarray(ramp).rotate(90, expand=True).save(tmp_path / "root/train/a/tall.png")
    (tmp_path / "root/train/a/small.png").write_bytes(png(9, (40, 30)))
    out = tmp_path / "out"
    run([str(tmp_path / "root"), str(out), "--short_side=30", "--quality", "95"])
    index = read_shards(str(out)).splits["train"]
    found = {name: index.read(i) for i, name in enumerate(index.names())}
    assert found[b"a/small.png"] == png(9, (40, 30))
    for name, size in ((b"a/large.png", (45, 30)), (b"a/tall.png", (30, 45))):
        picture = Image.open(io.BytesIO(found[name]))
        assert (picture.format, picture.size) == ("JPEG", size)
    smaller = np.asarray(Image.open(io.BytesIO(found[b"a/large.png"])))[:, :, 0].astype(int)
    assert np.abs(smaller - ramp.reshape(30, 2, 45, 2).mean((1, 3))).mean() < 1.5
    with tarfile.open(out / "train-000000.tar") as archive:
        assert {"a/large.jpg", "a/tall.jpg", "a/small.png"} < set(archive.getnames())


def test_an_unreadable_image_is_copied_but_not_resized(tmp_path: Path) -> None:
    (tmp_path / "root/train/a").mkdir(parents=True)
    (tmp_path / "root/train/a/bad.jpg").write_bytes(b"\xff\xd8 nothing")
    run([str(tmp_path / "root"), str(tmp_path / "out")])
    assert read_shards(str(tmp_path / "out")).splits["train"].read(0) == b"\xff\xd8 nothing"
    with pytest.raises(UserError, match=r"a/bad\.jpg"):
        run([str(tmp_path / "root"), str(tmp_path / "other"), "--short_side", "8"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "root"]  # no partial either


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shard_size", "0"], "at least 1"),
        (["--shard_size", "big"], "big"),
        (["--short_side", "0"], "at least 1"),
        (["--short_side", "8", "--quality", "101"], "1 to 100"),
        (["--wrong"], "--wrong"),
    ],
)
def test_wrong_options_are_refused(few: Path, tmp_path: Path, options: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        run([str(few), str(tmp_path / "out"), *options])
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_refused(few: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty"):
        run([str(few), str(tmp_path)])
    assert (tmp_path / "mine.txt").read_text() == "precious"


# What is read


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


# What goes wrong


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
    assert f"{file.name}, tried 4 times (the file is cut short: it ends at byte {length})" in message
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

    with pytest.raises(UserError, match=r"tried 4 times \(the server cannot be reached.*continues the run"):
        train()
    assert 1 <= len(done) < 5
    with pytest.raises(UserError, match=f"cannot read {server.url}/{INDEX}: the server cannot be reached"):
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
    [("failing:4", "HTTP status 503"), ("silent", "no answer within 0.2 seconds")],
)
def test_what_else_servers_do_is_told(
    packed: Path, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, mode: str, words: str
) -> None:
    index = read_shards(serve(packed, mode).url).splits["train"]
    monkeypatch.setattr(shards, "TIMEOUT", 0.2)
    row = int(index.files.parts[:, 1].argmax())  # type: ignore[attr-defined]  # not at a file's beginning
    with pytest.raises(UserError, match=rf"train-00000\d\.tar, tried 4 times \(.*{words}"):
        index.read(row)


def test_a_server_that_ignores_ranges_is_asked_once(packed: Path, serve: Callable[..., Server]) -> None:
    server = serve(packed, "whole")
    index = read_shards(server.url).splits["train"]
    row = int(index.files.parts[:, 1].argmax())  # type: ignore[attr-defined]
    asked = len(server.requests())
    with pytest.raises(UserError, match=r"tar: the server ignores Range .*: use one that serves parts of files$"):
        index.read(row)
    assert len(server.requests()) == asked + 1


def test_a_missing_shard_and_a_missing_set_are_told(own: Path, serve: Callable[..., Server]) -> None:
    server = serve(own)
    index = read_shards(server.url).splits["val"]
    (own / "val-000000.tar").unlink()
    with pytest.raises(UserError, match="HTTP status 404"):
        index.read(0)
    with pytest.raises(UserError, match=r"val-000000\.tar has no bytes"):
        read_shards(str(own))
    with pytest.raises(UserError, match=f"nothing has no {INDEX}"):
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
            with pytest.raises(UserError, match=rf"is not the file that {INDEX} was made of"):
                index.read(i)
        else:
            assert index.read(i) == (few / "val" / image.decode()).read_bytes()


def test_damaged_indices_are_refused_in_one_line(own: Path) -> None:
    file = own / INDEX
    whole = file.read_bytes()
    with np.load(io.BytesIO(whole)) as opened:
        arrays = {name: opened[name] for name in opened.files}

    def refused(data: bytes) -> None:
        file.write_bytes(data)
        with pytest.raises(UserError, match=rf"{INDEX} is damaged") as caught:
            read_shards(str(own))
        assert "\n" not in str(caught.value)

    def changed(**more: Any) -> bytes:
        buffer = io.BytesIO()
        np.savez(buffer, **{name: value for name, value in (arrays | more).items() if value is not None})
        return buffer.getvalue()

    parts, labels = arrays["train_parts"], arrays["train_labels"]
    refused(b"")
    refused(b"garbage" * 100)
    refused(whole[: len(whole) // 2])
    refused(whole[:2000] + bytes(100) + whole[2100:])
    refused(pickle.dumps(arrays))
    refused(changed(train_labels=np.array([Trap()] * 40, object)))
    refused(changed(train_parts=parts[:-1]))
    refused(changed(train_parts=parts * [1, 1, 10**9, 1]))
    refused(changed(train_parts=parts * [1, -1, 1, 1]))
    refused(changed(train_parts=np.add(parts, [9, 0, 0, 0])))
    refused(changed(train_labels=labels + 3))
    refused(changed(train_labels=labels.astype(float)))
    refused(changed(train_names_ends=arrays["train_names_ends"][::-1].copy()))
    refused(changed(shards=np.frombuffer(arrays["shards"].tobytes().replace(b"train-0", b"/../../"), np.uint8)))
    refused(changed(sizes=None))
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays, more=np.zeros(1 << 20, np.uint8))
    refused(packed.getvalue())
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


# Shards made elsewhere


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
        while said.count("waiting for another process") < 3 and any(rank.is_alive() for rank in ranks):
            time.sleep(0.01)
            said += capfd.readouterr().out
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
    with pytest.raises(UserError, match=r"0001\.png has the label 5, not found in the training images"):
        read_shards(str(tmp_path))
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"label 5, not found in classes\.txt"):
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
