"""`vitlit report RUN [--out FILE]`: one HTML page of a run."""

import sys
from collections import Counter
from contextlib import redirect_stdout, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vitlit.callbacks.mistakes import readable
from vitlit.data.folder import parse_share
from vitlit.data.index import Index
from vitlit.data.splits import Splits
from vitlit.errors import CommandParser, UserError
from vitlit.evaluation import interval
from vitlit.evaluation.calibration import binned, calibration_error
from vitlit.evaluation.classify import balanced
from vitlit.files import check_new, expand, from_here, read_csv
from vitlit.inspection.figures import draw_images, draw_reliability
from vitlit.inspection.report import Picture, Section, curves, encode, write_page
from vitlit.inspection.sheet import thumbnail
from vitlit.model import ViT
from vitlit.run.history import VALIDATION, History, in_words, mistakes
from vitlit.weights import load

ABOUT = """\
Write what was trained on what, its curves and best numbers, the confusion matrix, the worst mistakes, calibration and
attention as one HTML page, which opens without a network. Training ends by writing it, unless run.report is false.
"""
WORST, CONFUSED, ATTENDED = 24, 10, 6  # mistakes, pairs of classes, and images with attention
MOST_CLASSES = 2000  # of a confusion matrix


def run(arguments: list[str]) -> int:
    parser = CommandParser("vitlit report", ABOUT)
    parser.add_argument("run", metavar="RUN", type=expand, help="the folder of a run, whether or not it has ended")
    parser.add_argument("--out", metavar="FILE", type=Path, help="by default report.html in the run's folder")
    given = parser.parse_args(arguments or ["--help"])
    check_new(given.out)
    out = given.out or Path(given.run, "report.html")
    with redirect_stdout(sys.stderr):  # what is said of the data's folder
        Report(History(Path(given.run))).write(out)
    print(from_here(out))
    return 0


class Report:
    """The sections of a run's page. What a section lacks is a UserError, whose message takes its place."""

    def __init__(self, run: History, splits: Splits | None = None) -> None:
        self.run, self._splits = run, splits
        self.last = run.commands[-1] if run.commands else {}

    def section(self, title: str) -> Section:
        try:
            return SECTIONS[title](self, title)
        except (UserError, OSError) as why:
            return Section(title, f"Left out: {why}.")

    def write(self, out: Path) -> None:
        run, sections = self.run, [self.section(title) for title in SECTIONS]
        said = [run.state, f"epoch {run.epoch}", str(run.time), str(self.last.get("date", ""))[:10]]
        if best := run.best:
            said.insert(1, f"best {best.metric} {in_words(best.metric, best.value)}")
        write_page(out, run.name, " · ".join(said), sections)

    @cached_property
    def vit(self) -> ViT:
        return load(self.run.path)

    @cached_property
    def classes(self) -> list[str]:
        """In the order of the data; none if the weights are gone."""
        try:
            return self.vit.classes
        except UserError:
            return []

    @cached_property
    def index(self) -> Index:
        """The validation images; UserError or OSError where they are not at hand."""
        data = self.run.config["data"]
        if self._splits is None:
            self._splits = Splits(data["root"], parse_share(data["holdout"]), data["manifest"], data.get("labels"))
            self._splits.expect(self.classes)
        return self._splits["val"]

    @cached_property
    def images(self) -> list[dict[str, str]]:
        """What the best weights make of each validation image, or UserError."""
        if found := read_csv(self.run.path / VALIDATION):
            return found
        raise UserError(f"the run has no {VALIDATION}, which a validation writes where each image has one class")

    @cached_property
    def right(self) -> np.ndarray:
        return np.array([row["label"] == row["prediction"] for row in self.images], float)

    def trained(self, title: str) -> Section:
        stage, data, trainer = (self.run.config[part] for part in ("model", "data", "trainer"))
        options, best = stage["init_args"], self.run.best
        optimizer, objective = options["optimizer"], options.get("objective") or {"class_path": "Supervised"}
        with_lr = f"{name_of(optimizer)}, learning rate {optimizer['init_args'].get('lr')}"
        images = ", ".join(f"{count:,} {split}" for split, count in self.last.get("images", {}).items())
        images += f" (held out, {data['holdout']} of train)" if images and data["holdout"] else ""
        rows = {
            "Stage": f"{name_of(stage)}, {name_of(objective)}",
            "Network": f"ViT with {self.last['parameters']:,} parameters" if "parameters" in self.last else None,
            "Weights to start from": options.get("init_from") or "none",
            "Data": data["root"] + (f", manifest {data['manifest']}" if data["manifest"] else ""),
            "Images": f"{images}; {self.last['labels']}" if images else None,
            "Image size": f"{data['image_size']} pixels" if data["image_size"] else None,
            "Batch": f"{data['batch_size']} images",
            "Optimizer": f"{with_lr}, weight decay {optimizer['init_args'].get('weight_decay')}",
            "Length": f"{trainer['max_epochs']} epochs" if trainer["max_epochs"] else f"{trainer['max_steps']} steps",
            "Seen": f"{best.step * data['batch_size']:,} images up to the best weights" if best else None,
            "Seed": self.run.config.get("seed_everything"),
            "Command": self.last.get("command"),
            "In": self.last.get("folder"),
        }
        return Section(title, rows=[(name, value) for name, value in rows.items() if value is not None])

    def results(self, title: str) -> Section:
        best = self.run.best
        if best is None:
            raise UserError("nothing has been validated yet")
        why = f"when {best.metric} was best" if best.metric != "step" else "the last, as no metric tells which are best"
        text = f"best.ckpt has the weights after step {best.step:,}, in epoch {best.row['epoch'] + 1:.0f}, {why}."
        limits = self.limits(best.row)
        if limits:
            text += f" Intervals are those of the bootstrap over {len(self.right):,} validation images, which chose the"
            text += " weights: how a number varies with other images of this kind, not with other trainings."
        rows = [
            (name, in_words(name, best.row[name]), limits.get(name, "-"), in_words(name, self.run.last(name)))
            for name in best.row
            if name.startswith("val/")
        ]
        return Section(title, text, ("metric", "best", "95 % interval", "last"), rows)

    def limits(self, best: dict[str, float]) -> dict[str, str]:
        """The intervals of the best metrics that the validation images tell."""
        if not (self.run.path / VALIDATION).is_file():
            return {}
        labels = np.unique([row["label"] for row in self.images], return_inverse=True)[1]
        within = np.array([int(row["above"]) < 5 for row in self.images], float)
        statistics: dict[str, Any] = {
            "val/top1": (np.mean, self.right),
            "val/top5": (np.mean, within),
            "val/top1_macro": (balanced, self.right, labels),
        }
        return {
            name: " to ".join(in_words(name, limit) for limit in interval(*measure))
            for name, measure in statistics.items()
            # Unless the images are of another row: a run may never be better than the one that it branched off.
            if abs(measure[0](*measure[1:]) - best.get(name, np.inf)) < 1e-4
        }

    def curves(self, title: str) -> Section:
        if not self.run.rows:
            raise UserError("nothing has been logged yet")
        return Section(title, pictures=curves({self.run.name: self.run.rows}))

    def confusion(self, title: str) -> Section:
        pairs = Counter((row["label"], row["prediction"]) for row in self.images)
        of_label = Counter(row["label"] for row in self.images)
        classes = self.classes or sorted({name for pair in pairs for name in pair})
        number = {name: i for i, name in enumerate(classes)}
        counts = [(number[label], number[guess], count) for (label, guess), count in sorted(pairs.items())]
        cells = {(row, column): (count, count / of_label[classes[row]]) for row, column, count in counts}
        confused = [item for item in pairs.most_common() if item[0][0] != item[0][1]][:CONFUSED]
        rows = [(*pair, count, f"{100 * count / of_label[pair[0]]:.0f} %") for pair, count in confused]
        text = f"Of {len(self.images):,} images. Rows are labels, columns predictions; below, what is confused most."
        matrix = {"classes": classes, "counts": counts, "cells": cells}
        if len(classes) > MOST_CLASSES:
            text, matrix = f"Of {len(classes):,} classes, the pairs that are confused most.", {}
        return Section(title, text, ("label", "prediction", "images", "of the label's"), rows, matrix=matrix)

    def mistakes(self, title: str) -> Section:
        vit: Any
        worst, found = mistakes(self.images), []
        text = f"{len(worst):,} of {len(self.images):,} validation images are wrong, the most confident first."
        try:
            index, vit = self.index, self.vit
        except (UserError, OSError) as why:
            return Section(title, f"{text} Without pictures: {why}.")
        for row, image in readable(worst[:WORST], index, vit.preprocess):
            caption = f"{row['prediction']} {100 * float(row['probability']):.0f} %, is {row['label']}"
            alt = f"{Path(row['path']).name}, an image of {row['label']}"
            found.append(Picture(encode(thumbnail(image)), alt, caption))
        return Section(title, text, pictures=found)

    def calibration(self, title: str) -> Section:
        columns = ("probability", "label_probability")
        sure, own = (np.array([float(row[column]) for row in self.images]) for column in columns)
        measured: dict[str, Any] = {
            "Expected calibration error": (calibration_error, sure, self.right),
            "Negative log-likelihood": (np.mean, -np.log(np.maximum(own, 1e-12))),
        }
        rows = []
        for name, (statistic, *values) in measured.items():
            # Images drawn anew add to a calibration error, which chance can only raise: no interval of it holds.
            ends = "-" if statistic is calibration_error else "{:.4f} to {:.4f}".format(*interval(statistic, *values))
            rows.append((name, f"{statistic(*values):.4f}", ends))
        found = binned(sure, self.right)
        bins = zip(found.images, found.confidence, found.accuracy, strict=True)
        said = "; ".join(f"of {n:,} near {at:.2f}, {100 * share:.0f} %" for n, at, share in bins if n)
        drawn = encode(draw_reliability({self.run.name: found}))
        alt = f"Reliability diagram. Predictions that are right: {said}."
        text = ""
        with suppress(UserError):  # the weights may be gone
            if self.vit.temperature != 1:
                text = f"Before the temperature {self.vit.temperature:.4g}, by which `vitlit predict` divides logits."
        return Section(title, text, ("measure", "value", "95 % interval"), rows, [Picture(drawn, alt)])

    def attention(self, title: str) -> Section:
        vit, index = self.vit, self.index
        if vit.preprocess is None:
            raise UserError("the weights tell no normalisation of images")
        chosen = np.linspace(0, len(index) - 1, min(ATTENDED, len(index))).astype(int).tolist()
        figure = draw_images(vit, vit.preprocess([index.read(number) for number in chosen]))
        names = ", ".join(Path(index.path(number)).name for number in chosen)
        rows = "From top to bottom: the images, what the last block attends to, rollout through all blocks, and the "
        rows += "first three principal components of the patch features."
        return Section(title, rows, pictures=[Picture(encode(figure, 80), f"{names}. {rows}")])

    def environment(self, title: str) -> Section:
        rows = [("devices", self.last.get("devices", "not known"))]
        rows += [(name, version) for name, version in self.last.get("versions", {}).items() if version]
        rows += [(f"commit of {name}", commit) for name, commit in self.last.get("commit", {}).items()]
        rows += [(f"{each['date']} {each['host']}", each.get("ended", self.run.state)) for each in self.run.commands]
        return Section(title, rows=rows, folded=yaml.safe_dump(self.run.config, sort_keys=False, allow_unicode=True))


SECTIONS = {
    "Trained": Report.trained,
    "Results": Report.results,
    "Curves": Report.curves,
    "Confusion matrix": Report.confusion,
    "Worst mistakes": Report.mistakes,
    "Calibration": Report.calibration,
    "Attention": Report.attention,
    "Environment": Report.environment,
}


def name_of(given: dict[str, Any]) -> str:
    return str(given["class_path"]).rpartition(".")[2]
