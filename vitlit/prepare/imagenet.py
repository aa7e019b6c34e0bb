"""`vitlit data imagenet TARS OUT`: ImageNet's 1,000 classes (ILSVRC 2012) from the archives of its site."""

import gzip
import io
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, cast

from vitlit.data.progress import Progress
from vitlit.errors import UserError
from vitlit.files import whole_folder
from vitlit.prepare.sources import print_counts

TRAIN = "ILSVRC2012_img_train.tar"  # 138 GiB: 1,000 archives WNID.tar with 1,281,167 images
VAL = "ILSVRC2012_img_val.tar"  # 6.3 GiB: 50,000 images
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"  # 2.5 MiB: the classes, and the val images' classes by their numbers
MD5 = {
    TRAIN: "1d675b47d978889d74fa0da5fadfb00e",
    VAL: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT: "fa75699e90414af021442c21a62c3abf",
}
PAGE = "https://image-net.org/challenges/LSVRC/2012/2012-downloads.php"
SYNSETS, TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"


def unpack(tars: Path, out: Path) -> None:
    """Unpack the archives as `out/{train,val}/WNID/*.JPEG`, byte for byte; once interrupted, keep what is complete."""
    missing = [name for name in MD5 if not (tars / name).is_file()]
    if missing:
        raise UserError(f"{tars} lacks {', '.join(missing)}: download from {PAGE}, which needs a login")
    truth = _read_truth(tars / DEVKIT)
    with _archive(tars / TRAIN) as archive:  # seeks from one inner archive to the next
        train = {name.removesuffix(".tar") for name, _ in _members(archive, r"n[0-9]{8}\.tar")}
    for one, lacking, other in ((TRAIN, set(truth) - train, VAL), (VAL, train - set(truth), TRAIN)):
        if lacking:
            raise UserError(f"{one} lacks the class {min(lacking)}, which {other} has by {DEVKIT}: download all again")
    with whole_folder(out, resume=True) as partial:
        if not (partial / "val").is_dir():
            _unpack_val(tars / VAL, partial / "val", truth)
        _unpack_train(tars / TRAIN, partial / "train", len(train))
    print_counts(out, ("train", "val"))


def _unpack_train(file: Path, folder: Path, total: int) -> None:
    show = Progress()
    with _archive(file) as archive:
        for done, (name, opened) in enumerate(_members(archive, r"n[0-9]{8}\.tar"), start=1):
            target = folder / name.removesuffix(".tar")
            if not target.is_dir():
                with _archive(file, name, opened) as inner, whole_folder(target) as partial:
                    for image, reader in _members(inner, r"n[0-9]{8}_[0-9]+\.JPEG"):
                        _copy(reader, partial / image)
                    if not any(partial.iterdir()):
                        raise _Unexpected("holds no image")
            show(f"train: {done:,} of {total:,} classes")


def _unpack_val(file: Path, folder: Path, truth: list[str]) -> None:
    """Write `folder/WNID/*.JPEG`, given the WNIDs of images 1, 2, ..."""
    wnids = {f"ILSVRC2012_val_{number:08d}.JPEG": wnid for number, wnid in enumerate(truth, start=1)}
    found, show = set(), Progress()
    with _archive(file) as archive, whole_folder(folder) as partial:
        for wnid in set(truth):
            (partial / wnid).mkdir()
        for name, reader in _members(archive, r"ILSVRC2012_val_[0-9]{8}\.JPEG"):
            found.add(name)
            if name in wnids:
                _copy(reader, partial / wnids[name] / name)
            show(f"val: {len(found):,} of {len(truth):,} images")
        if found != wnids.keys():
            classes = f"{DEVKIT} the classes of {len(truth):,}, numbered from 1"
            raise UserError(f"{file} holds {len(found):,} images, but {classes}: download both again")


def _read_truth(file: Path) -> list[str]:
    """The WNIDs of the val images, in the order of their numbers."""
    import numpy as np
    from scipy.io import loadmat  # type: ignore[import-untyped]

    with _archive(file) as archive:
        files = {PurePosixPath(member.name).name: member for member in archive if member.isreg()}
        found = {name: cast(IO[bytes], archive.extractfile(member)).read() for name, member in files.items()}
        try:  # as the kit's readme.txt says: a synset with children is no class
            synsets = np.atleast_1d(loadmat(io.BytesIO(found[SYNSETS]), squeeze_me=True)["synsets"])
            classes = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if row["num_children"] == 0}
            return [classes[int(line)] for line in found[TRUTH].split()]
        except Exception as error:  # scipy raises anything on a broken file
            raise _Unexpected(f"has no {SYNSETS} and {TRUTH} that can be read") from error


class _Unexpected(tarfile.TarError):
    """A content that ImageNet's archive does not have."""


def _members(archive: tarfile.TarFile, pattern: str) -> Iterator[tuple[str, IO[bytes]]]:
    """The names, without folders, and contents of an archive's files, all regular and with names of this pattern."""
    for member in archive:
        if member.isdir():
            continue
        name = re.fullmatch(rf"(\./)?(?:\w+/)*({pattern})", member.name)
        if not name or member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise _Unexpected(f"holds {member.name!r}, which is no plain file named as in ImageNet's archive")
        yield name[2], cast(IO[bytes], archive.extractfile(member))
    # tarfile takes a damaged header for the end, where there are zeros.
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError("damaged header")


def _copy(reader: IO[bytes], file: Path) -> None:
    with file.open("xb") as written:
        shutil.copyfileobj(reader, written)


@contextmanager
def _archive(file: Path, inner: str = "", opened: IO[bytes] | None = None) -> Iterator[tarfile.TarFile]:
    """An open archive, or one inside it; whatever fails in reading it, or in writing its files, is a UserError."""
    where = f"{file}, {inner} in it," if inner else str(file)
    again = "give the same command again, which keeps what is complete"
    try:
        with tarfile.open(None if opened else file, "r:gz" if file.suffix == ".gz" else "r:", opened) as archive:
            yield archive
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        wrong = error if isinstance(error, _Unexpected) else f"is cut short, damaged or another archive ({error})"
        remedy = f"download it again from {PAGE} (MD5 {MD5[file.name]}), and {again}"
        raise UserError(f"{where} {wrong}: {remedy}") from error
    except OSError as error:
        raise UserError(f"{file} could not be unpacked ({error}): correct that, and {again}") from error
