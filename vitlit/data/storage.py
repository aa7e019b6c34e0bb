"""Folders, local or remote (through fsspec), and ranges of bytes of their files, read again after a failure."""

import os
import time
from typing import Any, NamedTuple

from fsspec.core import url_to_fs  # type: ignore[import-untyped]

from vitlit.data.index import StorageUserError
from vitlit.errors import UserError

PAUSES = (0.3, 1.2, 3.0)  # seconds before a read is tried again
TIMEOUT = 60.0  # seconds for a response


class Folder(NamedTuple):
    root: str
    filesystem: Any
    path: str


_folders: dict[tuple[int, str], Folder] = {}


def join(root: str, name: str) -> str:
    return f"{root.rstrip('/')}/{name}"


def connect(root: str) -> Folder:
    try:
        # Every fork closes the connections of an instance in fsspec's own cache.
        return Folder(root, *url_to_fs(root, skip_instance_cache=True))
    except (ImportError, ValueError) as error:  # no package for its kind, or no such kind
        raise UserError(f"{root} cannot be read ({error}): give a folder, or a URL such as s3://BUCKET/SET") from error


def read_range(root: str, name: str, start: int, end: int) -> bytes:
    """Bytes start to end of a file in a folder. A failed read is tried again after each of `PAUSES`."""
    place = f"cannot read bytes {start}-{end} of {join(root, name)}"
    failure: Exception
    for pause in (0.0, *PAUSES):
        if pause:  # sleep(0) takes 60 us
            time.sleep(pause)
        try:
            data = _read_once(root, name, start, end)
        except UserError:
            raise
        except Exception as error:  # each filesystem raises its own
            failure = error
            continue
        if len(data) == end - start:
            return data
        if len(data) > end - start:
            raise StorageUserError(f"{place}: the server ignores Range; use one that serves parts of files")
        failure = EOFError(f"the file is cut short before byte {end}")
    tried = f"{place}, tried {1 + len(PAUSES)} times ({reason(failure)})"
    raise StorageUserError(f"{tried}; once they can be read, the same command continues the run") from failure


def _read_once(root: str, name: str, start: int, end: int) -> bytes:
    if "://" not in root:
        with open(os.path.join(root, name), "rb", buffering=0) as file:
            file.seek(start)
            return file.read(end - start)
    key = (os.getpid(), root)  # a fork must not use its parent's, nor drop it, which would close the connections
    _, filesystem, path = _folders.get(key) or _folders.setdefault(key, connect(root))
    limits = {"timeout": TIMEOUT} if filesystem.async_impl else {}
    return bytes(filesystem.cat_file(join(path, name), start=start, end=end, **limits))


def reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, TimeoutError):
        return f"no answer within {TIMEOUT:g} seconds"
    return str(getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__)
