"""`vitlit data imagenet TARS OUT`, on small archives laid out as ImageNet's."""

import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np
import pytest
from conftest import user_error
from PIL import Image
from scipy.io import savemat  # type: ignore[import-untyped]
from torchvision.datasets.imagenet import ARCHIVE_META, parse_devkit_archive

from vitlit.data import progress
from vitlit.data.folder import scan_split, scan_train
from vitlit.errors import UserError
from vitlit.prepare import imagenet
from vitlit.prepare.imagenet import DEVKIT, TRAIN, VAL, unpack

# As in the real kit, the order of the IDs is not the order of the names; animal is no class.
SYNSETS = {3: ("n01440764", "tench"), 1: ("n02119789", "kit fox"), 2: ("n03000684", "chain saw")}
ANIMAL = (1001, "n00015388", "animal")
TRUTH = [2, 3, 3, 1, 2, 1]


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def meta_mat() -> bytes:
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children"]
    fields += ["wordnet_height", "num_train_images"]
    rows: list[tuple[object, ...]] = [
        (number, wnid, words, "a gloss", 0, [], 0, 3) for number, (wnid, words) in SYNSETS.items()
    ]
    rows.append((*ANIMAL, "a gloss", 2, [1, 3], 2, 0))
    synsets = np.empty((len(rows), 1), [(name, object) for name in fields])
    for place, row in enumerate(rows):
        synsets[place, 0] = row
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets})
    return buffer.getvalue()


def devkit(truth: list[int], meta: bytes | None = None) -> bytes:
    folder = "ILSVRC2012_devkit_t12"
    files = {
        f"{folder}/readme.txt": b"",
        f"{folder}/data/meta.mat": meta_mat() if meta is None else meta,
        f"{folder}/data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{i}\n" for i in truth).encode(),
    }
    return tar(files, "w:gz")


class Tars(NamedTuple):
    """A folder of archives, and the files that they must give, by path."""

    folder: Path
    expected: dict[str, bytes]

    def edit(self, name: str, change: Callable[[bytes], bytes]) -> None:
        file = self.folder / name
        file.write_bytes(change(file.read_bytes()))


@pytest.fixture
def tars(tmp_path: Path) -> Tars:
    folder = tmp_path / "tars"
    folder.mkdir()
    expected: dict[str, bytes] = {}
    inner: dict[str, bytes] = {}
    for number, (wnid, _) in SYNSETS.items():
        images = {f"{wnid}_{i}.JPEG": jpeg(100 * number + i) for i in (10, 9, 10026)}
        inner[f"{wnid}.tar"] = tar(images)
        expected |= {f"train/{wnid}/{name}": data for name, data in images.items()}
    val = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(i) for i in range(len(TRUTH))}
    for number, (name, data) in zip(TRUTH, val.items(), strict=True):
        expected[f"val/{SYNSETS[number][0]}/{name}"] = data
    (folder / TRAIN).write_bytes(tar(inner))
    (folder / VAL).write_bytes(tar(dict(reversed(val.items()))))  # the order of the names counts, not the archive's
    (folder / DEVKIT).write_bytes(devkit(TRUTH))
    return Tars(folder, expected)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def not_unpacked(tars: Path, out: Path, match: str) -> str:
    message = user_error(match, unpack, tars, out)
    assert not out.exists()
    return message


def test_files_keep_their_bytes_and_classes(tars: Tars, tmp_path: Path) -> None:
    unpack(tars.folder, tmp_path / "out")
    assert contents(tmp_path / "out") == tars.expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tars"]
    classes, train, _ = scan_train(tmp_path / "out")
    assert classes == ["n01440764", "n02119789", "n03000684"]
    assert len(train) == 9
    assert scan_split(tmp_path / "out/val", classes).labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_archives_are_torchvisions() -> None:
    assert dict(ARCHIVE_META.values()) == imagenet.MD5


def test_truth_is_torchvisions(tars: Tars, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import imagenet as theirs

    monkeypatch.setattr(theirs, "check_integrity", lambda file, md5=None: Path(file).is_file())
    parse_devkit_archive(tars.folder)
    assert imagenet._read_truth(tars.folder / DEVKIT) == theirs.load_meta_file(tars.folder)[1]


def test_prints_a_line_for_each_split(
    tars: Tars, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    unpack(Path("tars"), Path("data/out"))
    lines = ["data/out/train: 9 images, 3 classes", "data/out/val: 6 images, 3 classes"]
    assert capsys.readouterr().out.splitlines() == lines
    monkeypatch.setattr(progress, "SECONDS", 0)
    unpack(Path("tars"), Path("out"))
    printed = capsys.readouterr().out.splitlines()
    assert printed[5:9] == ["val: 6 of 6 images", *(f"train: {i} of 3 classes" for i in (1, 2, 3))]


def test_existing_folder(tars: Tars, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    unpack(tars.folder, tmp_path / "mine")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"mine exists and is not empty: name another folder"):
        unpack(tars.folder, tmp_path / "mine")
    photo = next((tmp_path / "mine").glob("*/*/*"))
    with pytest.raises(UserError, match=r"JPEG exists"):
        unpack(tars.folder, photo)
    with pytest.raises(UserError, match="cannot be made"):
        unpack(tars.folder, photo / "out")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", [TRAIN, VAL, DEVKIT])
def test_missing_archive(tars: Tars, tmp_path: Path, name: str) -> None:
    (tars.folder / name).unlink()
    message = not_unpacked(
        tars.folder, tmp_path / "out", f"tars lacks {re.escape(name)}: download .*image-net.org.* login"
    )
    assert all(other == name or other not in message for other in imagenet.MD5)
    assert not (tmp_path / "out.partial").exists()


def test_interrupted_unpacking_is_resumed(tars: Tars, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, left = imagenet._copy, 6 + 3 + 2

    def interrupted(reader: io.BytesIO, file: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            file.write_bytes(reader.read(10))
            raise KeyboardInterrupt
        copy(reader, file)

    monkeypatch.setattr(imagenet, "_copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unpack(tars.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    kept = contents(tmp_path / "out.partial")
    assert len(kept) == 6 + 3
    inodes = {path: (tmp_path / "out.partial" / path).stat().st_ino for path in kept}
    killed = tmp_path / "out.partial/train/n03000684.partial"  # as a process leaves it that was killed
    killed.mkdir()
    (killed / "n03000684_10.JPEG").write_bytes(b"\xff\xd8")

    written: list[Path] = []

    def recorded(reader: io.BytesIO, file: Path) -> None:
        written.append(file)
        copy(reader, file)

    monkeypatch.setattr(imagenet, "_copy", recorded)
    unpack(tars.folder, tmp_path / "out")
    assert contents(tmp_path / "out") == tars.expected
    assert inodes == {path: (tmp_path / "out" / path).stat().st_ino for path in kept}
    assert {path.name for path in written}.isdisjoint(path.rpartition("/")[2] for path in kept)
    assert not (tmp_path / "out.partial").exists()


def test_full_disk(tars: Tars, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(reader: io.BytesIO, file: Path) -> None:
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(imagenet, "_copy", full)
    not_unpacked(
        tars.folder, tmp_path / "out", r"img_val\.tar could not be unpacked .*No space left.* same command again"
    )


@pytest.mark.parametrize("name", [TRAIN, VAL, DEVKIT])
@pytest.mark.parametrize("junk", [b"", b"<html>Log in</html>", b"\x1f\x8b\x08" + bytes(2000), b"junk" * 4000])
def test_another_file_under_an_archives_name(tars: Tars, tmp_path: Path, name: str, junk: bytes) -> None:
    tars.edit(name, lambda data: junk)
    message = not_unpacked(tars.folder, tmp_path / "out", f"{re.escape(name)} is cut short, damaged or another archive")
    assert imagenet.MD5[name] in message
    assert "image-net.org" in message


@pytest.mark.parametrize("name", [TRAIN, VAL, DEVKIT])
@pytest.mark.parametrize("share", [0.2, 0.35, 0.5])
def test_archive_cut_short(tars: Tars, tmp_path: Path, name: str, share: float) -> None:
    complete = (tars.folder / name).read_bytes()
    size = len(complete.rstrip(b"\0"))
    tars.edit(name, lambda data: data[: int(share * size)])
    not_unpacked(tars.folder, tmp_path / "out", f"{re.escape(name)} is cut short, damaged or another archive .* again")
    tars.edit(name, lambda data: complete)
    unpack(tars.folder, tmp_path / "out")
    assert contents(tmp_path / "out") == tars.expected


@pytest.mark.parametrize(("name", "match"), [(TRAIN, r"img_train\.tar lacks"), (VAL, "5 images, but .* 6")])
def test_archive_cut_between_two_members(tars: Tars, tmp_path: Path, name: str, match: str) -> None:
    with tarfile.open(tars.folder / name) as archive:
        end = archive.getmembers()[-1].offset
    tars.edit(name, lambda data: data[:end])
    not_unpacked(tars.folder, tmp_path / "out", match)


def test_damaged_header(tars: Tars, tmp_path: Path) -> None:
    """Python's tarfile would take it for the end of the class and lose the images after it."""
    second = (tars.folder / TRAIN).read_bytes().index(b"n02119789_9.JPEG")
    tars.edit(TRAIN, lambda data: data[:second] + b"m" + data[second + 1 :])
    not_unpacked(
        tars.folder, tmp_path / "out", r"img_train\.tar, n02119789\.tar in it, is cut short, damaged or another"
    )


def member(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize("place", [TRAIN, "inner", VAL])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../{}", tarfile.REGTYPE),
        ("a/../../{}", tarfile.REGTYPE),
        ("/tmp/{}", tarfile.REGTYPE),
        ("{}", tarfile.SYMTYPE),
        ("{}", tarfile.LNKTYPE),
        ("{}", tarfile.FIFOTYPE),
        ("{}", tarfile.CHRTYPE),
        ("{}", tarfile.GNUTYPE_SPARSE),  # of which a block may stand for any number of zeros
        ("{}\n.sh", tarfile.REGTYPE),
        ("..\\{}", tarfile.REGTYPE),
    ],
)
def test_nothing_escapes(tars: Tars, tmp_path: Path, place: str, name: str, kind: bytes) -> None:
    plain = {TRAIN: "n01440764.tar", "inner": "n01440764_7.JPEG", VAL: "ILSVRC2012_val_00000001.JPEG"}[place]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(member(name.format(plain), kind))
    evil = buffer.getvalue()
    if place == "inner":
        others = {f"{wnid}.tar": tar({f"{wnid}_1.JPEG": jpeg(1)}) for wnid, _ in SYNSETS.values()}
        evil = tar(others | {"n01440764.tar": evil})
    tars.edit(VAL if place == VAL else TRAIN, lambda data: evil)
    before = set(tmp_path.rglob("*"))
    message = not_unpacked(tars.folder, tmp_path / "out", r" holds '.*', which is no plain file named as in ImageNet's")
    assert repr(name.format(plain)) in message
    made = set(tmp_path.rglob("*")) - before
    assert all(path.is_relative_to(tmp_path / "out.partial") and plain not in path.name for path in made)


def test_folders_in_an_archive_are_ignored(tars: Tars, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(tars.folder / VAL) as old, tarfile.open(fileobj=buffer, mode="w") as new:
        new.addfile(member("./val", tarfile.DIRTYPE))
        for info in old:
            data = old.extractfile(info)
            info.name = f"./val/{info.name}"
            new.addfile(info, data)
    tars.edit(VAL, lambda data: buffer.getvalue())
    unpack(tars.folder, tmp_path / "out")
    assert contents(tmp_path / "out") == tars.expected


@pytest.mark.parametrize("truth", [TRUTH[:-1], [*TRUTH, 1]])
def test_number_of_val_images_differs_from_the_truths(tars: Tars, tmp_path: Path, truth: list[int]) -> None:
    tars.edit(DEVKIT, lambda data: devkit(truth))
    not_unpacked(
        tars.folder, tmp_path / "out", rf"img_val\.tar holds 6 images, but .*devkit.* classes of {len(truth)}, "
    )


@pytest.mark.parametrize("number", ["00000000", "00000007"])
def test_val_image_without_truth(tars: Tars, tmp_path: Path, number: str) -> None:
    with tarfile.open(tars.folder / VAL) as archive:
        images = {info.name: cast(IO[bytes], archive.extractfile(info)).read() for info in archive}
    images[f"ILSVRC2012_val_{number}.JPEG"] = images.pop("ILSVRC2012_val_00000006.JPEG")
    tars.edit(VAL, lambda data: tar(images))
    not_unpacked(
        tars.folder, tmp_path / "out", "6 images, but .* the classes of 6, numbered from 1: download both again"
    )


def test_train_and_val_of_different_classes(tars: Tars, tmp_path: Path) -> None:
    two = {f"{wnid}.tar": tar({f"{wnid}_1.JPEG": jpeg(1)}) for wnid in ("n02119789", "n03000684")}
    tars.edit(TRAIN, lambda data: tar(two))
    not_unpacked(
        tars.folder, tmp_path / "out", r"img_train\.tar lacks the class n01440764, which .*val\.tar has by .*devkit"
    )
    tars.edit(
        TRAIN, lambda data: tar(two | {"n01440764.tar": tar({"n01440764_1.JPEG": jpeg(1)}), "n00000001.tar": b""})
    )
    not_unpacked(tars.folder, tmp_path / "out", r"img_val\.tar lacks the class n00000001, which .*img_train\.tar has")
    tars.edit(DEVKIT, lambda data: devkit(TRUTH, meta_mat().replace(b"n01440764", b"../../../")))
    not_unpacked(tars.folder, tmp_path / "out", r"img_train\.tar lacks the class \.\./\.\./\.\./, which .*val\.tar has")
    tars.edit(DEVKIT, lambda data: devkit([]))
    not_unpacked(tars.folder, tmp_path / "out", r"img_val\.tar lacks the class n00000001, which .*img_train\.tar has")
    assert not (tmp_path / "out.partial").exists()


def test_class_without_images(tars: Tars, tmp_path: Path) -> None:
    tars.edit(TRAIN, lambda data: tar({f"{wnid}.tar": tar({}) for wnid, _ in SYNSETS.values()}))
    not_unpacked(
        tars.folder, tmp_path / "out", r"img_train\.tar, n01440764\.tar in it, holds no image: download it again"
    )


@pytest.mark.parametrize(
    "kit",
    [
        devkit(TRUTH, b"MATLAB 5.0 MAT-file"),
        devkit(TRUTH, meta_mat()[:-20]),
        devkit([*TRUTH[:-1], 4]),
        devkit([*TRUTH[:-1], ANIMAL[0]]),
        tar({"data/ILSVRC2012_validation_ground_truth.txt": b"1\n"}, "w:gz"),
    ],
)
def test_unreadable_devkit(tars: Tars, tmp_path: Path, kit: bytes) -> None:
    tars.edit(DEVKIT, lambda data: kit)
    not_unpacked(tars.folder, tmp_path / "out", r"devkit_t12\.tar\.gz has no .*: download it again from .*MD5 fa75")
    assert not (tmp_path / "out.partial").exists()
