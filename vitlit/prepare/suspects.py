"""Images of a folder as a table with their features: which show the same picture, whose label is likely wrong."""

import os
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torchvision.transforms import Compose, InterpolationMode

from vitlit.data.dataset import REMOVE, Images
from vitlit.data.index import Index
from vitlit.data.workers import count, loader
from vitlit.evaluation import duplicates, label_errors
from vitlit.evaluation.duplicates import SIDE
from vitlit.images.crops import CenterCrop
from vitlit.images.preprocess import Preprocess
from vitlit.images.raw import as_picture
from vitlit.prepare.features import extract

COLUMNS = {
    "near_duplicates": ("path", "split", "other", "other_split", "difference"),
    "label_errors": ("path", "split", "label", "guess", "label_probability", "guess_probability"),
}


class Table(NamedTuple):
    path: list[str]  # relative to the root
    split: list[str]
    label: list[str]
    features: np.ndarray  # (N, D), float32


def embed(vit: Any, splits: dict[str, Index], classes: list[str], root: str) -> Table:
    rows = [(split, index, row) for split, index in splits.items() for row in range(len(index))]
    paths = [index.path(row) for _, index, row in rows]
    names = [path.removeprefix(f"{root}/") if "://" in root else os.path.relpath(path, root) for path in paths]
    features = torch.cat([extract(vit, index, ["pooled"])["pooled"] for index in splits.values()]).numpy()
    labels = [index.label_text(row, classes) for _, index, row in rows]
    return Table(names, [split for split, _, _ in rows], labels, features)


def suspects(
    table: Table, splits: dict[str, Index], classes: list[str], preprocess: Preprocess, k: int = 10
) -> dict[str, list[Any]]:
    """Rows of `COLUMNS`, the likeliest first; no label_errors unless each image has one of several classes."""
    whole = CenterCrop((SIDE, SIDE), InterpolationMode.BILINEAR, crop_ratio=1.0, squash=True)
    small = Compose([as_picture, whole])
    images = [Images(index, small, preprocess=preprocess, remedy=REMOVE) for index in splits.values()]
    batches = chain.from_iterable(loader(each, range(len(each)), 64, count(1)) for each in images)
    pairs, apart = duplicates(torch.cat([batch[0] for batch in batches]).permute(0, 3, 1, 2), k)
    place, each = list(zip(table.path, table.split, strict=True)), zip(pairs.tolist(), apart.tolist(), strict=True)
    found = {"near_duplicates": [(*place[one], *place[other], difference) for (one, other), difference in each]}
    labels = np.concatenate([index.labels for index in splits.values()])
    if labels.ndim > 1 or labels.dtype.kind == "f" or labels.min() < 0 or np.bincount(labels).max() in (1, len(labels)):
        return found
    groups = [index.groups for index in splits.values() if index.groups is not None]
    errors = label_errors(table.features, labels, np.concatenate(groups) if groups else None)
    wrong = zip(*(part.tolist() for part in errors), strict=True)
    return found | {"label_errors": [(*place[row], table.label[row], classes[guess], *p) for row, guess, p in wrong]}
