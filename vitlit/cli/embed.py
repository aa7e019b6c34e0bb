"""`vitlit embed WEIGHTS ROOT OUT`: features as a table, and what they make suspect."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitlit.callbacks.predictions import write_csv
from vitlit.data.folder import SPELLINGS, scan_classes
from vitlit.data.index import Index
from vitlit.data.shards import is_shards
from vitlit.data.splits import Splits
from vitlit.errors import CommandParser, UserError, check_range
from vitlit.files import expand, save_arrays, whole_file, writing
from vitlit.prepare.features import extract, ready
from vitlit.prepare.suspects import suspects

HELP = """\
Write each image's path (relative to ROOT), split, class and features, float32, as a table (OUT.parquet) or as arrays of
these names (OUT.npz). A folder of images without classes will do. --neighbours K also writes OUT-near_duplicates.csv,
of images that show the same picture, and OUT-label_errors.csv, of labels that are likely wrong, likeliest first.
"""
LISTS = {
    "near_duplicates": ("path", "split", "other", "other_split", "difference"),
    "label_errors": ("path", "split", "label", "guess", "label_probability", "guess_probability"),
}


def run(arguments: list[str]) -> int:
    parser = CommandParser("vitlit embed", HELP)
    parser.add_argument("weights", metavar="WEIGHTS", help="a run's folder, a weight file, or hf:OWNER/NAME")
    parser.add_argument("root", metavar="ROOT", help="as --data.root: a folder, or shards")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--split", choices=list(SPELLINGS), help="this alone; by default all that there are")
    parser.add_argument("--image_size", type=int, default=0, metavar="N", help="pixels; by default the weights'")
    parser.add_argument("--manifest", metavar="FILE", help="as --data.manifest; its groups stay in one fold")
    parser.add_argument("--neighbours", type=int, metavar="K", help="nearest images to compare each with, such as 10")
    given = parser.parse_args(arguments or ["--help"])
    check_range("vitlit embed", 1, neighbours=given.neighbours)
    if given.out.suffix not in (".parquet", ".npz"):
        parser.error(f"OUT is {given.out}; name a file that ends in .parquet or .npz")
    if given.out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise UserError(f"{given.out} needs pyarrow: pip install pyarrow, or name an .npz file")
    lists = {name: given.out.with_name(f"{given.out.stem}-{name}.csv") for name in LISTS if given.neighbours}
    if there := next((file for file in (given.out, *lists.values()) if file.exists()), None):
        raise UserError(f"{there} exists: name another file, or remove it first")
    with writing(given.out, "name another file"):  # now, not when all is computed
        given.out.parent.mkdir(parents=True, exist_ok=True)
    indices, classes = images(given.root, given.split, given.manifest)
    vit = ready(given.weights, given.image_size)
    parts = list(indices.values())
    features = torch.cat([extract(vit, index, ["pooled"])["pooled"] for index in parts]).numpy()
    names = [relative(index.path(row), given.root) for index in parts for row in range(len(index))]
    splits = [split for split, index in indices.items() for _ in range(len(index))]
    labels = [index.label_text(row, classes) for index in parts for row in range(len(index))]
    found: dict[str, Any] = dict.fromkeys(lists)
    if given.neighbours:
        pairs, differences, errors = suspects(features, parts, vit.preprocess.ground, given.neighbours)
        places, apart = list(zip(names, splits, strict=True)), [f"{each:.3f}" for each in differences]
        found["near_duplicates"] = [(*places[i], *places[j], each) for (i, j), each in zip(pairs, apart, strict=True)]
        if errors:
            each = zip(*(part.tolist() for part in errors), strict=True)
            found["label_errors"] = [
                (*places[row], labels[row], classes[guess], *map("{:.4f}".format, p)) for row, guess, p in each
            ]
    with writing(given.out, "name another file"):
        write_table(given.out, {"path": names, "split": splits, "class": labels}, features)
        print(f"{given.out}: {len(names):,} images, {features.shape[1]:,} features")
        for name, file in lists.items():
            if found[name] is None:
                print(f"{file}: not written, as the images do not have one of several classes each")
            else:
                write_csv(file, LISTS[name], found[name])
                print(f"{file}: {len(found[name]):,} rows")
    return 0


def images(root: str, split: str | None, manifest: str | None) -> tuple[dict[str, Index], list[str]]:
    """The images of a split, or of each that there is, and the classes; without folders of splits the split is ""."""
    splits, here = Splits(root, 0.0, manifest), Path(expand(root))
    listed = manifest is not None or is_shards(splits.root)
    present = [name for name in SPELLINGS if (here / name).is_dir()]
    if not (listed or present or split) and here.is_dir():
        classes, index = scan_classes(here)
        return {"": index}, classes
    splits.scan()
    names = [split] if split else [name for name in SPELLINGS if splits.has(name)]
    return {name: splits[name] for name in names}, splits.classes


def relative(path: str, root: str) -> str:
    return path.removeprefix(f"{root.rstrip('/')}/") if "://" in root else os.path.relpath(path, expand(root))


def write_table(out: Path, columns: dict[str, list[str]], features: np.ndarray) -> None:
    """Write the table of so many columns of text and one of features (N, D), in the format of OUT's ending."""
    if out.suffix == ".npz":
        save_arrays(out, {name: np.array(column) for name, column in columns.items()} | {"features": features})
        return
    import pyarrow
    from pyarrow import parquet

    vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(features.ravel()), features.shape[1])
    try:
        table = pyarrow.table(columns | {"features": vectors})
    except UnicodeEncodeError as error:
        raise UserError(f"{error.object!r} is no UTF-8 text, which is all that parquet holds; name an .npz") from error
    with whole_file(out) as partial:
        parquet.write_table(table, partial)
