"""WebDataset sets made elsewhere, without index.npz: their tars are searched for images once, by the headers."""

import hashlib
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from vitlit.data.folder import EXTENSIONS
from vitlit.data.index import Index, Names
from vitlit.data.manifest import SPLITS, Manifest
from vitlit.data.progress import Progress
from vitlit.data.shards import BLOCK, CLASSES, INDEX, Kept, ShardFiles, join, load_index, save_index, why
from vitlit.errors import UserError

SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "test": "test"}
LABEL_BYTES = 1 << 20  # of the largest .cls or .json


def find(filesystem: Any, path: str, root: str, beside: Kept | None) -> Manifest:
    """What tars made elsewhere hold: as it is kept, or found now and kept, beside them or in the user's cache.

    Args:
        filesystem: of fsspec, and `path` of the folder in it, whose `root` is the user's.
        beside: what index.npz beside the tars holds.

    Raises:
        UserError: they cannot be read, or an image has no label that can be.
    """
    tars, classes, key = _list(filesystem, path, root)
    local = "://" not in root
    place = os.path.abspath(root) if local else root
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vitlit"
    cached = cache / f"{hashlib.sha256(place.encode(errors='surrogateescape')).hexdigest()[:16]}.npz"
    places = (Path(root) / INDEX, cached) if local else (cached,)

    def fresh(kept: Kept) -> bool:
        # The times of local files follow the rest: what is copied to a server has its own.
        return kept.key == key if local else kept.key.startswith(key.partition(b"\0")[0] + b"\0")

    def load() -> Kept | None:
        indices = (load_index(file.read_bytes(), root, str(file)) for file in places if file.is_file())
        return next(filter(fresh, indices), None)

    kept = beside if beside and fresh(beside) else load()
    if kept is None:
        with _alone(cached.with_suffix(".lock"), root):
            kept = load()  # by a process that was waited for
            if kept is None:
                kept = _search(filesystem, path, root, tars, classes)._replace(key=key)
                for file in places:  # at the first that can be written
                    with suppress(OSError):
                        file.parent.mkdir(parents=True, exist_ok=True)
                        save_index(file, kept)
                        break
    return kept.found


def _alone(lock: Path, root: str) -> AbstractContextManager[object]:
    """What lets one process of this machine at a time into its block: of a launch's ranks one searches, the rest wait.

    Where a file cannot be locked, on Windows or where no cache can be kept either, each searches for itself.
    """
    try:
        import fcntl

        lock.parent.mkdir(parents=True, exist_ok=True)
        held = lock.open("w")
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            rank_zero_only(print)(f"{root}: waiting for another process, which is indexing it", flush=True)
            fcntl.flock(held, fcntl.LOCK_EX)
    except (ImportError, OSError):
        return nullcontext()
    return held


def _list(filesystem: Any, path: str, root: str) -> tuple[dict[str, str], list[str] | None, bytes]:
    """Of a folder of tars made elsewhere: their names and splits, the classes where a file names them, and a key."""

    def below(folder: str) -> dict[str, Any]:
        return {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in filesystem.ls(folder, detail=True)}

    try:
        top = below(path)
        found = {name: entry for name, entry in top.items() if name.endswith(".tar")}
        for folder in SPLIT_NAMES:
            if folder in top and top[folder]["type"] != "file":
                inner = below(top[folder]["name"])
                found |= {f"{folder}/{name}": entry for name, entry in inner.items() if name.endswith(".tar")}
        sizes = [entry.get("size") for entry in found.values()]
        if None in sizes:  # a listing over HTTP has none
            sizes = filesystem.sizes([entry["name"] for entry in found.values()])
        texts = [os.fsdecode(filesystem.cat_file(top[name]["name"])) for name in CLASSES if name in top]
    except Exception as error:  # every filesystem has its own
        raise UserError(
            f"{root} has no {INDEX}, and cannot be searched for tars ({why(error)}); give the folder or URL of shards"
        ) from error
    if not found:
        raise UserError(f"{root} holds neither {INDEX} nor *.tar, nor does its folder train; give a folder of shards")
    lines = sorted(f"{name} {size}" for name, size in zip(found, sizes, strict=True))
    times = sorted(f"{name} {entry.get('mtime')}" for name, entry in found.items())
    key = "\n".join([*lines, *texts]) + "\0" + "\n".join(times)
    classes = texts[0].splitlines() if texts else None
    return _split_tars(sorted(found), root), classes, key.encode(errors="surrogateescape")


def _split_tars(names: list[str], root: str) -> dict[str, str]:
    """The split of each tar, by its folder or a word in its name; train where no name has such a word."""
    matches = {name: re.search(r"(?<![a-z])(train|validation|val|test)(?![a-z])", name.lower()) for name in names}
    if not any(matches.values()):
        return dict.fromkeys(names, "train")
    for name, match in matches.items():
        if match is None:
            raise UserError(f"{join(root, name)} is of no split: its name has none of the words train, val and test")
    return {name: SPLIT_NAMES[match[1]] for name, match in matches.items() if match}


class _Sample(NamedTuple):
    """An image in a tar: its name, its part as `ShardFiles` has it, its labels and where they are from."""

    name: str
    part: tuple[int, int, int, int]
    labels: tuple[str, ...]
    kind: str


def _search(filesystem: Any, path: str, root: str, tars: dict[str, str], named: list[str] | None) -> Kept:
    """Find the images in tars made elsewhere, by their headers, and print how many there are.

    Args:
        filesystem: of fsspec, and `path` of the folder in it, whose `root` is the user's.
        tars: their names and splits.
        named: the classes by their numbers, where a file names them.

    Raises:
        UserError: a tar cannot be read, or an image has no label that can be.
    """
    tell = Progress()
    samples: dict[str, list[_Sample]] = {split: [] for split in SPLITS if split in tars.values()}
    shards, sizes = tuple(tars), []
    for number, (shard, split) in enumerate(tars.items()):
        try:
            with filesystem.open(join(path, shard), "rb") as opened:
                sizes.append(opened.seek(0, os.SEEK_END))
                samples[split] += _walk(opened, sizes[-1], number)
        except Exception as error:  # every filesystem has its own, and tarfile for what is no tar
            raise UserError(f"{join(root, shard)} cannot be indexed: {why(error)}") from error
        tell(f"{root}: {number + 1:,} of {len(shards):,} shards indexed")
    classes, labels = _number(root, samples, named)
    splits = {}
    for split, own in samples.items():
        names = Names.pack(sample.name for sample in own)
        parts = np.array([sample.part for sample in own], np.int64)
        splits[split] = Index(ShardFiles(root, shards, parts, names), np.arange(len(own)), labels[split])
    total = ", ".join(f"{len(index):,} of {split}" for split, index in splits.items())
    print(f"{root}: indexed {len(shards):,} shards, images: {total}, in {len(classes):,} classes")
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
    digits = all(re.fullmatch(r"-?\d{1,18}", value) for sample in everything for value in sample.labels)
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
