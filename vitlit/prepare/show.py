"""`vitlit data show RUN --step N`: the images that a step of a run is trained on."""

import csv
import sys
from contextlib import redirect_stdout
from pathlib import Path

from vitlit.errors import CommandParser, check_range
from vitlit.run.history import History

ABOUT = """\
Print the images of an optimiser step as CSV: row of the global batch, index, path, label, and repeat, which tells the
augmentations of an image apart. They follow from the run's config alone, so any step will do, trained or not. With
data.on_bad_image skip, the run's bad_images.csv lists the images that were replaced.
"""


def run(arguments: list[str]) -> int:
    parser = CommandParser("vitlit data show", ABOUT)
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run")
    parser.add_argument("--step", type=int, required=True, help="counted from 0, as in metrics.csv")
    given = parser.parse_args(arguments)
    check_range("vitlit data show", 0, step=given.step)
    config = History(given.run).config
    stored = config["data"]
    if stored.get("seed") is None:
        stored["seed"] = config.get("seed_everything", 0)
    from vitlit.data import ImageFolderData  # loads torch and Lightning, which a mistake need not wait for

    # These decide the order of samples.
    options = ("root", "manifest", "labels", "holdout", "batch_size", "repeats", "balanced", "seed")
    data = ImageFolderData(**{name: stored[name] for name in options if name in stored})
    with redirect_stdout(sys.stderr):  # what is said of the folder is no CSV
        index = data.split("train")
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["row", "index", "path", "label", "repeat"])
    for row, sample in enumerate(data.samples(given.step)):
        label = index.label_text(sample.index, data.classes)
        table.writerow([row, sample.index, index.path(sample.index), label, sample.repeat])
    return 0
