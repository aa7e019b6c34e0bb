"""ImageNet's other test sets: some of its classes (A, R), folders of other names (V2, Sketch), other labels (ReaL)."""

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path

from vitlit.errors import UserError


def outputs(folders: Sequence[str], names: Sequence[str], count: int, file: Path | None = None) -> list[int]:
    """The numbers of those of a head's `count` outputs, with names or without any, that stand for class folders.

    Folders are named as the outputs, or are as many as outputs without names. A CSV `file` of rows folder,class gives
    the name or number of each one's output instead. UserError if a folder has no output, or two have the same.
    """
    numbers = {name: number for number, name in enumerate(names)}
    if file is None:
        told = {name: name for name in folders}
        numbers = numbers or (dict(zip(folders, range(count), strict=True)) if len(folders) == count else {})
    else:
        try:
            told = {folder: name.strip() for folder, name in csv.reader(file.read_text("utf-8-sig").splitlines())}
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(f"{file} is not a CSV file of rows folder,class ({error})") from error
        numbers = {str(number): number for number in range(count)} | numbers
    found = {numbers[told[folder]]: folder for folder in folders if told.get(folder) in numbers}
    if wrong := next((folder for folder in folders if folder not in found.values()), None):
        said = f"{file} gives it {told.get(wrong, 'nothing')}; give it one of its own, by name or from 0 to {count - 1}"
        why = said if file else "none by its name; --classes FILE tells which"
        raise UserError(f"the class {wrong!r} has no output of its own of the head's {count}: {why}")
    return list(found)


def read_real(file: Path, paths: Sequence[str], folders: Sequence[str]) -> list[list[int]]:
    """The ReaL labels (2006.07159) of images of ILSVRC 2012's val split, which are found by their numbered names.

    The file is google-research/reassessed-imagenet's real.json: for each image the numbers of the classes that fit it,
    in the order of the WordNet ids, by which the class folders must be named. UserError if something is otherwise.
    """
    try:
        real = json.loads(file.read_bytes())
        classes = 1 + max(number for numbers in real for number in numbers)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} holds no ReaL labels, a JSON list of lists of class numbers ({error})") from error
    if classes != len(folders) or not all(re.fullmatch(r"n\d{8}", name) for name in folders):
        needs = f"folders named by the WordNet ids of its {classes} classes, such as n01440764"
        raise UserError(f"{file} needs {needs}; there are {len(folders)}, such as {folders[0]}")
    found = [re.search(r"ILSVRC2012_val_(\d{8})\.\w+$", path) for path in paths]
    numbers = [int(name[1]) if name else 0 for name in found]
    if wrong := next((path for path, number in zip(paths, numbers, strict=True) if not 0 < number <= len(real)), None):
        raise UserError(f"{file} has no labels of {wrong}; it knows images by names as ILSVRC2012_val_00000001.JPEG")
    return [real[number - 1] for number in numbers]
