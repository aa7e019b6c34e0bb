"""Images of a folder that show the same picture, and labels that are likely wrong."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torchvision.transforms import InterpolationMode

from vitlit.data.dataset import Images
from vitlit.data.index import Index
from vitlit.data.workers import count, loader
from vitlit.evaluation import LabelErrors, duplicates, label_errors
from vitlit.evaluation.duplicates import SIDE
from vitlit.images.crops import CenterCrop


class Suspects(NamedTuple):
    pairs: np.ndarray  # (P, 2) of the same picture; rows are counted through the indices
    differences: np.ndarray  # (P,)
    errors: LabelErrors | None  # unless each image has one of several classes, and a class has two


def suspects(features: Any, indices: Sequence[Index], ground: str, k: int = 10) -> Suspects:
    """`duplicates` and `label_errors` among all images of some indices, which have these features (N, D)."""
    whole = CenterCrop((SIDE, SIDE), InterpolationMode.BILINEAR, crop_ratio=1.0, squash=True)
    images = (Images(index, whole, ground=ground) for index in indices)
    batches = chain.from_iterable(loader(each, range(len(each)), 64, count(1)) for each in images)
    pairs = duplicates(torch.cat([batch[0] for batch in batches]).permute(0, 3, 1, 2), k)
    labels, groups = np.concatenate([index.labels for index in indices]), [index.groups for index in indices]
    if labels.ndim > 1 or labels.dtype.kind == "f" or labels.min() < 0 or np.bincount(labels).max() in (1, len(labels)):
        return Suspects(*pairs, None)
    together = [each for each in groups if each is not None]  # a manifest gives all of them groups, or none
    return Suspects(*pairs, label_errors(features, labels, np.concatenate(together) if together else None))
