"""ImageNet's 1,000 classes (ILSVRC 2012) from the archives of its site: what `vitlit data imagenet TARS OUT` calls."""

import gzip
import io
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from vitlit.data.progress import Progress
from vitlit.errors import UserError
from vitlit.files import whole_folder

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
MD5 = {
    TRAIN: "1d675b47d978889d74fa0da5fadfb00e",
    VAL: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT: "fa75699e90414af021442c21a62c3abf",
}
PAGE = "https://image-net.org/challenges/LSVRC/2012/2012-downloads.php"

SYNSETS, TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
WNID = "n[0-9]{8}"


def unpack(tars: Path, out: Path) -> None:
    """Unpack the archives as `out/train/WNID/*.JPEG` and `out/val/WNID/*.JPEG`, and print one line for each split.

    | archive | holds | size |
    |---|---|---|
    | ILSVRC2012_img_train.tar | 1,000 archives WNID.tar, one a class, of 1,281,167 images | 138 GiB |
    | ILSVRC2012_img_val.tar | 50,000 images | 6.3 GiB |
    | ILSVRC2012_devkit_t12.tar.gz | data/meta.mat, the classes; the val images' classes by their numbers | 2.5 MiB |

    Files keep their bytes. `out` is written as `OUT.partial` and renamed at the end; the same command, given again
    after an interruption, keeps val and the classes of train that are complete. Archives with fewer images or classes,
    for a trial, are accepted if train and val have the same classes.

    torchvision's parsers (`torchvision.datasets.imagenet`) do not resume, write into the folder of the archives, write
    the inner archives to the disk before they unpack them, and refuse trial archives by their MD5.

    Args:
        tars: the folder of the three archives.
        out: the folder to make; where it exists it must be empty.

    Raises:
        UserError: an archive is missing, damaged or another one, train's classes are not val's, val's images are not
            the ones whose classes the kit has, or `out` is not empty or cannot be written.
    """
    missing = [name for name in MD5 if not (tars / name).is_file()]
    if missing:
        raise UserError(f"{tars} lacks {', '.join(missing)}: download what it lacks from {PAGE}, which needs a login")
    truth = _read_truth(tars / DEVKIT)
    with _archive(tars / TRAIN) as archive:  # which seeks from one inner archive to the next
        train = {name.removesuffix(".tar") for name, _ in _members(archive, rf"{WNID}\.tar")}
    for one, lacking, other in ((TRAIN, set(truth) - train, VAL), (VAL, train - set(truth), TRAIN)):
        if lacking:
            raise UserError(
                f"{one} lacks the class {min(lacking)}, which {other} has by {DEVKIT} ({len(lacking):,} in all): both "
                f"must have the same classes; download the three archives from {PAGE}"
            )
    with whole_folder(out, resume=True) as partial:
        if not (partial / "val").is_dir():
            _unpack_val(tars / VAL, partial / "val", truth)
        _unpack_train(tars / TRAIN, partial / "train", len(train))
    for split in ("train", "val"):
        images = [len(os.listdir(entry)) for entry in os.scandir(out / split) if entry.is_dir()]
        print(f"{out / split}: {sum(images):,} images, {len(images):,} classes")


def _unpack_train(file: Path, folder: Path, total: int) -> None:
    """Write the images as `folder/WNID/*.JPEG`, except for the classes that are there."""
    tell = Progress()
    with _archive(file) as archive:
        for done, (name, opened) in enumerate(_members(archive, rf"{WNID}\.tar"), start=1):
            target = folder / name.removesuffix(".tar")
            if not target.is_dir():
                with _archive(file, name, opened) as inner, whole_folder(target) as made:
                    for image, reader in _members(inner, rf"{WNID}_[0-9]+\.JPEG"):
                        _copy(reader, made / image)
                    if not any(made.iterdir()):
                        raise _Unexpected("holds no image")
            tell(f"train: {done:,} of {total:,} classes")


def _unpack_val(file: Path, folder: Path, truth: list[str]) -> None:
    """Write the images as `folder/WNID/*.JPEG`, sorted by the classes of the images of numbers 1, 2, ..."""
    wnids = {f"ILSVRC2012_val_{number:08d}.JPEG": wnid for number, wnid in enumerate(truth, start=1)}
    found, tell = set(), Progress()
    with _archive(file) as archive, whole_folder(folder) as made:
        for wnid in set(truth):
            (made / wnid).mkdir()
        for name, reader in _members(archive, r"ILSVRC2012_val_[0-9]{8}\.JPEG"):
            found.add(name)
            if name in wnids:
                _copy(reader, made / wnids[name] / name)
            tell(f"val: {len(found):,} of {len(truth):,} images")
        if found != wnids.keys():
            raise UserError(
                f"{file} holds {len(found):,} images, but {DEVKIT} the classes of {len(truth):,}, numbered from 1: "
                f"download both again from {PAGE}"
            )


def _read_truth(file: Path) -> list[str]:
    """The classes of the val images, in the order of their numbers, as the development kit has them.

    `meta.mat` gives the class of an ILSVRC2012_ID, the ground truth an ILSVRC2012_ID for each image. A synset with
    children is no class. (The kit's readme.txt; torchvision.datasets.imagenet reads it so, too.)
    """
    import numpy as np
    from scipy.io import loadmat  # type: ignore[import-untyped]

    with _archive(file) as archive:
        found = {PurePosixPath(member.name).name: _open(archive, member).read() for member in archive if member.isreg()}
        try:
            synsets = np.atleast_1d(loadmat(io.BytesIO(found[SYNSETS]), squeeze_me=True)["synsets"])
            classes = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if row["num_children"] == 0}
            truth = [classes[int(line)] for line in found[TRUTH].split()]
        except Exception as error:  # scipy raises anything over a file that is not what it should be
            raise _Unexpected(f"has no {SYNSETS} and {TRUTH} that can be read") from error
        if not truth or not all(re.fullmatch(WNID, wnid) for wnid in truth):  # they become names of folders
            raise _Unexpected("names no classes such as n01440764")
    return truth


class _Unexpected(tarfile.TarError):
    """What an archive of ImageNet's does not hold."""


def _members(archive: tarfile.TarFile, pattern: str) -> Iterator[tuple[str, IO[bytes]]]:
    """The names, without folders, and contents of an archive's files: plain ones whose names fit the pattern."""
    for member in archive:
        if member.isdir():
            continue
        named = re.fullmatch(rf"(\./)?(\w+/)*(?P<name>{pattern})", member.name)
        if not named or member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise _Unexpected(f"holds {member.name!r}, which is no plain file named as in ImageNet's archive")
        yield named["name"], _open(archive, member)
    # tarfile takes a header that it cannot read for the end, where there are zeros.
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError("no header where one must be")


def _open(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    opened = archive.extractfile(member)
    assert opened is not None  # of a plain file
    return opened


def _copy(reader: IO[bytes], file: Path) -> None:
    with file.open("xb") as written:
        shutil.copyfileobj(reader, written)


@contextmanager
def _archive(file: Path, inner: str = "", opened: IO[bytes] | None = None) -> Iterator[tarfile.TarFile]:
    """Open an archive, or one inside it; what goes wrong in reading it, or in writing its files, is a UserError."""
    where = f"{file}, {inner} in it," if inner else str(file)
    again = "give the same command again, which keeps what it has completed"
    try:
        with tarfile.open(None if opened else file, "r:gz" if file.suffix == ".gz" else "r:", opened) as archive:
            yield archive
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        wrong = error if isinstance(error, _Unexpected) else f"is cut short, damaged or another archive ({error})"
        remedy = f"download it again from {PAGE} (MD5 {MD5[file.name]}), and {again}"
        raise UserError(f"{where} {wrong}: {remedy}") from error
    except OSError as error:
        raise UserError(f"{file} could not be unpacked ({error}): see to that, and {again}") from error
