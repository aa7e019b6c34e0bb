"""The images of a split, in arrays that forked workers share: a list of paths would be copied, page by page."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitlit.errors import UserError
from vitlit.files import read_file

EXTENSIONS: tuple[str, ...] = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".gif", ".bmp")
EXTENSIONS += (".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".jp2", ".j2k", ".jpx", ".npy")
ENDINGS = tuple(extension.encode() for extension in EXTENSIONS)  # of paths as bytes


class StorageUserError(UserError):
    """An image cannot be fetched, but may be good. The name ends in "UserError": worker errors arrive as text."""


@dataclass(frozen=True)
class Names:
    """Byte strings as one array: name i is bytes ends[i - 1] to ends[i]."""

    packed: np.ndarray
    ends: np.ndarray

    @classmethod
    def pack(cls, names: Iterable[str | bytes]) -> "Names":
        encoded = [name.encode(errors="surrogateescape") if isinstance(name, str) else name for name in names]
        ends = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)), dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[bytes]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> bytes:
        return self.packed[self.ends[row - 1] if row else 0 : self.ends[row]].tobytes()

    def text(self, row: int) -> str:
        return self[row].decode(errors="surrogateescape")


@dataclass(frozen=True)
class FolderFiles:
    root: str
    names: Names

    def path(self, row: int) -> str:
        return os.path.join(self.root, self.names.text(row))

    def read(self, row: int) -> bytes:
        """UserError if the image is bad, StorageUserError if its storage is."""
        return read_file(self.path(row))

    def stamp(self, rows: np.ndarray) -> bytes:
        """What changes if the content of one of these files does: sizes and times."""
        status = ((path := self.path(row), os.stat(path)) for row in rows.tolist())
        return repr([(path, each.st_size, each.st_mtime_ns) for path, each in status]).encode()


@dataclass(frozen=True)
class Index:
    """Images of one split: their `rows` in `files`.

    `labels` are class numbers, int64 (N,), -1 for none; bool (N, classes) if an image may have several; or numbers,
    float64 (N,). A holdout keeps images of equal `groups`, int64 (N,) if any, together.
    """

    files: FolderFiles
    rows: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None = None

    @classmethod
    def of(
        cls, root: str | Path, names: Iterable[str | bytes], labels: np.ndarray, groups: np.ndarray | None = None
    ) -> "Index":
        packed = Names.pack(names)
        return cls(FolderFiles(os.fspath(root), packed), np.arange(len(packed)), labels, groups)

    def __len__(self) -> int:
        return len(self.rows)

    def names(self) -> list[bytes]:
        return [self.files.names[row] for row in self.rows.tolist()]

    def digest(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for part in (self.files.names.packed, self.files.names.ends, self.rows, self.labels):
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()

    def path(self, index: int) -> str:
        return self.files.path(int(self.rows[index]))

    def read(self, index: int) -> bytes:
        return self.files.read(int(self.rows[index]))

    def label_text(self, index: int, classes: list[str]) -> str:
        """An image's classes, or its number, in words: cat, cat|outdoors, 0.5, or nothing."""
        labels = self.labels[index]
        if self.labels.dtype.kind == "f":
            return f"{labels:g}"
        numbers = labels.nonzero()[0] if labels.ndim else [labels] if labels >= 0 else []
        return "|".join(classes[int(number)] for number in numbers)

    def take(self, indices: np.ndarray) -> "Index":
        groups = None if self.groups is None else self.groups[indices]
        return Index(self.files, self.rows[indices], self.labels[indices], groups)


def label_array(rows: Sequence[Sequence[int]], classes: int, several: bool) -> np.ndarray:
    """`Index.labels` of images with these class numbers, one each unless `several`."""
    if not several:
        return np.array(rows, np.int64)[:, 0]
    labels = np.zeros((len(rows), classes), bool)
    for row, numbers in enumerate(rows):
        labels[row, numbers] = True
    return labels
