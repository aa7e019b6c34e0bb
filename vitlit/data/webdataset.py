"""WebDataset sets without index.npz: the tars are searched for images by their headers."""

import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import numpy as np

from vitlit.data.index import EXTENSIONS, Index, Names, label_array
from vitlit.data.manifest import SPLITS, Manifest
from vitlit.data.progress import Progress
from vitlit.data.shard_index import BLOCK, INDEX, ShardFiles, ShardIndex
from vitlit.data.storage import Folder, join, reason
from vitlit.errors import UserError

CLASSES = ("classes.txt", "classnames.txt")  # a name a line, for labels that are numbers
SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "test": "test"}
LABEL_BYTES = 1 << 20  # of the largest .cls or .json


def list_tars(folder: Folder) -> tuple[dict[str, str], list[str] | None, bytes]:
    """(names and splits of a folder's tars, classes if a file names them, a key that changes with any of these)."""
    root, filesystem, path = folder

    def below(path: str) -> dict[str, Any]:
        return {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in filesystem.ls(path, detail=True)}

    try:
        top = below(path)
        tars = {name: entry for name, entry in top.items() if name.endswith(".tar")}
        for inner in SPLIT_NAMES:
            if inner in top and top[inner]["type"] != "file":
                entries = below(top[inner]["name"])
                tars |= {f"{inner}/{name}": entry for name, entry in entries.items() if name.endswith(".tar")}
        sizes = [entry.get("size") for entry in tars.values()]
        if None in sizes:  # a listing over HTTP has none
            sizes = filesystem.sizes([entry["name"] for entry in tars.values()])
        texts = [os.fsdecode(filesystem.cat_file(top[name]["name"])) for name in CLASSES if name in top]
    except Exception as error:  # each filesystem raises its own
        raise UserError(f"{root} cannot be searched for tars ({reason(error)}); give a folder of shards") from error
    if not tars:
        raise UserError(f"{root} holds neither {INDEX} nor *.tar, nor does its folder train; give a folder of shards")
    lines = sorted(f"{name} {size}" for name, size in zip(tars, sizes, strict=True))
    times = sorted(f"{name} {entry.get('mtime')}" for name, entry in tars.items())
    key = "\n".join([*lines, *texts]) + "\0" + "\n".join(times)
    classes = texts[0].splitlines() if texts else None
    return _splits(sorted(tars), root), classes, key.encode(errors="surrogateescape")


def _splits(names: list[str], root: str) -> dict[str, str]:
    """The split of each tar, by its folder or a word in its name; train if no name has such a word."""
    matches = {name: re.search(r"(?<![a-z])(train|validation|val|test)(?![a-z])", name.lower()) for name in names}
    if not any(matches.values()):
        return dict.fromkeys(names, "train")
    if unknown := [name for name, match in matches.items() if match is None]:
        raise UserError(f"{join(root, unknown[0])} is of no split: its name has none of the words train, val and test")
    return {name: SPLIT_NAMES[match[1]] for name, match in matches.items() if match}


class _Sample(NamedTuple):
    """An image in a tar: its name, its part as in `ShardFiles`, its labels and their kind: one, several or folder."""

    name: str
    part: tuple[int, int, int, int]
    labels: tuple[str, ...]
    kind: str


def search(folder: Folder, tars: dict[str, str], classes: list[str] | None) -> ShardIndex:
    progress, root = Progress(), folder.root
    samples: dict[str, list[_Sample]] = {split: [] for split in SPLITS if split in tars.values()}
    shards, sizes = tuple(tars), []
    for number, (shard, split) in enumerate(tars.items()):
        try:
            with folder.filesystem.open(join(folder.path, shard), "rb") as opened:
                sizes.append(opened.seek(0, os.SEEK_END))
                samples[split] += _search_tar(opened, sizes[-1], number)
        except Exception as error:  # each filesystem raises its own, and tarfile for what is no tar
            raise UserError(f"{join(root, shard)} cannot be indexed: {reason(error)}") from error
        progress(f"{root}: {number + 1:,} of {len(shards):,} shards indexed")
    classes, labels = _number(root, samples, classes)
    splits = {}
    for split, own in samples.items():
        parts = np.array([sample.part for sample in own], np.int64)
        files = ShardFiles(root, Names.pack(sample.name for sample in own), shards, parts)
        splits[split] = Index(files, np.arange(len(own)), labels[split])
    total = ", ".join(f"{len(index):,} of {split}" for split, index in splits.items())
    print(f"{root}: indexed {len(shards):,} shards, images: {total}, in {len(classes):,} classes")
    several = any(index.labels.ndim == 2 for index in splits.values())
    return ShardIndex(Manifest(classes, splits, several), shards, np.array(sizes, np.int64))


def _search_tar(opened: IO[bytes], size: int, number: int) -> list[_Sample]:
    """The images of a tar; ValueError if it is damaged, or an image has no label."""
    images: dict[str, tuple[str, tuple[int, int, int, int]]] = {}
    dotted: dict[str, str] = {}
    labels: dict[str, tuple[tuple[str, ...], str]] = {}
    opened.seek(0)
    with tarfile.open(fileobj=opened, mode="r:") as archive:
        for member in archive:
            start = member.offset_data
            if not 0 <= member.size <= size - start:
                raise ValueError(f"{member.name} reaches beyond its end")
            match = re.match(r"((?:.*/)?[^./][^./]*)[.]([^/]*)$", member.name)  # webdataset's key, and what follows it
            if match is None or not member.isreg() or member.issparse():
                continue
            key, ending = match[1], match[2].lower()
            if f".{ending}" in EXTENSIONS and ending != "npy":  # which may be anything here
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
        if opened.read(BLOCK).strip(b"\0"):  # tarfile takes a damaged header for the end
            raise ValueError(f"it is damaged at byte {archive.offset}")
    if lost := dotted.keys() - images.keys():
        raise ValueError(f"{dotted[min(lost)]} has a dot before its ending, where webdataset ends the name of a sample")
    for key in images.keys() - labels.keys():
        folder = key.rpartition("/")[0].rpartition("/")[2]
        if folder in ("", "."):
            raise ValueError(f'{images[key][0]} has no label: no KEY.cls, no "label" in KEY.json, no class folder')
        labels[key] = (folder,), "folder"
    return [_Sample(name, part, *labels[key]) for key, (name, part) in images.items()]


def _read_label(text: str, ending: str, name: str) -> tuple[tuple[str, ...], str] | None:
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


def _number(
    root: str, samples: dict[str, list[_Sample]], named: list[str] | None
) -> tuple[list[str], dict[str, np.ndarray]]:
    for split, own in samples.items():
        if not own:
            raise UserError(f"{root}: the tars of {split} hold no image (known: {' '.join(EXTENSIONS)})")
    everything = [sample for own in samples.values() for sample in own]
    kinds = {sample.kind for sample in everything}
    digits = all(re.fullmatch(r"-?\d{1,18}", value) for sample in everything for value in sample.labels)
    read: Callable[[str], Any] = int if digits and "folder" not in kinds else str  # class folders are sorted as text
    known = sorted({read(value) for sample in samples.get("train", everything) for value in sample.labels})
    if named is not None:
        known = list(range(len(named))) if read is int else named
    number = {label: place for place, label in enumerate(known)}
    labels = {}
    for split, own in samples.items():
        rows = [[number.get(read(value), -1) for value in sample.labels] for sample in own]
        if unknown := [sample for sample, row in zip(own, rows, strict=True) if -1 in row]:
            where = CLASSES[0] if named else "the training images"
            raise UserError(f"{root}: {unknown[0].name} has the label {', '.join(unknown[0].labels)}, not in {where}")
        labels[split] = label_array(rows, len(known), "several" in kinds)
    return list(map(str, named or known)), labels
