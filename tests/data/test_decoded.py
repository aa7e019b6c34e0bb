"""Decoded images that are kept: the same batches, in memory that is shared, bounded, and gone with the run."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SMALL, Result, done, refused, user_error
from PIL import Image
from test_loaders import Recorder, assert_same, folder_data, trainer
from torchvision.transforms import v2

from vitlit.data import ImageFolderData, decoded
from vitlit.data.augment import TimmRandAugment
from vitlit.data.decoded import Decoded
from vitlit.data.erasing import Erasing
from vitlit.data.mixing import Mixing
from vitlit.data.views import Views
from vitlit.objectives import Batch

VARIED: list[dict[str, Any]] = [
    {"crop": "inception", "crop_scale": (0.3, 1.0), "repeats": 2, "erasing": Erasing(0.5), "mixing": Mixing(0.8, 1.0)},
    {"crop": "random_resized", "views": [Views(2, 8)], "micro_batch": 4, "interpolation": "bilinear"},
    {"crop": "pad", "balanced": True},
    {"crop": "simple"},
    {"crop": "resmall", "crop_ratio": 0.6},
    {"crop": "center", "squash": True, "crop_ratio": 0.7},
]


@pytest.fixture(scope="module")
def photo_folder(photos: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of photographs, of other sizes each: 24 and 6, in two classes."""
    root = tmp_path_factory.mktemp("parts")
    draw = torch.Generator().manual_seed(0)
    for number in range(30):
        left, top, width, height = torch.randint(10, 200, (4,), generator=draw).tolist()
        path = root / ("train" if number < 24 else "val") / str(number % 2) / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photos[number % 2].crop((left, top, left + width, top + height)).save(path)
    return root


def batches(root: Path, **options: Any) -> tuple[list[Batch], list[Batch]]:
    """What two epochs of a Trainer get, from training and validation."""
    module = Recorder()
    trainer().fit(module, folder_data(root, **options))
    return module.train_batches, module.val_batches


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{**VARIED[0], "augment": [TimmRandAugment()]}, *VARIED[1:2]])
def test_batches_from_memory_are_the_same_bit_for_bit(few: Path, options: dict[str, Any], workers: int) -> None:
    plain = batches(few, **options)
    kept = batches(few, **options, cache="memory", num_workers=workers)
    for ours, theirs in zip(kept, plain, strict=True):
        assert_same(ours, theirs)
