"""index.npz, the index of shards: where each image lies in the tars, and its labels."""

import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vitlit.data.index import FolderFiles, Index, Names, StorageUserError
from vitlit.data.manifest import SPLITS, Manifest
from vitlit.data.storage import join, read_range
from vitlit.errors import UserError
from vitlit.files import load_arrays, save_arrays

INDEX = "index.npz"
BLOCK = 512  # bytes of a file's header in a tar


@dataclass(frozen=True)
class ShardFiles(FolderFiles):
    """Image files within tars; `parts`, int64 (N, 4), are the shard's number, first byte, size and the header's CRC-32.

    The header is read with the file, so that a replaced shard is noticed.
    """

    shards: tuple[str, ...]
    parts: np.ndarray

    def path(self, row: int) -> str:
        return f"{self.shards[self.parts[row, 0]]}/{self.names.text(row)}"

    def read(self, row: int) -> bytes:
        shard, start, size, checksum = self.parts[row].tolist()
        data = read_range(self.root, self.shards[shard], start - BLOCK, start + size)
        if zlib.crc32(data[:BLOCK]) != checksum:
            wrong = f"{join(self.root, self.shards[shard])} does not belong to {INDEX}: {self.path(row)} is elsewhere"
            raise StorageUserError(f"{wrong}; both must be of the same `vitlit data shard`")
        return data[BLOCK:]

    def stamp(self, rows: np.ndarray) -> bytes:
        return repr([self.root, self.shards]).encode() + self.parts.tobytes()  # which have checksums


class ShardIndex(NamedTuple):
    """Content of index.npz; sizes in bytes. `key` is that of `list_tars`, or empty for `vitlit data shard`'s."""

    manifest: Manifest
    shards: tuple[str, ...]
    sizes: np.ndarray
    key: bytes = b""


def save_index(file: Path, index: ShardIndex) -> None:
    arrays: dict[str, Any] = {"sizes": index.sizes, "key": np.frombuffer(index.key, np.uint8)}
    names = {"classes": Names.pack(index.manifest.classes), "shards": Names.pack(index.shards)}
    for split, images in index.manifest.splits.items():
        assert isinstance(images.files, ShardFiles)
        names[f"{split}_names"] = images.files.names
        arrays |= {f"{split}_parts": images.files.parts, f"{split}_labels": images.labels}
        if images.groups is not None:
            arrays[f"{split}_groups"] = images.groups
    for name, packed in names.items():
        arrays |= {name: packed.packed, f"{name}_ends": packed.ends}
    save_arrays(file, arrays)


def load_index(data: bytes, root: str, place: str) -> ShardIndex:
    """Read the content of an index.npz for the shards in a folder; UserError if the file at `place` is damaged."""
    try:
        arrays = load_arrays(io.BytesIO(data))
        classes, shards = (
            [name.decode(errors="surrogateescape") for name in Names(arrays[key], arrays[f"{key}_ends"])]
            for key in ("classes", "shards")
        )
        splits = {}
        for split in SPLITS:
            if f"{split}_parts" in arrays:
                names = Names(arrays[f"{split}_names"], arrays[f"{split}_names_ends"])
                files = ShardFiles(root, names, tuple(shards), arrays[f"{split}_parts"])
                labels, groups = arrays[f"{split}_labels"], arrays.get(f"{split}_groups")
                splits[split] = Index(files, np.arange(len(labels)), labels, groups)
        several = any(index.labels.ndim == 2 for index in splits.values())
        return ShardIndex(Manifest(classes, splits, several), tuple(shards), arrays["sizes"], arrays["key"].tobytes())
    except (ValueError, KeyError) as error:
        raise UserError(f"{place} is damaged, or no index of shards ({error}): copy or make it again") from error
