"""ImageNet-style folders: finding the images, their classes and the splits."""

import os
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vitlit.data import cache
from vitlit.data.index import ENDINGS, EXTENSIONS, FolderFiles, Index, Names
from vitlit.errors import UserError
from vitlit.seeds import mix

# Each split and how its folder may be spelled; only the first is read.
SPELLINGS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
CHECK = "; `vitlit data check` names them"


def folders_in(root: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if is_folder(entry) and not entry.name.startswith("."))


def is_folder(entry: os.DirEntry[Any]) -> bool:
    """Whether it is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


class Tree(NamedTuple):
    """Paths below a folder: images, other files and links to nothing, sorted, and all folders, itself first."""

    images: list[bytes]
    others: list[bytes]
    dead: list[bytes]
    folders: list[bytes]


def walk(root: bytes, folder: bytes = b"", deep: bool = True) -> Tree:
    """List ROOT/FOLDER to any depth, or only itself, without what is hidden, with paths relative to the root.

    A folder counts once. A link to a folder around it is not followed, or a class would have the images of all classes.
    """
    found, seen = Tree([], [], [], []), set()
    above: tuple[bytes, ...] = (os.path.realpath(root),) if folder else ()
    pending = [(folder, above)]  # with the real paths of the folders that lead there
    while pending:
        below, above = pending.pop()
        here = os.path.join(root, below)
        real = os.path.realpath(here)
        if real in seen or any(os.path.join(outer, b"").startswith(os.path.join(real, b"")) for outer in above):
            continue
        seen.add(real)
        found.folders.append(below)
        prefix, inner = below and below + b"/", []
        for entry in os.scandir(here):
            name = entry.name
            if name.startswith(b"."):
                continue
            if is_folder(entry):
                inner.append(prefix + name)
            elif name.lower().endswith(ENDINGS):
                found.images.append(prefix + name)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                found.dead.append(prefix + name)
            else:
                found.others.append(prefix + name)
        # In reverse, as they are popped: of several links to one folder the first by name counts.
        pending += [(name, (*above, real)) for name in sorted(inner, reverse=True)] if deep else []
    return Tree(sorted(found.images), sorted(found.others), sorted(found.dead), found.folders)


def unread(trees: Iterable[Tree], loose: int = 0) -> str:
    """How many files of which ending, links to nothing and `loose` images are not read; empty if there are none."""
    counts: Counter[str] = Counter()
    for tree in trees:
        counts.update(os.path.splitext(os.fsdecode(name))[1].lower() or "without an ending" for name in tree.others)
        counts["dead links"] += len(tree.dead)
    counts["images outside of class folders"] += loose
    most = [(kind, number) for kind, number in counts.most_common() if number]
    kinds = [f"{kind} {number:,}" for kind, number in most[:8]]
    text = ", ".join(kinds + [f"and {len(most) - 8} more endings"] * (len(most) > 8))
    return text.encode(errors="replace").decode()


def _tell(where: object, passed: str, remedy: str = "") -> None:
    if passed:
        from lightning.pytorch.utilities import rank_zero_only  # takes a second, for which `vitlit data` need not wait

        rank_zero_only(print)(f"{where}: not read: {passed}{remedy}", flush=True)


def _scan(folder: Path, classes: list[str]) -> tuple[Names, np.ndarray, str]:
    """The images in class folders, how many each has, and what is not read. The folder itself is the class ""."""
    scanned, root = time.time(), os.fsencode(folder)
    trees = [walk(root, os.fsencode(name)) for name in classes]
    top = Tree([], [], [], []) if "" in classes else walk(root, deep=False)
    folders = [b"", *(below for tree in trees for below in tree.folders if below)]
    names = Names.pack(image for tree in trees for image in tree.images)
    counts = np.array([len(tree.images) for tree in trees], np.int64)
    found = names, counts, unread([top, *trees], len(top.images))
    cache.save(folder, classes, found, folders, scanned)
    return found


def scan_photos(photos: list[Path]) -> Index:
    """The images at these paths, files or folders of any depth, each once, without labels."""
    if not photos:
        raise UserError("predict needs images: files, or folders of them")
    unique: dict[str, None] = {}
    trees = []
    for photo in photos:
        if not photo.exists():
            raise UserError(f"{photo} does not exist; give images or folders of images")
        trees.append(walk(os.fsencode(photo)) if photo.is_dir() else Tree([b""], [], [], []))
        unique |= dict.fromkeys(str(photo / os.fsdecode(name)) for name in trees[-1].images)
    where, passed = ", ".join(map(str, photos)), unread(trees)
    if not unique:
        raise UserError(f"no image under {where}{passed and f', only {passed}'} (known: {' '.join(EXTENSIONS)})")
    _tell(where, passed)
    return Index.of("", unique, np.full(len(unique), -1))


def train_folder(root: Path, holdout: float) -> Path:
    """The training split's folder: ROOT/train, or with a holdout ROOT if there is no such folder."""
    if not root.is_dir():
        raise UserError(f"data.root {root} is not a folder; give --data.root a folder of class folders of images")
    folder = root / "train"
    if not folder.is_dir():
        if not holdout:
            remedy = "lay it out as train/CLASS/* and val/CLASS/*, or give --data.holdout 10% if it holds the classes"
            raise no_folder(root, "train", remedy)
        folder = root
    if not folders_in(folder) and not (top := walk(os.fsencode(folder), deep=False)).images:
        only = f", only {holds}" if (holds := unread([top])) else ""
        raise UserError(f"{folder} holds no class folders{only}; images belong in {folder}/CLASS/")
    return folder


def no_folder(root: Path, split: str, remedy: str) -> UserError:
    """The error of a root without the folder of a split, which may be there under another name."""
    for name in folders_in(root):
        if name.strip().lower() in SPELLINGS.get(split, ()):
            return UserError(f"data.root {root} has no folder {split}, but {name}: rename it to {split}")
    return UserError(f"data.root {root} has no folder {split}; {remedy}")


def scan_split(folder: Path, classes: list[str]) -> Index:
    """The images of one split, labelled by their place in `classes`; without classes the folder's own, all -1."""
    index, passed = _labelled(folder, classes)
    _tell(folder, passed, CHECK)
    return index


def _labelled(folder: Path, classes: list[str]) -> tuple[Index, str]:
    names = folders_in(folder) or ([] if classes else [""])
    strange = sorted(set(names) - {"", *classes})
    if strange:
        near = [ascii(name) for name in classes if alike(name) == alike(strange[0])]
        lack = f"lack; they have {near[0]}: rename one" if near else "lack"
        named = ascii(strange[0]) if near else repr(strange[0])
        raise UserError(f"{folder} has the class {named}, which the training images {lack}")
    files, counts, passed = cache.load(folder, names) or _scan(folder, names)
    if not len(files):
        if not names and walk(os.fsencode(folder)).images:
            raise UserError(f"{folder} holds images but no class folders; sort them into CLASS/ folders, as in train")
        raise UserError(f"{folder} holds no image{passed and f', only {passed}'} (known: {' '.join(EXTENSIONS)})")
    numbers = {"": -1} | {name: label for label, name in enumerate(classes)}
    labels = np.repeat(np.array([numbers[name] for name in names], np.int64), counts)
    return Index(FolderFiles(str(folder), files), np.arange(len(files)), labels), passed


def scan_classes(folder: Path) -> tuple[list[str], Index]:
    """The classes, which are the sorted names of a folder's folders, and their images; each class must have one."""
    classes = folders_in(folder)
    index, passed = _labelled(folder, classes)
    for label in np.setdiff1d(np.arange(len(classes)), index.labels).tolist():
        empty = f"class folder {folder / classes[label]} holds no image"
        if holds := unread([walk(os.fsencode(folder), os.fsencode(classes[label]))]):
            known = f"known: {' '.join(EXTENSIONS)}"
            raise UserError(f"{empty} that is read, only {holds} ({known}); convert, unpack or remove them")
        raise UserError(f"{empty}; fill or remove it")
    _tell(folder, passed, CHECK)
    return classes, index


def scan_train(root: Path, holdout: float = 0.0) -> tuple[list[str], Index, Index | None]:
    """The classes (none without class folders), the training images, and those held out, if any."""
    classes, index = scan_classes(train_folder(root, holdout))
    return classes, *(hold_out(index, holdout, classes) if holdout else (index, None))


def hold_out(index: Index, share: float, classes: list[str]) -> tuple[Index, Index]:
    """Split a share off for validation: (the rest, the share). UserError if the groups are too large.

    Each class loses this share, at least one image and never all; images of several classes, or none, are one class.
    Only names are drawn by: a run never trains on images that the run it starts from is validated on.
    """
    labels = index.labels if classes and index.labels.ndim == 1 else np.zeros(len(index), np.int64)
    counts = np.bincount(labels, minlength=len(classes))
    wanted = np.minimum(counts - 1, np.maximum(1, np.round(counts * share)))
    if index.groups is not None:
        held = _hold_groups(index.groups, labels, counts, wanted)
        if not held.any() and wanted.any():
            why = "every group is more than twice what is to be held out of its classes, or all of one"
            raise UserError(f"data.holdout {share:.3g}: {why}; hold out more, or make groups smaller")
    else:
        keys = mix(np.array([zlib.crc32(name) for name in index.names()]))  # by name: another class changes nothing
        by_class = np.lexsort((keys, labels))
        places = np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)  # within the class
        held = np.zeros(len(index), bool)
        held[by_class[places < np.repeat(wanted, counts)]] = True
    return index.take(np.flatnonzero(~held)), index.take(np.flatnonzero(held))


def _hold_groups(groups: np.ndarray, labels: np.ndarray, counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The images held out, bool (N,): groups in the order drawn, each if more than half of it is still wanted."""
    names, members = np.unique(groups, return_inverse=True)
    by_group = np.split(np.argsort(members, kind="stable"), np.cumsum(np.bincount(members))[:-1])
    held, taken = np.zeros(len(groups), bool), np.zeros(len(counts))
    for group in np.argsort(mix(names), kind="stable"):
        own = np.bincount(labels[by_group[group]], minlength=len(counts))
        use = np.minimum(own, np.maximum(0, wanted - taken)).sum()
        if 2 * use > own.sum() and (taken + own < counts)[own > 0].all():
            held[by_group[group]] = True
            taken += own
    return held


def alike(name: str) -> str:
    """The same for names that differ only in case, in spaces around them, or in how accents are composed."""
    return unicodedata.normalize("NFC", name).strip().casefold()


def brief(names: list[str]) -> str:
    return f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''} ({len(names)})"


def parse_share(share: float | str) -> float:
    """0.1 for 10%, 0.1 or '0.1'; UserError unless it is at least 0 and below 1."""
    text = str(share).strip()
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise UserError(f"data.holdout {share} is not a share such as 10% or 0.1")
    return value
