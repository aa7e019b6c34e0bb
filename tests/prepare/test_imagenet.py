"""`vitlit data imagenet TARS OUT`, on small archives laid out as ImageNet's."""

import io
import re
import tarfile
from hashlib import md5
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import user_error
from PIL import Image
from scipy.io import savemat  # type: ignore[import-untyped]
from torchvision.datasets import imagenet

from vitlit.data import progress
from vitlit.data.folder import scan_split, scan_train
from vitlit.errors import UserError
from vitlit.prepare.imagenet import unpack

TRAIN, VAL, DEVKIT = (imagenet.ARCHIVE_META[split][0] for split in ("train", "val", "devkit"))

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


def devkit(truth: list[int]) -> bytes:
    folder = "ILSVRC2012_devkit_t12"
    files = {
        f"{folder}/readme.txt": b"",
        f"{folder}/data/meta.mat": meta_mat(),
        f"{folder}/data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{i}\n" for i in truth).encode(),
    }
    return tar(files, "w:gz")


class Tars(NamedTuple):
    """A folder of archives, and the files that they must give, by path."""

    folder: Path
    expected: dict[str, bytes]


@pytest.fixture
def tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tars:
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
    for split, (name, _) in imagenet.ARCHIVE_META.items():  # the MD5 are those of the real archives
        monkeypatch.setitem(imagenet.ARCHIVE_META, split, (name, md5((folder / name).read_bytes()).hexdigest()))
    return Tars(folder, expected)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def not_unpacked(tars: Path, out: Path, match: str) -> str:
    message = user_error(match, unpack, tars, out)
    assert not out.exists()
    return message


def test_files_keep_their_bytes_and_classes(
    tars: Tars, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "SECONDS", 0)
    unpack(Path("tars"), Path("data/out"))
    assert contents(tmp_path / "data/out") == tars.expected
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["out"]
    lines = ["data/out/train: 9 images, 3 classes", "data/out/val: 6 images, 3 classes"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[1:] == [*(f"train: {i} classes" for i in (1, 2, 3)), *lines]
    classes, train, _ = scan_train(tmp_path / "data/out")
    assert classes == ["n01440764", "n02119789", "n03000684"]
    assert len(train) == 9
    assert scan_split(tmp_path / "data/out/val", classes).labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_existing_folder(tars: Tars, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    unpack(tars.folder, tmp_path / "mine")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"mine exists and is not empty: name another"):
        unpack(tars.folder, tmp_path / "mine")
    photo = next((tmp_path / "mine").glob("*/*/*"))
    with pytest.raises(UserError, match=r"JPEG exists"):
        unpack(tars.folder, photo)
    with pytest.raises(UserError, match="cannot write"):
        unpack(tars.folder, photo / "out")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", [TRAIN, VAL, DEVKIT])
def test_missing_archive(tars: Tars, tmp_path: Path, name: str) -> None:
    (tars.folder / name).unlink()
    message = not_unpacked(
        tars.folder, tmp_path / "out", f"tars lacks {re.escape(name)}: download .*image-net.org.* login"
    )
    assert all(other == name or other not in message for other in (TRAIN, VAL, DEVKIT))
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("name", [TRAIN, VAL, DEVKIT])
def test_damaged_archive(tars: Tars, tmp_path: Path, name: str) -> None:
    file = tars.folder / name
    complete = file.read_bytes()
    file.write_bytes(complete[:-1])
    message = not_unpacked(tars.folder, tmp_path / "out", f"{re.escape(name)} is cut short or damaged: download it")
    assert md5(complete).hexdigest() in message
    file.write_bytes(complete)
    unpack(tars.folder, tmp_path / "out")
    assert contents(tmp_path / "out") == tars.expected


def test_interrupted_unpacking_is_resumed(tars: Tars, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract = tarfile.TarFile.extractall

    def interrupted(archive: tarfile.TarFile, path: Any, **options: Any) -> None:
        if any((tmp_path / "out.partial/train").glob("n????????")):  # in the second class
            Path(path, "half").write_bytes(b"")
            raise KeyboardInterrupt
        extract(archive, path, **options)

    monkeypatch.setattr(tarfile.TarFile, "extractall", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unpack(tars.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    kept = contents(tmp_path / "out.partial")
    assert len(kept) == 6 + 3
    inodes = {path: (tmp_path / "out.partial" / path).stat().st_ino for path in kept}
    killed = tmp_path / "out.partial/train/n03000684.partial"  # as a process leaves it that was killed
    killed.mkdir()
    (killed / "n03000684_10.JPEG").write_bytes(b"\xff\xd8")
    monkeypatch.setattr(tarfile.TarFile, "extractall", extract)
    unpack(tars.folder, tmp_path / "out")
    assert contents(tmp_path / "out") == tars.expected
    assert inodes == {path: (tmp_path / "out" / path).stat().st_ino for path in kept}
    assert not (tmp_path / "out.partial").exists()


def test_full_disk(tars: Tars, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(archive: tarfile.TarFile, path: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(tarfile.TarFile, "extractall", full)
    not_unpacked(
        tars.folder,
        tmp_path / "out",
        r"tars could not be unpacked .*No space left.*; correct that, and the same command continues",
    )
