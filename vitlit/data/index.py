"""Which images a split has, in arrays that forked workers share: a list of paths would be copied, page by page."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from vitlit.errors import UserError
from vitlit.files import read_file


class StorageUserError(UserError):
    """An image could not be fetched, which says nothing of the image: no other may come in its place.

    "UserError" ends the name since what a data worker raises arrives as text.
    """


@dataclass(frozen=True)
class Names:
    """Byte strings as one array: name i is bytes ends[i - 1] to ends[i]."""

    packed: np.ndarray
    ends: np.ndarray

    @classmethod
    def pack(cls, names: Iterable[str | bytes]) -> "Names":
        """Of any strings; text is encoded as in paths."""
        packed = [name.encode(errors="surrogateescape") if isinstance(name, str) else name for name in names]
        ends = np.cumsum(np.fromiter(map(len, packed), np.int64, len(packed)), dtype=np.int64)
        return cls(np.frombuffer(b"".join(packed), np.uint8), ends)

    @classmethod
    def check(cls, packed: np.ndarray, ends: np.ndarray) -> "Names":
        """Of arrays from a file; ValueError where they hold no names."""
        typed = packed.dtype == np.uint8 and packed.ndim == ends.ndim == 1 and ends.dtype == np.int64
        if not typed or (np.diff(ends, prepend=0) < 0).any() or ends[-1:].sum() != len(packed):
            raise ValueError("its names are wrong")
        return cls(packed, ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> bytes:
        if not 0 <= row < len(self.ends):
            raise IndexError(row)
        return self.packed[self.ends[row - 1] if row else 0 : self.ends[row]].tobytes()

    def text(self, row: int) -> str:
        """A name as text."""
        return self[row].decode(errors="surrogateescape")


class Files(Protocol):
    """Where the bytes of images are: files of a folder, or parts of shards."""

    @property
    def names(self) -> Names:
        """Of all images, within their split. By its name an image is drawn for the holdout."""

    def path(self, row: int) -> str:
        """Of an image, for people."""

    def read(self, row: int) -> bytes:
        """The content of an image file; UserError where it cannot be read, StorageUserError where none may be."""


@dataclass(frozen=True)
class FolderFiles:
    """Files at paths relative to a folder."""

    root: str
    names: Names

    def path(self, row: int) -> str:
        return os.path.join(self.root, self.names.text(row))

    def read(self, row: int) -> bytes:
        return read_file(self.path(row))


@dataclass(frozen=True)
class Index:
    """Images of one split.

    Attributes:
        files: where they are.
        rows: which of them, int64 (N,).
        labels: class numbers, int64 (N,), -1 where there is none; or bool (N, classes) where an image may have several.
        groups: int64 (N,), equal for images that must not be parted by a holdout; None where each may go by itself.
    """

    files: Files
    rows: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None = None

    @classmethod
    def of(
        cls, root: str | Path, names: Iterable[str | bytes], labels: np.ndarray, groups: np.ndarray | None = None
    ) -> "Index":
        """Of files at paths relative to root."""
        packed = Names.pack(names)
        return cls(FolderFiles(os.fspath(root), packed), np.arange(len(packed)), labels, groups)

    def __len__(self) -> int:
        return len(self.rows)

    def names(self) -> list[bytes]:
        """The images' names within their split."""
        return [self.files.names[row] for row in self.rows.tolist()]

    def digest(self) -> str:
        """Of the images' names and labels, in order: two indices of one digest have the same."""
        digest = hashlib.blake2b(digest_size=8)
        for part in (self.files.names.packed, self.files.names.ends, self.rows, self.labels):
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()

    def path(self, index: int) -> str:
        """The path of an image, for people."""
        return self.files.path(int(self.rows[index]))

    def read(self, index: int) -> bytes:
        """The content of an image file.

        Raises:
            UserError: it cannot be read.
        """
        return self.files.read(int(self.rows[index]))

    def take(self, indices: np.ndarray) -> "Index":
        """The images at these positions."""
        groups = None if self.groups is None else self.groups[indices]
        return Index(self.files, self.rows[indices], self.labels[indices], groups)
