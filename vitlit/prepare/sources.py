"""Public data sets as ImageNet-style folders: what `vitlit data NAME OUT` calls."""

import re
import tempfile
from collections.abc import Iterable
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from vitlit.errors import UserError
from vitlit.files import whole_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Split: TypeAlias = "Iterable[tuple[str, Path | NDArray[np.uint8]]]"  # (class name, a file or 8-bit pixels)

HOSTS = {
    "cifar10": "www.cs.toronto.edu",
    "cifar100": "www.cs.toronto.edu",
    "imagenette": "s3.amazonaws.com",
    "flowers102": "www.robots.ox.ac.uk",
    "pets": "www.robots.ox.ac.uk",
}
NAMES = ("digits", *HOSTS)
DIGITS = "data/digits"  # the root that `vitlit fit` makes where it is missing


def write(name: str, out: Path) -> None:
    """Write a data set as `out/SPLIT/CLASS/FILE` and print one line for each split.

    | name | train | val | test | files |
    |---|---|---|---|---|
    | digits | 1,438 | 359 | - | PNG, grey, 8 x 8 pixels |
    | cifar10, cifar100 | 50,000 | 10,000, the official test set | - | PNG, RGB, 32 x 32 pixels |
    | imagenette | 9,469 | 3,925 | - | JPEG, shorter side 320 pixels |
    | flowers102 | 1,020 | 1,020 | 6,149 | JPEG |
    | pets | 3,680, the official trainval set | 3,669, the official test set | - | JPEG |

    Papers report Flowers on test, after training on train and val together. JPEG sets keep their files, byte for byte;
    a PNG is numbered by its place in the split. Everything is made in `OUT.partial` beside `out`, which takes its
    final name once it is complete; what an interrupted command left there is removed.

    Args:
        name: one of `NAMES`; all but digits are downloaded.
        out: the folder to make; where it exists it must be empty.

    Raises:
        UserError: the name is unknown, `out` is not empty or cannot be made, or the download failed.
    """
    if name not in NAMES:
        raise UserError(f"there is no data set {name!r}: choose one of {' '.join(NAMES)}")
    with whole_folder(out) as partial, tempfile.TemporaryDirectory(dir=partial) as root:
        splits = _digits() if name == "digits" else _download(name, root)
        counts = {split: _write_split(pairs, partial / split) for split, pairs in splits.items()}
    for split, (images, classes) in counts.items():
        print(f"{out / split}: {images:,} images, {classes} classes")


def _write_split(pairs: Split, folder: Path) -> tuple[int, int]:
    """Write a split as `folder/CLASS/FILE`; its files are moved there. Returns (images, classes)."""
    from PIL import Image

    count = 0
    for name, image in pairs:
        class_folder = folder / re.sub(r"[^\w-]+", "_", name).strip("_")
        class_folder.mkdir(parents=True, exist_ok=True)
        if isinstance(image, Path):
            image.rename(class_folder / image.name)
        else:
            Image.fromarray(image).save(class_folder / f"{count:05d}.png")
        count += 1
    return count, len(list(folder.iterdir()))


def _digits() -> dict[str, Split]:
    """scikit-learn's handwritten digits, 16 levels scaled to 255; every fifth image of a class is in val."""
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    in_val = np.zeros(len(images), dtype=bool)
    for label in range(10):
        in_val[np.flatnonzero(digits.target == label)[2::5]] = True
    return {
        split: [(str(digits.target[i]), images[i]) for i in np.flatnonzero(chosen)]
        for split, chosen in (("train", ~in_val), ("val", in_val))
    }


def _download(name: str, root: str) -> dict[str, Split]:
    """Fetch a data set of torchvision's into root; UserError, of one line, where that fails."""
    fetch = {"imagenette": _imagenette, "flowers102": _flowers102, "pets": _pets}
    try:
        return fetch[name](root) if name in fetch else _cifar(name, root)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: torchvision's for a wrong checksum
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{name} could not be downloaded from {HOSTS[name]} ({reason}): "
            "try again with a network, or use `vitlit data digits OUT`, which needs none"
        ) from error


def _cifar(name: str, root: str) -> dict[str, Split]:
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    train = kind(root, train=True, download=True)
    val = kind(root, train=False)
    return {
        split: [(part.classes[label], image) for image, label in zip(part.data, part.targets, strict=True)]
        for split, part in (("train", train), ("val", val))
    }


def _imagenette(root: str) -> dict[str, Split]:
    from torchvision.datasets import Imagenette

    splits: dict[str, Split] = {}
    for split in ("train", "val"):
        part = Imagenette(root, split, size="320px", download=split == "train", loader=Path)
        splits[split] = [(part.classes[label][0], path) for path, label in part]
    return splits


def _flowers102(root: str) -> dict[str, Split]:
    from torchvision.datasets import Flowers102

    splits: dict[str, Split] = {}
    for split in ("train", "val", "test"):
        part = Flowers102(root, split, download=split == "train", loader=Path)
        splits[split] = [(part.classes[label], path) for path, label in part]
    return splits


def _pets(root: str) -> dict[str, Split]:
    from torchvision.datasets import OxfordIIITPet

    splits: dict[str, Split] = {}
    for split, official in (("train", "trainval"), ("val", "test")):
        part = OxfordIIITPet(root, official, download=split == "train")
        # The public access decodes: only these two hold the files.
        splits[split] = [(part.classes[label], path) for path, label in zip(part._images, part._labels, strict=True)]
    return splits
