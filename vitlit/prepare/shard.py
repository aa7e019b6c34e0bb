"""How shards are made: `vitlit data shard ROOT OUT`."""

import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from vitlit.data.folder import scan_classes, scan_split, train_folder
from vitlit.data.index import Index, Names
from vitlit.data.manifest import SPLITS, Manifest, read_manifest
from vitlit.data.progress import Progress
from vitlit.data.shard_index import BLOCK, INDEX, ShardFiles, ShardIndex, save_index
from vitlit.data.webdataset import CLASSES
from vitlit.data.workers import count
from vitlit.errors import CommandParser, UserError
from vitlit.files import whole_folder
from vitlit.images.decode import decode_bytes
from vitlit.seeds import mix

HELP = """\
Write images as OUT/train-000000.tar, OUT/val-000000.tar and so on: shards that webdataset reads, too. With --data.root
OUT, or its URL where it is copied to, a run sees the images in the order in which it would see the folder's.

ROOT is a folder train/CLASS/*, and val and test alike; or CLASS/*; or that of a --manifest's paths. What a run holds
out of train it says itself, with --data.holdout, and it is the same of shards as of the folder.

Files keep their bytes, unless --short_side makes smaller ones. What that changes in a crop of 224 pixels, measured on
photographs at quality 90 as the mean absolute difference, of 255 levels:
  1.4 with --short_side 400, 2.1 with 320, 2.8 and a visible blur with 256
"""
CHUNK = 64  # images read ahead of what is written
END = bytes(2 * BLOCK)  # of a tar


def run(arguments: list[str]) -> int:
    """`vitlit data shard ROOT OUT [options]`; returns the exit code."""
    parser = CommandParser("vitlit data shard", HELP)
    parser.add_argument("root", metavar="ROOT", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to make")
    parser.add_argument("--shard_size", type=int, default=256, metavar="MB", help="the most of a tar: 256 unless given")
    parser.add_argument("--short_side", type=int, metavar="N", help="resize larger images to this shorter side, pixels")
    parser.add_argument("--quality", type=int, default=90, metavar="Q", help="of their JPEGs: 90 unless given")
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="a CSV file of paths and labels")
    given = parser.parse_args(arguments or ["--help"])
    shrink = None if given.short_side is None else (given.short_side, given.quality)
    found = _splits(given.root, given.manifest)
    write(found, given.out, given.shard_size * 1_000_000, shrink)
    return 0


def _splits(root: Path, manifest: Path | None) -> Manifest:
    """The images to write, by split: of a manifest, or of ROOT/{train,val,test}/CLASS/*, or all of ROOT/CLASS/*."""
    if manifest:
        return read_manifest(manifest, root)
    folder = train_folder(root, holdout=1.0)  # which may be the root itself: what is held out of it, a run says
    classes, train = scan_classes(folder)
    if not classes:
        raise UserError(f"{folder} holds no class folders, but shards are of images with labels; train on the folder")
    splits = {"train": train}
    for split in SPLITS[1:] if folder != root else ():
        if (root / split).is_dir():
            splits[split] = scan_split(root / split, classes)
    return Manifest(classes, splits, False)


def write(found: Manifest, out: Path, shard_size: int, shrink: tuple[int, int] | None = None) -> None:
    """Write shards, and print one line for each split.

    The images lie shuffled, so that whoever reads them one after another gets mixed classes. A sample is an image and
    its KEY.cls, the class number as text, or KEY.json, {"label": [numbers]}, where images may have several classes.
    Everything is made in `OUT.partial`, which takes its name once it is complete.

    Args:
        found: the images by split.
        out: the folder to make; where it exists it must be empty.
        shard_size: bytes, the most of a tar, unless a single image is more.
        shrink: (pixels of the shorter side to which larger images are resized, quality of their JPEG); None to copy
            all files byte for byte.

    Raises:
        UserError: an image cannot be read, or `out` is not empty or cannot be written.
    """
    if shard_size < 1 or (shrink and (shrink[0] < 1 or not 1 <= shrink[1] <= 100)):
        raise UserError("--shard_size and --short_side must be at least 1, and --quality from 1 to 100")
    shards: list[str] = []
    parts = {}
    try:
        with whole_folder(out) as partial:
            for split, index in found.splits.items():
                with closing(_Tars(partial, split, shard_size, shards)) as tars:
                    parts[split] = _write_split(tars, index, shrink)
            sizes = np.array([(partial / shard).stat().st_size for shard in shards], np.int64)
            splits = {}
            for split, index in found.splits.items():
                files = ShardFiles(str(out), Names.pack(index.names()), tuple(shards), parts[split])
                splits[split] = Index(files, np.arange(len(index)), index.labels, index.groups)
            save_index(partial / INDEX, ShardIndex(found._replace(splits=splits), tuple(shards), sizes))
            (partial / CLASSES[0]).write_bytes(b"".join(os.fsencode(name) + b"\n" for name in found.classes))
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}): mend that, or name another") from error
    for split, part in parts.items():
        print(f"{out}: {split}, {len(part):,} images in {len(np.unique(part[:, 0])):,} shards")


class _Tars:
    """Tars of a split, one after another, each as large as allowed."""

    def __init__(self, folder: Path, split: str, limit: int, shards: list[str]) -> None:
        self.folder, self.split, self.limit, self.shards = folder, split, limit, shards
        self.first = len(shards)
        self.file: IO[bytes] | None = None

    def add(self, entries: bytes) -> int:
        """Write the entries of a sample; returns where in the last shard they begin."""
        if self.file is None or self.file.tell() + len(entries) + len(END) > self.limit:
            self.close()
            self.shards.append(f"{self.split}-{len(self.shards) - self.first:06d}.tar")
            self.file = (self.folder / self.shards[-1]).open("xb")
        start = self.file.tell()
        self.file.write(entries)
        return start

    def close(self) -> None:
        if self.file is not None:
            with self.file as file:
                file.write(END)
            self.file = None


def _write_split(tars: _Tars, index: Index, shrink: tuple[int, int] | None) -> np.ndarray:
    """Write the images of a split; returns their parts, as `ShardFiles` has them."""
    parts, keys = np.empty((len(index), 4), np.int64), _keys(index.names())
    tell = Progress()
    for done, (row, image, ending) in enumerate(_contents(index, shrink)):
        header, content = _entry(keys[row] + ending, image)
        numbers = np.flatnonzero(index.labels[row]).tolist() if index.labels.ndim == 2 else None
        text, kind = (str(index.labels[row]), ".cls") if numbers is None else (json.dumps({"label": numbers}), ".json")
        start = tars.add(header + content + b"".join(_entry(keys[row] + kind, text.encode())))
        parts[row] = len(tars.shards) - 1, start + len(header), len(image), zlib.crc32(header[-BLOCK:])
        tell(f"{tars.split}: {done + 1:,} of {len(index):,} images")
    return parts


def _keys(names: list[bytes]) -> list[str]:
    """Names without their endings as webdataset's keys, which end at the first dot and must be unique."""
    keys, taken = [], set()
    for name in names:
        *folders, base = [part for part in os.fsdecode(name).split("/") if part not in ("", ".", "..")]
        key = "/".join([*folders, os.path.splitext(base)[0].replace(".", "_")])
        while key in taken:
            key += "_"
        taken.add(key)
        keys.append(key)
    return keys


def _contents(index: Index, shrink: tuple[int, int] | None) -> Iterator[tuple[int, bytes, str]]:
    """Of each image, shuffled: its place in the index, the file's content, and the ending of its name."""

    def load(row: int) -> tuple[int, bytes, str]:
        data, path = index.read(row), index.path(row)
        smaller = shrink and _shrink(data, path, *shrink)
        return (row, smaller, ".jpg") if smaller else (row, data, os.path.splitext(path)[1].lower() or ".jpg")

    order = np.argsort(mix(np.arange(len(index))), kind="stable")
    with ThreadPoolExecutor(count(1)) as pool:
        for start in range(0, len(order), CHUNK):
            yield from pool.map(load, order[start : start + CHUNK].tolist())


def _shrink(data: bytes, path: str, side: int, quality: int) -> bytes | None:
    """An image as JPEG with that shorter side; None where it is not larger."""
    image = decode_bytes(data, path)
    height, width = image.shape[1:]
    shorter = min(height, width)
    if shorter <= side:
        return None
    size = (round(width * side / shorter), round(height * side / shorter))
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _entry(name: str, content: bytes) -> tuple[bytes, bytes]:
    """A file's header and content as they are in a tar."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"), content + bytes(-len(content) % BLOCK)
