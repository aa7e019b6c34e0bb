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
MOST_KIT = 64 << 20  # bytes of either: they have one at most
WNID = "n[0-9]{8}"


def unpack(tars: Path, out: Path) -> None:
    """Unpack the archives as `out/train/WNID/*.JPEG` and `out/val/WNID/*.JPEG`, and print one line for each split.

    | archive | holds | size |
    |---|---|---|
    | ILSVRC2012_img_train.tar | 1,000 archives WNID.tar, one a class, of 1,281,167 images | 138 GiB |
    | ILSVRC2012_img_val.tar | 50,000 images | 6.3 GiB |
    | ILSVRC2012_devkit_t12.tar.gz | data/meta.mat, the classes; the val images' classes by their numbers | 2.5 MiB |

    Files keep their bytes, and nothing is held twice: the inner archives are read where they lie. Everything is made
    in `OUT.partial` beside `out`, which takes its final name once it is complete. A command that was interrupted and is
    given again keeps the classes of train, and val, which it has completed. Archives with fewer images or classes, for
    a trial, are taken as long as train and val have the same classes.

    Args:
        tars: the folder of the three archives.
        out: the folder to make; where it exists it must be empty.

    Raises:
        UserError: an archive is missing, damaged or another one, train's classes are not val's, val's images are not
            the ones whose classes are known, or `out` is not empty or cannot be written.
    """
    missing = [name for name in MD5 if not (tars / name).is_file()]
    if missing:
        raise UserError(f"{tars} lacks {', '.join(missing)}: download what it lacks from {PAGE}, which needs a login")
    truth = _read_truth(tars / DEVKIT)
    train = _list_train(tars / TRAIN)
    _check_classes(train, set(truth))
    with whole_folder(out, resume=True) as partial:
        _check_leftovers(partial, set(truth))
        if not (partial / "val").is_dir():
            _unpack_val(tars / VAL, partial / "val", truth)
        _unpack_train(tars / TRAIN, partial / "train", len(train))
    for split in ("train", "val"):
        images = [len(os.listdir(entry)) for entry in os.scandir(out / split) if entry.is_dir()]
        print(f"{out / split}: {sum(images):,} images, {len(images):,} classes")


def _unpack_train(file: Path, folder: Path, total: int) -> None:
    """Write the images as `folder/WNID/*.JPEG`, except for the classes that are there."""
    tell = Progress()
    with _reading(file), tarfile.open(file, "r:") as archive:
        for done, (name, opened) in enumerate(_members(archive, rf"{WNID}\.tar", file)):
            wnid = name.removesuffix(".tar")
            if not (folder / wnid).is_dir():
                _unpack_class(file, name, opened, folder / wnid)
            tell(f"train: {done + 1:,} of {total:,} classes")


def _unpack_class(file: Path, name: str, opened: IO[bytes], folder: Path) -> None:
    with _reading(file, name), tarfile.open(fileobj=opened, mode="r:") as archive, whole_folder(folder) as made:
        for image, reader in _members(archive, rf"{WNID}_[0-9]+\.JPEG", file, name):
            _copy(reader, made / image)
        if not any(made.iterdir()):
            raise UserError(f"{file}{_inside(name)} holds no image: download {_again(file)}")


def _unpack_val(file: Path, folder: Path, truth: list[str]) -> None:
    """Write the images as `folder/WNID/*.JPEG`, sorted by the classes of the images of numbers 1, 2, ..."""
    count, strays, tell = 0, 0, Progress()
    with _reading(file), tarfile.open(file, "r:") as archive, whole_folder(folder) as made:
        for wnid in set(truth):
            (made / wnid).mkdir()
        for name, reader in _members(archive, r"ILSVRC2012_val_[0-9]{8}\.JPEG", file):
            number = int(name.removesuffix(".JPEG").rpartition("_")[2])
            count += 1
            if 1 <= number <= len(truth):
                _copy(reader, made / truth[number - 1] / name)
            else:
                strays += 1
            tell(f"val: {count:,} of {len(truth):,} images")
        if strays or count != len(truth):
            raise UserError(
                f"{file} holds {count:,} images, but {DEVKIT} the classes of {len(truth):,}, numbered from 1: "
                f"download both again from {PAGE}"
            )


def _read_truth(file: Path) -> list[str]:
    """The classes of the val images, in the order of their numbers, as the development kit has them.

    `meta.mat` gives the class of an ILSVRC2012_ID, the ground truth an ILSVRC2012_ID for each image. A synset with
    children is no class. (The kit's readme.txt; torchvision.datasets.imagenet reads it so, too.)
    """
    import numpy as np
    from scipy.io import loadmat  # type: ignore[import-untyped]

    found: dict[str, bytes] = {}
    with _reading(file), tarfile.open(file, "r:gz") as archive:
        for member in archive:
            name = PurePosixPath(member.name).name
            if name in (SYNSETS, TRUTH) and member.isreg() and member.size <= MOST_KIT:
                found[name] = _open(archive, member).read()
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(found[SYNSETS]), squeeze_me=True)["synsets"])
        classes = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if row["num_children"] == 0}
        truth = [classes[int(line)] for line in found[TRUTH].split()]
    except Exception as error:  # scipy raises anything over a file that is not what it should be
        raise UserError(f"{file} has no {SYNSETS} and {TRUTH} that can be read: download {_again(file)}") from error
    if not truth or not all(re.fullmatch(WNID, wnid) for wnid in truth):  # they become names of folders
        raise UserError(f"{file} names no classes such as n01440764: download {_again(file)}")
    return truth


def _list_train(file: Path) -> list[str]:
    """The classes of the training images; it reads only where an inner archive begins, which takes no time."""
    with _reading(file), tarfile.open(file, "r:") as archive:
        return [name.removesuffix(".tar") for name, _ in _members(archive, rf"{WNID}\.tar", file)]


def _check_classes(train: list[str], val: set[str]) -> None:
    lacking = [(TRAIN, wnid, VAL) for wnid in sorted(val.difference(train))]
    lacking += [(VAL, wnid, TRAIN) for wnid in sorted(set(train) - val)]
    if lacking:
        one, wnid, other = lacking[0]
        others = f" ({len(lacking):,} such classes)" if len(lacking) > 1 else ""
        raise UserError(
            f"{one} lacks the class {wnid}, which {other} has by {DEVKIT}{others}: both must have the same classes; "
            f"download the three archives from {PAGE}"
        )


def _check_leftovers(partial: Path, classes: set[str]) -> None:
    """Refuse to go on with what is not of an earlier command for these archives."""
    for folder in (partial / "train", partial / "val"):
        names = {path.name.removesuffix(".partial") for path in folder.glob("[!.]*")}
        if strange := sorted(names - classes):
            raise UserError(f"{folder} holds {strange[0]!r}, which these archives lack: remove {partial} first")


def _members(archive: tarfile.TarFile, pattern: str, file: Path, inner: str = "") -> Iterator[tuple[str, IO[bytes]]]:
    """The names, without folders, and contents of an archive's files, which must be plain ones named by the pattern."""
    for member in archive:
        if member.isdir():
            continue
        path = PurePosixPath(member.name)
        outside = path.is_absolute() or ".." in path.parts
        if outside or not member.isreg() or member.issparse() or not re.fullmatch(pattern, path.name):
            raise UserError(
                f"{file}{_inside(inner)} holds {member.name!r}, which is no plain file named as in ImageNet's archive: "
                f"download {_again(file)}"
            )
        yield path.name, _open(archive, member)
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
def _reading(file: Path, inner: str = "") -> Iterator[None]:
    """Turn what goes wrong in reading an archive, or in writing its files, into a UserError."""
    try:
        yield
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"{file}{_inside(inner)} is cut short, damaged or another archive ({error}): download {_again(file)}, and "
            "give the same command again, which keeps what it has completed"
        ) from error
    except OSError as error:
        raise UserError(
            f"{file} could not be unpacked ({error}): see to that, and give the same command again, "
            "which keeps what it has completed"
        ) from error


def _inside(inner: str) -> str:
    return f", {inner} in it," if inner else ""


def _again(file: Path) -> str:
    return f"it again from {PAGE} (MD5 {MD5[file.name]})"
