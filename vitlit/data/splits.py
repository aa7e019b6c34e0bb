"""The images for training, validation, test and prediction, from folders, a manifest or shards."""

from functools import cached_property
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from vitlit.data.folder import SPELLINGS, brief, hold_out, no_folder, scan_classes, scan_photos, scan_split, scan_train
from vitlit.data.index import Index
from vitlit.data.manifest import AS_NUMBERS, NUMBER, Manifest, read_manifest
from vitlit.data.shards import is_shards, read_shards
from vitlit.data.tables import is_table, read_table
from vitlit.errors import UserError
from vitlit.files import expand


class Splits:
    """The images of each split, found when first needed. Classes that are set before are the weights'."""

    def __init__(self, root: str, holdout: float, manifest: str | None, labels: str | None = None) -> None:
        if labels is not None and manifest is None:
            raise UserError("data.labels is about a manifest, but there is no data.manifest; leave it out")
        self.root, self.holdout, self.labels = expand(root), holdout, labels
        self.manifest = manifest and expand(manifest)
        self.classes: list[str] = []
        self.multi_label = False
        self.photos: list[Path] = []
        self._found: dict[str, Index] = {}
        self._scanned = False

    def __getitem__(self, name: str) -> Index:
        if name == "predict" and name not in self._found:
            self._found[name] = scan_photos(self.photos)
        if name not in self._found and (name == "train" or self.holdout or not self.classes or self._listed):
            self.scan()
        if name not in self._found:
            self._found[name] = self._scan_folder(name)
        return self._found[name]

    def has(self, name: str) -> bool:
        """Whether a manifest or shards list images of this split, or a folder has one for it."""
        return name in self._found or (self._listed is None and Path(self.root, name).is_dir())

    @cached_property
    def _listed(self) -> Manifest | None:
        """The content of the manifest, of the shards' index or of a table; None for a folder."""
        if self.manifest is None:
            if is_table(self.root):
                return read_table(self.root)
            return read_shards(self.root) if is_shards(self.root) else None
        if "://" in self.root or self.root.startswith("hf:"):
            raise UserError(f"data.manifest is for folders, but {self.root} holds labels itself; leave it out")
        found = read_manifest(Path(self.manifest), Path(self.root), self.labels)
        if self.labels is None and found.classes and all(map(NUMBER.fullmatch, found.classes)):
            rank_zero_only(print)(f"{self.manifest}: its integers are {len(found.classes)} classes; {AS_NUMBERS}")
        return found

    @property
    def numbers(self) -> bool:
        return self.manifest is not None and self["train"].labels.dtype.kind == "f"

    def expect(self, classes: list[str]) -> None:
        """Take these classes if none are known; UserError if others are, or are found later."""
        if classes and self._scanned and classes != self.classes:
            raise other_classes(self.root, self.classes, classes)
        self.classes = classes or self.classes

    def scan(self) -> None:
        """Find the classes, the training images, and all splits that a manifest or shards list; once."""
        if self._scanned:
            return
        listed = self._listed
        if listed is None:
            classes, train, held = scan_train(Path(self.root), self.holdout)
            found, has_val = {"train": train}, (Path(self.root) / "val").is_dir()
        else:
            classes, found, held, has_val = listed.classes, dict(listed.splits), None, "val" in listed.splits
            if self.holdout and "train" in found:  # shards for evaluation alone may lack it
                found["train"], held = hold_out(found["train"], self.holdout, classes)
            self.multi_label = listed.multi_label
        if self.classes and self.classes != classes:
            raise other_classes(self.root, classes, self.classes)
        if held is not None:
            found["val"] = held
            if has_val:
                source = self.manifest or self.root
                rank_zero_only(print)(f"{source}: val is not used; a part of train is held out instead")
        self.classes, self._scanned = classes, True
        self._found |= found

    def present(self) -> list[str]:
        """The names of the splits there are; in a folder without train and test val, or "", the folder itself."""
        root = Path(self.root)
        trained = self.holdout or (root / "train").is_dir() or (root / "test").is_dir()
        if trained or self._listed is not None or not root.is_dir():
            self.scan()
            return [name for name in SPELLINGS if self.has(name)]
        name = "val" if (root / "val").is_dir() else ""
        self.classes, self._found[name] = scan_classes(root / name)
        self._scanned = True
        return [name]

    def _scan_folder(self, name: str) -> Index:
        remedy = "--data.holdout 10% takes it from train" if name == "val" else "`vitlit validate` evaluates on val"
        if self._listed is not None:
            raise UserError(f"{self.manifest or self.root} has no image of split {name}; {remedy}")
        folder = Path(self.root, name)
        if not folder.is_dir():
            raise no_folder(Path(self.root), name, remedy)
        index = scan_split(folder, self.classes)
        missing = np.setdiff1d(np.arange(len(self.classes)), index.labels)
        if len(missing):
            some = f"{len(missing)} of {len(self.classes)} classes, such as {self.classes[missing[0]]!r}"
            rank_zero_only(print)(f"{folder} lacks {some}")
        return index

    @property
    def class_counts(self) -> list[int]:
        labels = self["train"].labels
        if labels.ndim == 2:
            return labels.sum(0).tolist()
        return np.bincount(labels[labels >= 0], minlength=len(self.classes)).tolist()


def other_classes(root: str, ours: list[str], theirs: list[str]) -> UserError:
    has = f"the classes {brief(ours)}" if ours else "no classes"
    return UserError(f"{root} has {has}, the weights {brief(theirs)}")
