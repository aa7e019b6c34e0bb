"""Labels from a CSV file instead of class folders."""

import csv
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vitlit.data.index import Index, label_array
from vitlit.errors import UserError

SPLITS = ("train", "val", "test")
REQUIRED = ("path", "label")
COLUMNS = (*REQUIRED, "split", "group")
AS_NUMBERS = "--data.labels numbers, with the objective Regression, takes the labels as numbers"
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class Manifest(NamedTuple):
    """Classes; images of train, and of val and test if listed; whether an image may have several classes."""

    classes: list[str]
    splits: dict[str, Index]
    multi_label: bool


class _Row(NamedTuple):
    line: int
    path: str
    names: list[str]
    split: str
    group: str


def read_manifest(file: Path, root: Path, kind: str | None = None) -> Manifest:
    """Read a CSV file, UTF-8, with a header of the columns path, label and, optionally, split and group.

    Paths are absolute or relative to root. If any label is several, separated by |, every image may have several, or
    none (an empty label). Images of one group, such as one patient's, must be in one split, and a holdout takes all or
    none; an image without a group is its own. Other columns are ignored. Labels are "classes" or "numbers", by default
    numbers if all are and some are fractions; then there are no classes, and the labels are float64.
    """
    rows = list(_rows(file, root))
    if not rows:
        raise UserError(f"{file} has a header but no rows; add one for each image")
    if all(row.split != "train" for row in rows):
        raise UserError(f"{file} has no row of split train; training images need one")
    multi_label = any(len(row.names) > 1 for row in rows)
    names = {name for row in rows for name in row.names}
    numeric = {name for name in names if NUMBER.fullmatch(name)}
    fractions = any(not float(name).is_integer() for name in numeric)
    numbers = kind == "numbers" or (kind is None and not multi_label and fractions and 2 * len(numeric) > len(names))
    trained = {name for row in rows for name in row.names if numbers or row.split == "train"}
    for row in rows:
        if not row.names and not multi_label:
            raise UserError(f"{file}, line {row.line}: the label of {row.path} is empty; give one, or remove the row")
        if numbers and not (len(row.names) == 1 and row.names[0] in numeric):
            given = f"the label {'|'.join(row.names)!r} of {row.path} is not a number"
            raise UserError(f"{file}, line {row.line}: {given} such as 3.5; mend it, or give --data.labels classes")
        if unknown := [name for name in row.names if name not in trained]:
            where, offer = f"{file}, line {row.line}", f"; {AS_NUMBERS}" if numeric == names else ""
            raise UserError(f"{where}: {row.split} has the class {unknown[0]!r}, which the training images lack{offer}")
    if missing := [row for row in rows if not os.path.isfile(root / row.path)]:
        lacks = f"there is no file {root / missing[0].path} ({len(missing)} of {len(rows)} rows have none)"
        raise UserError(f"{file}, line {missing[0].line}: {lacks}; paths are relative to data.root")
    classes = [] if numbers else sorted(trained)
    number = {name: label for label, name in enumerate(classes)}
    splits = {}
    for split in SPLITS:
        if own := [row for row in rows if row.split == split]:
            if numbers:
                labels = np.array([float(row.names[0]) for row in own])
            else:
                labels = label_array([[number[name] for name in row.names] for row in own], len(classes), multi_label)
            groups = None
            if any(row.group for row in rows):
                groups = np.array([zlib.crc32((row.group or row.path).encode(errors="surrogateescape")) for row in own])
            splits[split] = Index.of(root, [row.path for row in own], labels, groups)
    return Manifest(classes, splits, multi_label)


def _rows(file: Path, root: Path) -> Iterator[_Row]:
    lines: dict[str, int] = {}
    groups: dict[str, _Row] = {}
    for line, fields in _read(file):
        label, split = fields["label"].strip(), fields.get("split", "train").strip()
        names = [name.strip() for name in label.split("|")] if label else []
        if not all(names):
            raise UserError(f"{file}, line {line}: the label {label!r} has an empty name next to a |; remove the |")
        if split not in SPLITS:
            raise UserError(f"{file}, line {line}: the split {split!r} is none of {', '.join(SPLITS)}")
        row = _Row(line, os.path.normpath(fields["path"]), names, split, fields.get("group", "").strip())
        if (first := lines.setdefault(os.path.normpath(root / row.path), line)) != line:
            raise UserError(f"{file}, line {line}: {row.path} is in line {first}, too; remove one")
        if row.group and (other := groups.setdefault(row.group, row)).split != split:
            both = f"the group {row.group!r} is in {split}, and in {other.split} by line {other.line}"
            raise UserError(f"{file}, line {line}: {both}; keep it in one, or give --data.holdout 10%")
        yield row


def _read(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened, strict=True)
            header = list(reader.fieldnames or [])
            _check_header(file, header)
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(f'{file}, line {reader.line_num}: not {len(header)} fields; quote commas: "a, b"')
                yield reader.line_num, row
    except OSError as error:
        raise UserError(f"cannot read data.manifest {file}: {error.strerror}; give a CSV file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8; save it as CSV UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.reader.line_num}: not valid CSV ({error})") from error


def _check_header(file: Path, header: list[str]) -> None:
    for name in header:
        column = name.strip().lower()
        if column in COLUMNS and (name != column or header.count(name) > 1):
            raise UserError(f"{file}: the column {name!r} must be {column!r}, once")
    for name in REQUIRED:
        if name not in header:
            lacks = f"{file} has no column {name!r}, only {', '.join(map(repr, header[:8])) or 'an empty line'}"
            raise UserError(f"{lacks}; the header must be path,label[,split][,group], with commas")
