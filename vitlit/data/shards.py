"""Images in tars (shards, as WebDataset has them), each read by itself: a range of bytes of a local or remote file.

index.npz, beside the tars, says where each image lies, and keeps the order of the folder that they come from.
"""

import io
import os
import re
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fsspec.core import url_to_fs  # type: ignore[import-untyped]

from vitlit.data.index import Index, Names, StorageUserError
from vitlit.data.manifest import SPLITS, Manifest
from vitlit.errors import UserError
from vitlit.files import load_arrays, refuse_large, save_arrays

INDEX = "index.npz"
CLASSES = ("classes.txt", "classnames.txt")  # a name a line, where tars have numbers
BLOCK = 512  # bytes of the header that a tar has before a file's content
PAUSES = (0.3, 1.2, 3.0)  # seconds before a read is tried again
TIMEOUT = 60.0  # seconds for an answer
NO_PARTS = "range requests"  # fsspec's words of a server that has none

_filesystems: dict[tuple[int, str], tuple[Any, str]] = {}


@dataclass(frozen=True)
class ShardFiles:
    """Files within tars.

    Attributes:
        root: the folder of the tars, a path or a URL.
        shards: the tars' names in it.
        parts: int64 (N, 4): the number of the shard, the first byte, the size, and the CRC-32 of the file's header in
            the tar. The header is read, too, so that nothing is taken for an image that it is not, whatever happened
            to the shard.
        names: of the files within their split.
    """

    root: str
    shards: tuple[str, ...]
    parts: np.ndarray
    names: Names

    def path(self, row: int) -> str:
        return f"{self.shards[self.parts[row, 0]]}/{self.names.text(row)}"

    def read(self, row: int) -> bytes:
        shard, start, size, check = self.parts[row].tolist()
        refuse_large(self.path(row), size)
        data = read_range(self.root, self.shards[shard], start - BLOCK, start + size)
        if zlib.crc32(data[:BLOCK]) != check:
            raise StorageUserError(
                f"{join(self.root, self.shards[shard])} is not the file that {INDEX} was made of: {self.path(row)} is "
                f"not at its byte {start}; put the shards and {INDEX} of one making there"
            )
        return data[BLOCK:]


class Kept(NamedTuple):
    """What index.npz holds: also the tars' names and sizes, bytes, int64, and a key where they were made elsewhere."""

    found: Manifest
    shards: tuple[str, ...]
    sizes: np.ndarray
    key: bytes = b""


def join(root: str, name: str) -> str:
    """The path or URL of a file in a folder."""
    return f"{root.rstrip('/')}/{name}"


def connect(root: str) -> tuple[Any, str]:
    """A new filesystem of fsspec, and the path of a folder in it.

    Raises:
        UserError: there is none for such URLs, or it needs another package.
    """
    try:
        # Of an instance in fsspec's own cache, every fork would close the connections.
        filesystem, path = url_to_fs(root, skip_instance_cache=True)
    except ImportError as error:
        raise UserError(f"{root} cannot be read without another package: {error}") from error
    except ValueError as error:
        raise UserError(f"{root} cannot be read ({error}): give a folder, or a URL such as s3://BUCKET/SET") from error
    return filesystem, path


def read_range(root: str, name: str, start: int, end: int) -> bytes:
    """Bytes start to end of a file in a folder. What fails is tried again, after `PAUSES`.

    Raises:
        UserError: it still fails, or cannot but fail.
    """
    what = f"cannot read bytes {start}-{end} of {join(root, name)}"
    failure: Exception | None = None
    for pause in (0.0, *PAUSES):
        if pause:  # sleep(0) takes 60 us
            time.sleep(pause)
        try:
            data = _read_once(root, name, start, end)
            if len(data) == end - start:
                return data
            failure = None
        except UserError:
            raise
        except Exception as error:  # every filesystem has its own
            failure = error
            if NO_PARTS in str(error):  # it would fail again
                raise StorageUserError(f"{what}: {why(error)}") from error
    reason = why(failure) if failure else f"the file is cut short: {_ends(root, name, end)}"
    raise StorageUserError(
        f"{what}, tried {1 + len(PAUSES)} times ({reason}); once they can be read, the same command continues the run"
    ) from failure


def _read_once(root: str, name: str, start: int, end: int) -> bytes:
    if "://" not in root:
        with open(os.path.join(root, name), "rb", buffering=0) as file:
            file.seek(start)
            return file.read(end - start)
    key = (os.getpid(), root)  # a fork must not use its parent's, nor drop it, which would close the connections
    filesystem, path = _filesystems.get(key) or _filesystems.setdefault(key, connect(root))
    if root.startswith("http"):
        from aiohttp import ClientTimeout

        # Unlike cat_file this notices a server that sends the whole file, before it has come.
        limit = ClientTimeout(total=TIMEOUT)
        with filesystem.open(join(path, name), "rb", cache_type="none", size=end, timeout=limit) as file:
            file.seek(start)
            return bytes(file.read(end - start))
    limits = {"timeout": TIMEOUT} if filesystem.async_impl else {}
    return bytes(filesystem.cat_file(join(path, name), start=start, end=end, **limits))


def _ends(root: str, name: str, end: int) -> str:
    """Where a file ends, in words."""
    try:
        filesystem, path = connect(root)
        return f"it ends at byte {filesystem.size(join(path, name))}"
    except Exception:  # what is wrong is told without it, too
        return f"it ends before byte {end}"


def why(error: Exception) -> str:
    """What went wrong with a filesystem, in words on one line."""
    status, text = getattr(error, "status", None), " ".join(str(error).split())
    if isinstance(status, int):
        return f"the server answers with HTTP status {status}"
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, TimeoutError):
        return f"no answer within {TIMEOUT:g} seconds"
    if re.search("connect", type(error).__name__, re.IGNORECASE):
        return f"the server cannot be reached: {text}"
    if NO_PARTS in text:
        return "the server ignores Range and sends the whole file: use one that serves parts of files"
    return str(getattr(error, "strerror", None) or text or type(error).__name__)


def is_shards(root: str) -> bool:
    """Whether a data root is a URL, or a folder with index.npz, or with tars in it or in its folder train.

    Class folders count for more than tars beside them, which may be the archive that they came in.
    """
    folder = Path(root)
    if "://" in root or (folder / INDEX).is_file():
        return True
    if any(path.is_dir() for path in folder.glob("train/[!.]*")):
        return False
    return any((*folder.glob("*.tar"), *folder.glob("train/*.tar")))


def read_shards(root: str) -> Manifest:
    """The classes and splits of shards.

    Tars made elsewhere are searched for their images once; they may be without the split train.

    Args:
        root: the folder of the tars, a path or a URL.

    Raises:
        UserError: they cannot be read, or do not belong together; the message names the file.
    """
    filesystem, path = connect(root)
    try:
        data = filesystem.cat_file(join(path, INDEX))
    except FileNotFoundError:
        data = None
    except Exception as error:  # every filesystem has its own
        raise UserError(f"cannot read {join(root, INDEX)}: {why(error)}") from error
    kept = None if data is None else load_index(data, root, join(root, INDEX))
    if kept is None or kept.key:
        from vitlit.data import webdataset  # it imports this module

        return webdataset.find(filesystem, path, root, kept)
    for shard, size in zip(kept.shards, kept.sizes.tolist(), strict=True) if "://" not in root else ():
        place = Path(root) / shard
        if (there := place.stat().st_size if place.is_file() else "no") != size:
            raise UserError(f"{place} has {there} bytes, {size} by {INDEX}: put shards and {INDEX} of one making there")
    return kept.found


def save_index(file: Path, kept: Kept) -> None:
    """Write index.npz, whole or not at all."""
    arrays: dict[str, Any] = {"sizes": kept.sizes, "key": np.frombuffer(kept.key, np.uint8)}
    packed = {"classes": Names.pack(kept.found.classes), "shards": Names.pack(kept.shards)}
    for split, index in kept.found.splits.items():
        assert isinstance(index.files, ShardFiles)
        packed[f"{split}_names"] = index.files.names
        arrays |= {f"{split}_parts": index.files.parts, f"{split}_labels": index.labels}
        arrays |= {} if index.groups is None else {f"{split}_groups": index.groups}
    for name, names in packed.items():
        arrays |= {name: names.packed, f"{name}_ends": names.ends}
    save_arrays(file, arrays)


def load_index(data: bytes, root: str, place: str) -> Kept:
    """Read what `save_index` wrote.

    Args:
        data: the file's content.
        root: the folder of the shards.
        place: of the file, for the error.

    Raises:
        UserError: it is damaged.
    """
    try:
        return _parse(load_arrays(io.BytesIO(data)), root)
    except Exception as error:  # arrays of other shapes and types raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{place} is damaged, or no index of shards ({reason}): copy it again, or remove it so that the tars are "
            "searched anew, in an order of their own"
        ) from error


def _parse(known: dict[str, np.ndarray], root: str) -> Kept:
    def names_of(what: str) -> Names:
        return Names.check(known[what], known[f"{what}_ends"])

    classes, shards = ([names.text(row) for row in range(len(names))] for names in map(names_of, ("classes", "shards")))
    sizes = known["sizes"]
    sound = [sizes.dtype == np.int64, sizes.shape == (len(shards),), (sizes >= 0).all()]
    sound += [not name.startswith("/") and ".." not in name.split("/") for name in shards]
    splits = {}
    for split in [split for split in SPLITS if f"{split}_parts" in known]:
        parts, labels, names = known[f"{split}_parts"], known[f"{split}_labels"], names_of(f"{split}_names")
        groups = known.get(f"{split}_groups")
        shard, start, size, _ = parts.T
        sound += [len(parts) == len(names) == len(labels) > 0, parts.dtype == np.int64]
        sound += [(shard >= 0).all(), (start >= BLOCK).all(), (size >= 0).all(), (size <= sizes[shard] - start).all()]
        if labels.dtype == bool:
            sound += [labels.shape[1:] == (len(classes),)]
        else:
            sound += [labels.dtype == np.int64, labels.ndim == 1, (labels >= 0).all(), (labels < len(classes)).all()]
        sound += [groups is None or (groups.dtype == np.int64 and groups.shape == (len(parts),))]
        splits[split] = Index(ShardFiles(root, tuple(shards), parts, names), np.arange(len(parts)), labels, groups)
    if not splits or not all(sound):
        raise ValueError("its arrays do not fit together")
    several = any(index.labels.ndim == 2 for index in splits.values())
    return Kept(Manifest(classes, splits, several), tuple(shards), sizes, known["key"].tobytes())
