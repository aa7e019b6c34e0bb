"""Files: written whole or not at all, and read after a check of size and checksums."""

import csv
import io
import os
import re
import shutil
import socket
import stat
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitlit.errors import UserError

MOST_UNPACKED = 20  # times a file's own size. Weights compress to a half, a bomb to a thousandth.


def expand(path: str | Path) -> str:
    """A path with ~ and environment variables replaced; UserError if there are none such."""
    text = os.fspath(path)
    if "://" in text or text.startswith("hf:"):
        return text
    found = os.path.expanduser(os.path.expandvars(text))
    missing = re.match(r"~[^/]*|.*?(\$\w+|\$\{\w+\})", found)
    if missing and not os.path.lexists(found):
        raise UserError(f"{text}: there is no {missing[1] or missing[0]} to put in; write the path out")
    return found


def from_here(path: str | Path) -> str:
    """A path, relative to the working folder if it is in it."""
    here = Path.cwd()
    return str(Path(path).relative_to(here) if Path(path).is_relative_to(here) else path)


@contextmanager
def whole_file(path: Path, partial: Path | None = None) -> Iterator[Path]:
    """A path to write to, renamed to `path` after the block, once its content is on the disk.

    A block that fails leaves the old file, and so does a killed process. `partial` must lie in the same folder. The
    file's permissions are those of the user's umask, whatever a library gave it (safetensors: 0600).
    """
    partial = partial or path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)  # left by a killed process, perhaps with other permissions
        partial.touch()
        mode = stat.S_IMODE(partial.stat().st_mode)
        yield partial
        partial.chmod(mode)
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_new(*paths: str | Path | None) -> None:
    """UserError for the first path that exists, but for empty folders: what a command is told to write is new."""
    for path in paths:
        if path and (os.path.isfile(path) or (os.path.isdir(path) and os.listdir(path))):
            filled = " and is not empty" if os.path.isdir(path) else ""
            raise UserError(f"{path} exists{filled}: name another, or remove it first")


@contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """UserError with a remedy where the block fails to write a path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; {remedy}") from error


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text)


def write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table, names that are no text as the bytes they are."""
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file).writerows([head, *rows])


def read_csv(path: Path) -> list[dict[str, str]]:
    """The whole lines of a table; none if there is no file."""
    if not path.is_file():
        return []
    text = path.read_bytes().decode(errors="surrogateescape")
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))


@contextmanager
def whole_folder(out: Path, resume: bool = False) -> Iterator[Path]:
    """A folder to write into, `OUT.partial`, renamed to `out`, which must be empty or absent, after the block.

    To `resume` is to keep the content of `OUT.partial`, both from before the block and when the block fails.
    """
    check_new(out)
    target = out.resolve()
    partial = target.with_name(f"{target.name}.partial")
    if not resume:
        shutil.rmtree(partial, ignore_errors=True)
    with writing(partial, "name another folder"):
        partial.mkdir(parents=True, exist_ok=resume)
    try:
        yield partial
        partial.rename(target)
    finally:
        if not resume:
            shutil.rmtree(partial, ignore_errors=True)


def save_arrays(file: Path, arrays: dict[str, Any]) -> None:
    """Write an npz; OSError where that fails."""
    import numpy as np

    # Each of several processes that scan one folder at once writes its own partial file.
    name = f".{file.name}.{socket.gethostname()}.{os.getpid()}.partial"
    with whole_file(file, file.with_name(name)) as partial, partial.open("wb") as opened:
        np.savez(opened, **arrays)


def load_arrays(file: Path | io.BytesIO) -> dict[str, Any]:
    """Read a file of `save_arrays`, without executing its content.

    Raises OSError if the file cannot be read, and ValueError if it is damaged or another file.
    """
    import numpy as np

    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError):
        raise
    except Exception as error:  # numpy and zipfile raise anything on a damaged file
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def read_file(path: str | Path) -> bytes:
    """The content of an image file; UserError if it is not a regular file."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # reading a pipe or /dev/zero would not end
                raise UserError(f"cannot read the image {path}: it is no file")
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read the image {path}: {error.strerror}") from error


def check_archive(path: Path) -> list[str]:
    """The member names of a zip archive; UserError for a wrong checksum, a bomb or compressed tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            unpacked = sum(member.file_size for member in members)
            numpy = any(member.filename.endswith(".npy") for member in members)
            packed = next((m.filename for m in members if m.compress_type and not numpy), None)
            bomb = unpacked > MOST_UNPACKED * path.stat().st_size
            broken = None if bomb else archive.testzip()
    except Exception as error:  # a broken archive raises anything
        raise damaged(path, f"not a whole archive ({type(error).__name__}: {error})") from error
    if bomb:
        raise damaged(path, f"{unpacked:,} bytes packed into {path.stat().st_size:,}, unlike any weights")
    if broken is not None:
        raise damaged(path, f"the checksum of {broken} is wrong")
    if any("/code/" in member.filename for member in members):
        raise UserError(f"{path} is a TorchScript program, which is not run; save the model's state dict instead")
    if packed is not None:  # torch would read the compressed bytes as numbers
        raise damaged(path, f"{packed} in it is compressed, which torch.save never does")
    return [member.filename for member in members]


def damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path} is not a checkpoint, or a damaged one: {' '.join(why.split())}")
