"""How shards are made, `vitlit data shard ROOT OUT`, and how the images in tars made elsewhere are found."""

import io
import json
import os
import re
import shutil
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from vitlit.data.decode import decode_bytes
from vitlit.data.folder import EXTENSIONS, scan_classes, scan_split, train_folder
from vitlit.data.index import Index, Names
from vitlit.data.manifest import SPLITS, Manifest, read_manifest
from vitlit.data.shards import BLOCK, CLASSES, INDEX, Kept, ShardFiles, join, save_index, why
from vitlit.data.stream import mix
from vitlit.data.workers import count
from vitlit.errors import CommandParser, UserError

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
SECONDS = 10.0  # between two lines of progress
END = bytes(2 * BLOCK)  # of a tar
LABEL_BYTES = 1 << 20  # of the largest .cls or .json


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
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: name another folder, or remove it first")
    partial = out.resolve().with_name(f"{out.resolve().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        shards: list[str] = []
        parts = {}
        for split, index in found.splits.items():
            with closing(_Tars(partial, split, shard_size, shards)) as tars:
                parts[split] = _write_split(tars, index, shrink)
        sizes = np.array([(partial / shard).stat().st_size for shard in shards], np.int64)
        splits = {}
        for split, index in found.splits.items():
            files = ShardFiles(str(out), tuple(shards), parts[split], Names.pack(index.names()))
            splits[split] = Index(files, np.arange(len(index)), index.labels, index.groups)
        save_index(partial / INDEX, Kept(found._replace(splits=splits), tuple(shards), sizes))
        (partial / CLASSES[0]).write_bytes(b"".join(os.fsencode(name) + b"\n" for name in found.classes))
        partial.rename(out.resolve())
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}): mend that, or name another") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
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
    last = time.monotonic()
    for done, (row, image, ending) in enumerate(_contents(index, shrink)):
        header, content = _entry(keys[row] + ending, image)
        numbers = np.flatnonzero(index.labels[row]).tolist() if index.labels.ndim == 2 else None
        text, kind = (str(index.labels[row]), ".cls") if numbers is None else (json.dumps({"label": numbers}), ".json")
        start = tars.add(header + content + b"".join(_entry(keys[row] + kind, text.encode())))
        parts[row] = len(tars.shards) - 1, start + len(header), len(image), zlib.crc32(header[-BLOCK:])
        if time.monotonic() - last >= SECONDS:
            last = time.monotonic()
            print(f"{tars.split}: {done + 1:,} of {len(index):,} images", flush=True)
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


class _Sample(NamedTuple):
    """An image in a tar: its name, its part as `ShardFiles` has it, its labels and where they are from."""

    name: str
    part: tuple[int, int, int, int]
    labels: tuple[str, ...]
    kind: str


def search(filesystem: Any, path: str, root: str, tars: dict[str, str], named: list[str] | None) -> Kept:
    """Find the images in tars made elsewhere, by their headers, and print how many there are.

    Args:
        filesystem: of fsspec, and `path` of the folder in it, whose `root` is the user's.
        tars: their names and splits.
        named: the classes by their numbers, where a file names them.

    Raises:
        UserError: a tar cannot be read, or an image has no label that can be.
    """
    from lightning.pytorch.utilities import rank_zero_only

    say, last = rank_zero_only(print), time.monotonic()
    samples: dict[str, list[_Sample]] = {split: [] for split in SPLITS if split in tars.values()}
    shards, sizes = tuple(tars), []
    for number, (shard, split) in enumerate(tars.items()):
        try:
            with filesystem.open(join(path, shard), "rb") as opened:
                sizes.append(opened.seek(0, os.SEEK_END))
                samples[split] += _walk(opened, sizes[-1], number)
        except Exception as error:  # every filesystem has its own, and tarfile for what is no tar
            raise UserError(f"{join(root, shard)} cannot be indexed: {why(error)}") from error
        if time.monotonic() - last >= SECONDS:
            last = time.monotonic()
            say(f"{root}: {number + 1:,} of {len(shards):,} shards indexed", flush=True)
    classes, labels = _number(root, samples, named)
    splits = {}
    for split, own in samples.items():
        names = Names.pack([sample.name.encode(errors="surrogateescape") for sample in own])
        parts = np.array([sample.part for sample in own], np.int64)
        splits[split] = Index(ShardFiles(root, shards, parts, names), np.arange(len(own)), labels[split])
    total = ", ".join(f"{len(index):,} of {split}" for split, index in splits.items())
    say(f"{root}: indexed {len(shards):,} shards, images: {total}, in {len(classes):,} classes")
    several = any(index.labels.ndim == 2 for index in splits.values())
    return Kept(Manifest(classes, splits, several), shards, np.array(sizes, np.int64))


def _walk(opened: IO[bytes], size: int, number: int) -> list[_Sample]:
    """The images of a tar, found by its headers.

    Raises:
        ValueError: the tar is damaged, or an image has no label.
    """
    images: dict[str, tuple[str, tuple[int, int, int, int]]] = {}
    dotted: dict[str, str] = {}
    labels: dict[str, tuple[tuple[str, ...], str]] = {}
    opened.seek(0)
    with tarfile.open(fileobj=opened, mode="r:") as archive:
        for member in archive:
            start = member.offset_data
            if not 0 <= member.size <= size - start:
                raise ValueError(f"{member.name} reaches beyond its end")
            match = re.match(r"((?:.*/)?[^./][^./]*)[.]([^/]*)$", member.name)  # webdataset's key and what follows it
            if match is None or not member.isreg() or member.issparse():
                continue
            key, ending = match[1], match[2].lower()
            if f".{ending}" in EXTENSIONS:
                if key in images:
                    raise ValueError(f"{member.name} and {images[key][0]} are two images of one sample")
                opened.seek(start - BLOCK)
                images[key] = member.name, (number, start, member.size, zlib.crc32(opened.read(BLOCK)))
            elif ending.endswith(EXTENSIONS):
                dotted[key] = member.name
            elif ending in ("cls", "json") and member.size <= LABEL_BYTES:
                opened.seek(start)
                label = _read_label(opened.read(member.size).decode(), ending, member.name)
                if label and (ending == "cls" or key not in labels):
                    labels[key] = label
        opened.seek(archive.offset)
        if opened.read(BLOCK).strip(b"\0"):  # tarfile takes a header that it cannot read for the end
            raise ValueError(f"it is damaged at byte {archive.offset}")
    if lost := dotted.keys() - images.keys():
        raise ValueError(f"{dotted[min(lost)]} has a dot before its ending, where webdataset ends the name of a sample")
    for key, (name, _) in images.items():
        if key not in labels:
            folder = key.rpartition("/")[0].rpartition("/")[2]
            if folder in ("", "."):
                raise ValueError(f'{name} has no label: neither KEY.cls, nor "label" in KEY.json, nor a class folder')
            labels[key] = (folder,), "folder"
    return [_Sample(name, part, *labels[key]) for key, (name, part) in images.items()]


def _read_label(text: str, ending: str, name: str) -> tuple[tuple[str, ...], str] | None:
    """The label in a KEY.cls or KEY.json, None where there is none, and its kind."""
    if ending == "cls":
        return ((text.strip(),), "one") if text.strip() else None
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is no JSON") from error
    label = content.get("label", content.get("cls")) if isinstance(content, dict) else None
    if label is None:
        return None
    values = label if isinstance(label, list) else [label]
    if not all(type(value) in (int, str) for value in values):
        raise ValueError(f"{name} has the label {label!r}, which is no number or name of a class")
    return tuple(map(str, values)), "several" if isinstance(label, list) else "one"


def _number(root: str, samples: dict[str, list[_Sample]], named: list[str] | None) -> tuple[list[str], dict[str, Any]]:
    """The classes, and the labels of each split by their numbers."""
    for split, own in samples.items():
        if not own:
            raise UserError(f"{root}: the tars of {split} hold no image (known: {' '.join(EXTENSIONS)})")
    everything = [sample for own in samples.values() for sample in own]
    several, folders = (any(sample.kind == kind for sample in everything) for kind in ("several", "folder"))
    digits = all(re.fullmatch(r"-?\d+", value) for sample in everything for value in sample.labels)
    numeric = digits and not folders  # a folder's classes are sorted as text
    read: Callable[[str], Any] = int if numeric else str
    known = sorted({read(value) for sample in samples.get("train", everything) for value in sample.labels})
    if named is not None:
        known = list(range(len(named))) if numeric else named
    number = {label: place for place, label in enumerate(known)}
    labels = {}
    for split, own in samples.items():
        rows = [[number.get(read(value), -1) for value in sample.labels] for sample in own]
        for sample, row in zip(own, rows, strict=True):
            if -1 in row:
                where = CLASSES[0] if named else "the training images"
                raise UserError(f"{root}: {sample.name} has the label {', '.join(sample.labels)}, not found in {where}")
        labels[split] = np.zeros((len(own), len(known)), bool) if several else np.array(rows, np.int64)[:, 0]
        for place, row in enumerate(rows if several else ()):
            labels[split][place, row] = True
    return list(map(str, named or known)), labels
