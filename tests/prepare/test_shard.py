"""`vitlit data shard`: other programs read what is written, and nothing is lost."""

import io
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_files import _of_folder, levels, png

from vitlit.data import storage
from vitlit.data.folder import hold_out, scan_train
from vitlit.data.manifest import read_manifest
from vitlit.data.shard_index import INDEX
from vitlit.data.shards import read_shards
from vitlit.errors import UserError
from vitlit.prepare.shard import run, write


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(storage, "PAUSES", (0.01, 0.02, 0.03))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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
    with pytest.raises(UserError, match=r"a/bad\.jpg: .*; `vitlit data check` lists all"):
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
