"""`vitlit data NAME OUT`: public data sets as folders of class folders."""

import re
import tempfile
from collections.abc import Iterable
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeAlias

from vitlit.errors import CommandParser, UserError
from vitlit.files import whole_folder

Split: TypeAlias = Iterable[tuple[str, Any]]  # (class name, a file or 8-bit pixels)

HOSTS = {
    "cifar10": "www.cs.toronto.edu",
    "cifar100": "www.cs.toronto.edu",
    "imagenette": "s3.amazonaws.com",
    "flowers102": "www.robots.ox.ac.uk",
    "pets": "www.robots.ox.ac.uk",
}
NAMES = ("digits", *HOSTS)
DIGITS = "data/digits"  # the root that `vitlit fit` makes where it is missing
HELP = f"""\
Write a public data set as OUT/{{train,val}}/CLASS/*. NAME: {" ".join(NAMES)}

`vitlit data check`, `shard`, `show` and `imagenet` are commands of their own.
"""


def run(arguments: list[str]) -> int:
    parser = CommandParser("vitlit data", HELP)
    parser.add_argument("name", metavar="NAME", choices=NAMES)
    parser.add_argument("out", metavar="OUT", type=Path)
    given = parser.parse_args(arguments or ["--help"])
    write(given.name, given.out)
    return 0


def write(name: str, out: Path) -> None:
    """Write a data set as `out/SPLIT/CLASS/FILE` and print one line for each split; docs/data.md lists their sizes."""
    with whole_folder(out) as partial, tempfile.TemporaryDirectory(dir=partial) as root:
        splits = _digits() if name == "digits" else _download(name, root)
        for split, pairs in splits.items():
            _write_split(pairs, partial / split)
    print_counts(out, splits)


def print_counts(out: Path, splits: Iterable[str]) -> None:
    for split in splits:
        images = [len(list(folder.iterdir())) for folder in (out / split).iterdir() if folder.is_dir()]
        print(f"{out / split}: {sum(images):,} images, {len(images):,} classes")


def _write_split(pairs: Split, folder: Path) -> None:
    from PIL import Image

    for number, (name, image) in enumerate(pairs):
        class_folder = folder / re.sub(r"[^\w-]+", "_", name).strip("_")
        class_folder.mkdir(parents=True, exist_ok=True)
        if isinstance(image, Path):
            image.rename(class_folder / image.name)
        else:
            Image.fromarray(image).save(class_folder / f"{number:05d}.png")


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
    splits = ("train", "val", "test") if name == "flowers102" else ("train", "val")
    try:
        return {split: _fetch_split(name, split, root) for split in splits}
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: torchvision's for a wrong checksum
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = "try again with a network, or use `vitlit data digits OUT`, which needs none"
        raise UserError(f"{name} could not be downloaded from {HOSTS[name]} ({reason}): {remedy}") from error


def _fetch_split(name: str, split: str, root: str) -> Split:
    from torchvision import datasets

    first = split == "train"
    part: Any
    match name:
        case "imagenette":
            part = pairs = datasets.Imagenette(root, split, size="320px", download=first, loader=Path)
        case "flowers102":
            part = pairs = datasets.Flowers102(root, split, download=first, loader=Path)
        case "pets":
            part = datasets.OxfordIIITPet(root, "trainval" if first else "test", download=first)
            pairs = zip(part._images, part._labels, strict=True)  # the files; the public access decodes
        case _:
            part = getattr(datasets, name.upper())(root, first, download=first)
            pairs = zip(part.data, part.targets, strict=True)
    classes = [kind if isinstance(kind, str) else kind[0] for kind in part.classes]  # Imagenette's have synonyms
    return [(classes[label], image) for image, label in pairs]
