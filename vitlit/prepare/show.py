"""`vitlit data show RUN --step N`: which images a step of a run was trained on."""

import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vitlit.errors import CommandParser, UserError
from vitlit.run.config import read_config

if TYPE_CHECKING:
    from vitlit.data.module import ImageFolderData

ABOUT = """\
Print the images of an optimiser step of a run as CSV: row of the global batch, index, path, label, and repeat, which
tells the augmentations of an image apart. They follow from the run's config, so that any step can be asked for, trained
or not. Of a run with data.on_bad_image skip, bad_images.csv says which of them was replaced.
"""


def run(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    parser = CommandParser("vitlit data show", ABOUT)
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run")
    parser.add_argument("--step", type=int, required=True, help="counted from 0, as in metrics.csv")
    given = parser.parse_args(arguments)
    if given.step < 0:
        raise UserError(f"step {given.step} is less than 0")
    file = given.run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{given.run} is not a run's folder: it has no config.yaml")
    data = stored(file)
    index = data.split("train")
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["row", "index", "path", "label", "repeat"])
    for row, sample in enumerate(data.samples(given.step)):
        labels = index.labels[sample.index]
        numbers = labels.nonzero()[0] if labels.ndim else [labels] if labels >= 0 else []
        names = [data.classes[int(number)] for number in numbers]
        table.writerow([row, sample.index, index.path(sample.index), "|".join(names), sample.repeat])
    return 0


def stored(file: Path) -> "ImageFolderData":
    """The data of a run's config, as far as the order of samples depends on it."""
    config = read_config(file)
    given = config.get("data")
    if not isinstance(given, dict):
        raise UserError(f"{file} is not a run's: it has no data")
    from vitlit.data.module import ImageFolderData  # torch and Lightning, which a mistake need not wait for

    if given.get("seed") is None:
        given["seed"] = config.get("seed_everything", 0)
    names = ("root", "manifest", "holdout", "batch_size", "repeats", "balanced", "seed")
    return ImageFolderData(**{name: given[name] for name in names if name in given})
