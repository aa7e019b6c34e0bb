"""ImageNet-style folders: finding the images, their classes and the splits."""

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitlit.data.decode import decode
from vitlit.data.stream import Sample, mix, seed_sample
from vitlit.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


@dataclass(frozen=True)
class Index:
    """Images of one split.

    Attributes:
        root: the folder that the paths are relative to.
        paths: relative paths as one fixed-width bytes array, so that forked workers share it.
        labels: class numbers, int64 (N,), -1 where there is none; or bool (N, classes) where an image may have several.
    """

    root: Path
    paths: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path:
        """The path of an image."""
        return self.root / os.fsdecode(self.paths[index])

    def take(self, indices: np.ndarray) -> "Index":
        """The images at these positions."""
        return Index(self.root, self.paths[indices], self.labels[indices])


def _folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def _images(root: Path, below: str = "") -> list[str]:
    """Paths of all images under root / below, relative to root, sorted. Hidden files and folders do not count."""
    found = []
    seen = set()
    for folder, folders, files in os.walk(root / below, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [name for name in folders if not name.startswith(".")] if real not in seen else []
        files = files if real not in seen else []  # links may lead in a circle
        seen.add(real)
        relative = os.path.relpath(folder, root)
        found += [
            os.path.normpath(os.path.join(relative, file))
            for file in files
            if file.lower().endswith(EXTENSIONS) and not file.startswith(".")
        ]
    return sorted(found)


def scan_photos(photos: list[Path]) -> Index:
    """The images at these paths, each a file or a folder searched to its depth, without labels.

    Raises:
        UserError: a path does not exist, or no image is found.
    """
    if not photos:
        raise UserError("predict needs images: files, or folders of them")
    found: list[str] = []
    for photo in photos:
        if not photo.exists():
            raise UserError(f"{photo} does not exist; give images or folders of images")
        found += [str(photo / name) for name in _images(photo)] if photo.is_dir() else [str(photo)]
    found = list(dict.fromkeys(found))
    if not found:
        raise UserError(f"no image under {', '.join(map(str, photos))} (known: {' '.join(EXTENSIONS)})")
    return Index(Path(), np.array([os.fsencode(name) for name in found]), np.full(len(found), -1))


def train_folder(root: Path, holdout: float) -> Path:
    """The folder whose subfolders are the classes: ROOT/train, or ROOT itself where a holdout is cut from it.

    Raises:
        UserError: there is no such folder, or it holds no class folder.
    """
    if not root.is_dir():
        raise UserError(f"data.root {root} is not a folder; give --data.root a folder of class folders of images")
    folder = root / "train"
    if not folder.is_dir():
        if not holdout:
            raise UserError(
                f"{root} has no folder train; lay it out as train/CLASS/* and val/CLASS/*, "
                "or give --data.holdout 10% where the class folders lie in the root itself"
            )
        folder = root
    if not _folders(folder):
        raise UserError(f"{folder} holds no class folders; images belong in {folder}/CLASS/")
    return folder


def find_classes(root: Path, holdout: float = 0.0) -> list[str]:
    """Class names in the order of their numbers: the sorted names of the training split's folders."""
    return _folders(train_folder(root, holdout))


def scan_split(folder: Path, classes: list[str]) -> Index:
    """The images of one split, numbered by the classes given.

    Raises:
        UserError: the split has a class that is not among these, or no image at all.
    """
    found = _folders(folder)
    strange = sorted(set(found) - set(classes))
    if strange:
        raise UserError(f"{folder} has the class {strange[0]!r}, which the training images lack")
    if not found and _images(folder):
        raise UserError(
            f"{folder} holds images but no class folders; sort them into {folder}/CLASS/, with train's class names"
        )
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        images = _images(folder, name) if name in found else []
        names += images
        labels += [label] * len(images)
    if not names:
        raise UserError(f"{folder} holds no image (known: {' '.join(EXTENSIONS)})")
    return Index(folder, np.array([os.fsencode(name) for name in names]), np.array(labels))


def scan_train(root: Path, holdout: float = 0.0) -> tuple[list[str], Index, Index | None]:
    """The classes, the training images, and the held-out ones where a share is held out.

    The held-out part is stratified and the same for every seed, so that a run never trains on what another, which
    started from its weights, is judged by.

    Raises:
        UserError: as `train_folder`; or a class has no image.
    """
    folder = train_folder(root, holdout)
    classes = _folders(folder)
    index = scan_split(folder, classes)
    counts = np.bincount(index.labels, minlength=len(classes))
    if not counts.all():
        raise UserError(f"class folder {folder / classes[int(counts.argmin())]} holds no image; fill or remove it")
    return classes, *(hold_out(index, holdout, classes) if holdout else (index, None))


def hold_out(index: Index, share: float, classes: list[str]) -> tuple[Index, Index]:
    """Cut a share off for validation: (the rest, the share).

    Of every class so much is held out, one image at least, but never all. Images with several classes are
    held out regardless of them. What is drawn depends on the paths alone.
    """
    drawn = mix(np.array([zlib.crc32(path) for path in index.paths]))  # by name: another class changes nothing
    groups = [np.arange(len(index))]
    if index.labels.ndim == 1:
        groups = [np.flatnonzero(index.labels == label) for label in range(len(classes))]
    held = np.zeros(len(index), bool)
    for group in groups:
        wanted = min(len(group) - 1, max(1, round(len(group) * share)))
        held[group[np.argsort(drawn[group], kind="stable")][: max(0, wanted)]] = True
    return index.take(np.flatnonzero(~held)), index.take(np.flatnonzero(held))


def brief(names: list[str]) -> str:
    """Class names, the first few of them."""
    return f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''} ({len(names)})"


def parse_share(share: float | str) -> float:
    """0.1 of 10%, 0.1 or '0.1'; UserError where it is no share below 1."""
    text = str(share).strip()
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise UserError(f"data.holdout {share} is not a share such as 10% or 0.1")
    return value


class ImageFolder(Dataset[tuple[Any, ...]]):
    """Images of an index, transformed: (uint8 (3, H, W), label, index), and in training the position in the stream.

    An item is an index, or a Sample in training, which seeds the transform's draws. A label is an int, or float
    (classes,) of zeros and ones where an image may have several.
    """

    def __init__(self, index: Index, transform: Callable[[Tensor], Tensor], seed: int = 0) -> None:
        self.index, self.transform, self.seed = index, transform, seed

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int | Sample) -> tuple[Any, ...]:
        if isinstance(item, int):
            return self.transform(decode(self.index.path(item))), self._label(item), item
        image = decode(self.index.path(item.index))
        with torch.random.fork_rng(devices=[]):  # without workers this is the model's generator, too
            seed_sample(self.seed, item.epoch, item.index, item.repeat)
            image = self.transform(image)
        return image, self._label(item.index), item.index, item.position

    def _label(self, index: int) -> int | Tensor:
        label = self.index.labels[index]
        return int(label) if label.ndim == 0 else torch.from_numpy(label).float()
