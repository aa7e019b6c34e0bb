"""Which images are for training, validation, test and prediction, wherever they are listed."""

from functools import cached_property
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from vitlit.data.folder import brief, find_classes, hold_out, scan_photos, scan_split, scan_train
from vitlit.data.index import Index
from vitlit.data.manifest import Manifest, read_manifest
from vitlit.data.shards import is_shards, read_shards
from vitlit.errors import UserError


class Splits:
    """The images of each split, found when they are first asked for, and once.

    Args:
        root: a folder of class folders, of images without labels or of shards, or the URL of shards.
        holdout: the share of the training images that is cut off for validation.
        manifest: a CSV file of labels in place of class folders.

    Attributes:
        classes: names in the order of their numbers; none without labels; those of the weights if set first.
        multi_label: whether an image may have several classes.
        photos: files and folders to predict.
    """

    def __init__(self, root: str, holdout: float, manifest: str | None) -> None:
        self.root, self.holdout, self.manifest = root, holdout, manifest
        self.classes: list[str] = []
        self.multi_label = False
        self.photos: list[Path] = []
        self._found: dict[str, Index] = {}
        self._all = False  # found whatever is not in a folder of its own

    def __getitem__(self, name: str) -> Index:
        """The images of train, val, test or predict.

        Raises:
            UserError: there is no such split, or its layout is wrong.
        """
        if name == "predict" and name not in self._found:
            self._found[name] = scan_photos(self.photos)
        if name in self._found:
            return self._found[name]
        if not self._all and (name == "train" or self.holdout or self.manifest or not self.classes or self._sharded()):
            self._scan()
        if name not in self._found:
            self._found[name] = self._scan_folder(name)
        return self._found[name]

    def labels(self) -> tuple[list[str], bool]:
        """The classes, and whether an image may have several, without looking at every image of a folder.

        Raises:
            UserError: the data is not laid out as it must be.
        """
        if self._listed is None:
            return find_classes(Path(self.root), self.holdout), False
        return self._listed.classes, self._listed.multi_label

    @cached_property
    def _listed(self) -> Manifest | None:
        """What a manifest or the index of shards says; None of a folder."""
        if self.manifest is None:
            return read_shards(self.root) if is_shards(self.root) else None
        if "://" in self.root:
            raise UserError(
                f"data.manifest is for folders, but {self.root} holds shards, which have their labels; leave it out"
            )
        return read_manifest(Path(self.manifest), Path(self.root))

    def _sharded(self) -> bool:
        return self.manifest is None and is_shards(self.root)

    def _scan(self) -> None:
        """Find classes and training images, and all that a manifest or shards list."""
        listed = self._listed
        if listed is None:
            classes, train, held = scan_train(Path(self.root), self.holdout)
            found = {"train": train}
            beside = bool(self.holdout) and (Path(self.root) / "val").is_dir()
        else:
            classes, held = listed.classes, None
            found = dict(listed.splits)
            beside = "val" in found
            if self.holdout and "train" in found:  # shards to be evaluated may be without
                found["train"], held = hold_out(found["train"], self.holdout, classes)
        if self.classes and self.classes != classes:
            has = f"the classes {brief(classes)}" if classes else "no classes"
            raise UserError(f"{self.root} has {has}, the weights {brief(self.classes)}")
        if held is not None:
            found["val"] = held
            if beside:
                source = self.manifest or self.root
                rank_zero_only(print)(f"{source}: val is left alone, a part of train is held out")
        self.classes, self.multi_label = classes, listed is not None and listed.multi_label
        self._found |= found
        self._all = True

    def _scan_folder(self, name: str) -> Index:
        remedy = "; --data.holdout 10% holds out a part of the training images"
        remedy = remedy if name == "val" else "; `vitlit validate` evaluates on val"
        if self.manifest is not None:
            raise UserError(f"{self.manifest} has no row of split {name}{remedy}")
        if self._sharded():
            raise UserError(f"{self.root} has no shard of {name}{remedy}")
        root = Path(self.root)
        if not root.is_dir():
            raise UserError(f"data.root {root} is not a folder; give --data.root a folder of images")
        if not (root / name).is_dir():
            raise UserError(f"{root} has no folder {name}{remedy}")
        index = scan_split(root / name, self.classes)
        present = set(index.labels.tolist())
        missing = [name for label, name in enumerate(self.classes) if label not in present]
        if missing:
            rank_zero_only(print)(f"{root / name} has no image of {len(missing)} classes, {missing[0]!r} among them")
        return index

    @property
    def class_counts(self) -> list[int]:
        """Training images of each class."""
        labels = self["train"].labels
        if labels.ndim == 2:
            return labels.sum(0).tolist()
        return np.bincount(labels[labels >= 0], minlength=len(self.classes)).tolist()
