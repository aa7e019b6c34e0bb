"""Data sets of Hugging Face, hf:OWNER/NAME or a folder of their parquet files: images in a column of a table."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitlit.data.folder import SPELLINGS
from vitlit.data.index import FolderFiles, Index, Names, label_array
from vitlit.data.manifest import Manifest
from vitlit.errors import UserError, need
from vitlit.files import read_file


@dataclass(frozen=True)
class TableFiles(FolderFiles):
    """Encoded images in the column `column` of a datasets.Dataset, which maps its file into memory."""

    table: Any
    column: str

    def read(self, row: int) -> bytes:
        image = self.table[row][self.column]
        if image is None:
            raise UserError(f"cannot read the image {self.path(row)}: its cell is empty")
        return image["bytes"] or read_file(image["path"])

    def stamp(self, rows: np.ndarray) -> bytes:
        status = [os.stat(file["filename"]) for file in self.table.cache_files]
        return repr([self.root, *((each.st_size, each.st_mtime_ns) for each in status)]).encode()


def parquet_files(root: str) -> dict[str, list[str]]:
    """The parquet files in a folder, or in its folder data, by the split that their names begin with."""
    found: dict[str, list[str]] = {}
    for file in sorted((*Path(root).glob("*.parquet"), *Path(root, "data").glob("*.parquet"))):
        for split, spellings in SPELLINGS.items():
            if file.name.lower().startswith(spellings):
                found.setdefault(split, []).append(str(file))
    return found


def is_table(root: str) -> bool:
    return root.startswith("hf:") or bool(parquet_files(root))


def read_table(root: str) -> Manifest:
    """The classes and splits of a data set; UserError if it has no images, or its columns do not say which they are.

    Images are the column of that type, or of structs with bytes. Labels are the column of class labels, or `label`:
    its numbers, or its texts in alphabetic order. Without one the images have no labels.
    """
    need("datasets")
    import datasets

    datasets.disable_progress_bars()
    name, _, revision = root.removeprefix("hf:").partition("@")
    try:
        if root.startswith("hf:"):
            loaded = datasets.load_dataset(name, revision=revision or None)
        else:
            loaded = datasets.load_dataset("parquet", data_files=parquet_files(root))
    except Exception as error:  # of the hub, of a file, or of the package's own
        why = " ".join(str(error).split())
        raise UserError(f"data.root {root} cannot be read by datasets ({type(error).__name__}: {why})") from error
    tables = {split: loaded[own] for split, spellings in SPELLINGS.items() for own in spellings if own in loaded}
    if "train" not in tables:
        raise UserError(f"data.root {root} has the splits {' '.join(loaded)}; training images need one named train")
    columns = tables["train"].features
    coded = [n for n, kind in columns.items() if isinstance(kind, dict) and {"bytes", "path"} <= kind.keys()]
    image = only(root, "image", coded + [n for n, kind in columns.items() if isinstance(kind, datasets.Image)])
    kinds = {name: getattr(kind, "feature", kind) for name, kind in columns.items()}  # of a list, its elements'
    typed = [name for name, kind in kinds.items() if hasattr(kind, "names")]
    label = only(root, "label", typed) if typed else "label" if "label" in kinds else None
    several = label is not None and kinds[label] is not columns[label]
    rows: dict[str, list[list[Any]]] = {
        split: [cell if several else [cell] for cell in table[label]] if label else [[-1]] * len(table)
        for split, table in tables.items()
    }
    classes = [] if label is None else getattr(kinds[label], "names", None)
    if classes is None:
        numbers = {value: number for number, value in enumerate(sorted({v for row in rows["train"] for v in row}))}
        if unknown := [value for each in rows.values() for row in each for value in row if value not in numbers]:
            raise UserError(f"data.root {root}: no training image has the label {unknown[0]!r} of another split")
        rows = {split: [[numbers[value] for value in row] for row in each] for split, each in rows.items()}
        classes = [str(value) for value in numbers]
    splits = {}
    for split, table in tables.items():
        encoded = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        paths = [path.as_py() for chunk in encoded.data.column(image).chunks for path in chunk.field("path")]
        names = Names.pack(path or f"{split}/{row}" for row, path in enumerate(paths))
        files = TableFiles(root, names, encoded, image)
        splits[split] = Index(files, np.arange(len(table)), label_array(rows[split], len(classes), several))
    return Manifest(classes, splits, several)


def only(root: str, what: str, names: list[str]) -> str:
    if len(names) > 1 and what in names:
        return what
    if len(names) != 1:
        found = f"the columns {' '.join(names)}" if names else "no column"
        raise UserError(f"data.root {root} has {found} of {what}s; rename the one that is meant to {what}")
    return names[0]
