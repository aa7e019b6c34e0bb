"""Labels from a CSV file in place of class folders."""

import csv
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vitlit.data.index import Index
from vitlit.errors import UserError

SPLITS = ("train", "val", "test")
REQUIRED = ("path", "label")
COLUMNS = (*REQUIRED, "split", "group")


class Manifest(NamedTuple):
    """What a file of labels says.

    Attributes:
        classes: names in the order of their numbers, sorted.
        splits: the images of train, and of val and test where the file has them, in its order.
        multi_label: whether an image may have several classes, or none.
    """

    classes: list[str]
    splits: dict[str, Index]
    multi_label: bool


class _Row(NamedTuple):
    line: int
    path: str
    names: list[str]
    split: str
    group: str


def read_manifest(file: Path, root: Path) -> Manifest:
    """Read a CSV file, UTF-8, whose header has the columns path, label and, where there are such, split and group.

    Paths are absolute or relative to root; a split is train, val or test. Where some label is several, separated by |,
    every image may have several, or none, for which the label is empty. Images of one group, such as those of one
    patient, may not be in several splits, and a holdout takes all of them or none; an empty group is the image's own.
    Other columns are ignored.

    Args:
        file: the CSV file.
        root: the folder of the images.

    Raises:
        UserError: the file, or what a line of it says, is wrong; the message names both.
    """
    rows: list[_Row] = []
    multi_label = False
    lines: dict[str, int] = {}
    for line, fields in _read(file):
        path, label, split = fields["path"], fields["label"].strip(), fields.get("split", "train").strip()
        names = [name.strip() for name in label.split("|")] if label else []
        multi_label |= len(names) > 1
        if not path:
            raise UserError(f"{file}, line {line}: the path is empty")
        if not all(names):
            raise UserError(f"{file}, line {line}: the label {label!r} has an empty name beside a |; remove the |")
        if split not in SPLITS:
            raise UserError(f"{file}, line {line}: the split {split!r} is none of {', '.join(SPLITS)}")
        path = os.path.normpath(path)
        first = lines.setdefault(os.path.normpath(root / path), line)
        if first != line:
            raise UserError(f"{file}, line {line}: {path} is in line {first}, too; remove one")
        rows.append(_Row(line, path, names, split, fields.get("group", "").strip()))
    _check(file, root, rows, multi_label)

    classes = sorted({name for row in rows for name in row.names})
    number = {name: label for label, name in enumerate(classes)}
    splits = {}
    for split in SPLITS:
        own = [row for row in rows if row.split == split]
        if not own:
            continue
        if multi_label:
            labels = np.zeros((len(own), len(classes)), bool)
            for place, row in enumerate(own):
                labels[place, [number[name] for name in row.names]] = True
        else:
            labels = np.array([number[row.names[0]] for row in own])
        groups = None
        if any(row.group for row in own):
            groups = np.array([zlib.crc32((row.group or row.path).encode(errors="surrogateescape")) for row in own])
        splits[split] = Index.of(root, [row.path for row in own], labels, groups)
    return Manifest(classes, splits, multi_label)


def _read(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV file with the numbers of their lines."""
    reader = None
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened, strict=True)
            _check_header(file, list(reader.fieldnames or []))
            for row in reader:
                if None in row or None in row.values():
                    wanted = len(reader.fieldnames or ())
                    raise UserError(
                        f"{file}, line {reader.line_num}: it has not the header's {wanted} fields; "
                        'what contains a comma must be "quoted"'
                    )
                yield reader.line_num, row
    except OSError as error:
        raise UserError(f"cannot read data.manifest {file}: {error.strerror}; give a CSV file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8; save it as CSV UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.reader.line_num if reader else 1}: it is not CSV ({error})") from error


def _check_header(file: Path, header: list[str]) -> None:
    if not header:
        raise UserError(f"{file} is empty; it needs a header with the columns {' and '.join(REQUIRED)}")
    for name in header:
        meant = name.strip().lower()
        if meant in COLUMNS and (name != meant or header.count(name) > 1):
            raise UserError(f"{file}: the column {name!r} must be {meant!r}, once")
    for name in REQUIRED:
        if name not in header:
            found = ", ".join(map(repr, header[:8])) + (f" and {len(header) - 8:,} more" if len(header) > 8 else "")
            raise UserError(
                f"{file} has no column {name!r} but {found}; the header must be path,label[,split][,group], with commas"
            )


def _check(file: Path, root: Path, rows: list[_Row], multi_label: bool) -> None:
    """Raise UserError for what is wrong with the rows together."""
    if not rows:
        raise UserError(f"{file} has a header but no rows; add one for each image")
    known = {name for row in rows for name in row.names if row.split == "train"}
    if all(row.split != "train" for row in rows):
        raise UserError(f"{file} has no row of split train; training images need one")
    for row in rows:
        if not row.names and not multi_label:
            raise UserError(f"{file}, line {row.line}: the label of {row.path} is empty; give one, or remove the row")
        for name in row.names:
            if name not in known:
                raise UserError(
                    f"{file}, line {row.line}: {row.split} has the class {name!r}, which the training images lack"
                )
    parted: dict[str, _Row] = {}
    for row in rows:
        first = parted.setdefault(row.group, row) if row.group else row
        if first.split != row.split:
            raise UserError(
                f"{file}, line {row.line}: the group {row.group!r} is in {row.split}, and in {first.split} by line "
                f"{first.line}; keep it in one, or leave the split out and give --data.holdout 10%"
            )
    missing = [row for row in rows if not os.path.isfile(root / row.path)]
    if missing:
        others = f" ({len(missing)} such rows)" if len(missing) > 1 else ""
        raise UserError(
            f"{file}, line {missing[0].line}: there is no file {root / missing[0].path}{others}; "
            "paths are relative to data.root"
        )
