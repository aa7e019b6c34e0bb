"""What the folder of a run tells of it: its settings, how far it came, and its numbers."""

import json
import math
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vitlit.errors import UserError
from vitlit.files import read_csv
from vitlit.run.config import Loader
from vitlit.run.folder import LOCK, settings
from vitlit.run.lock import held

VALIDATION = "validation.csv"


class Measured(NamedTuple):
    """The best value of the metric that a run monitors, and the row of metrics.csv that it is in."""

    metric: str
    value: float
    row: dict[str, float]

    @property
    def step(self) -> int:
        """How many steps had been trained."""
        return int(self.row["step"]) + 1


class History:
    """The run in a folder, whether or not it has ended; UserError if there is none.

    `settings` are the config's keys and values, without those that change how a run is computed and not what, `rows`
    the numbers of metrics.csv, and `commands` what worked on the run.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        try:
            self.config: dict[str, Any] = yaml.load((path / "config.yaml").read_text(), Loader)
        except yaml.YAMLError as error:
            raise UserError(f"{path / 'config.yaml'} is damaged; restore it") from error
        except OSError:
            self.config = {}
        if not (isinstance(self.config, dict) and {"data", "model"} <= self.config.keys()):
            raise UserError(f"{path} is not the folder of a run; `vitlit runs ROOT` lists those in ROOT")
        self.settings = settings(self.config)
        kept = read_csv(path / "metrics.csv")
        self.rows = [{name: float(cell) for name, cell in row.items() if cell} for row in kept]
        file = path / "run.json"
        self.commands: list[dict[str, Any]] = json.loads(file.read_text())["commands"] if file.is_file() else []

    @property
    def state(self) -> str:
        if (self.path / "finished.json").is_file():
            return "finished"
        return "running" if held(self.path / LOCK) else "interrupted"

    @cached_property
    def best(self) -> Measured | None:
        """None if nothing was validated."""
        about = {"monitor": "val/loss", "mode": "min", **(self.commands[-1] if self.commands else {})}
        metric, pick = about["monitor"], min if about["mode"] == "min" else max
        validated = [row for row in self.rows if any(name.startswith("val/") for name in row)]
        found = [row for row in validated if not math.isnan(row.get(metric, math.nan))]
        return Measured(metric, (row := pick(found, key=lambda row: row[metric]))[metric], row) if found else None

    @property
    def epoch(self) -> int:
        """The epoch that it is in, or ended with, counted from 1; 0 if it logged nothing."""
        return int(self.rows[-1]["epoch"]) + 1 if self.rows else 0

    @property
    def time(self) -> timedelta:
        """How long commands have worked on it; one that is killed counts until its last row of metrics.csv."""
        seconds = sum(each.get("seconds", 0) for each in self.commands)
        if self.rows and self.commands and "seconds" not in self.commands[-1]:
            began = datetime.fromisoformat(self.commands[-1]["date"]).timestamp()
            seconds += max(0, self.rows[-1]["unix_seconds"] - began)
        return timedelta(seconds=round(seconds))

    def last(self, metric: str) -> float:
        return next(row[metric] for row in reversed(self.rows) if metric in row)


def differing(runs: list[History]) -> dict[str, list[str]]:
    """The settings in which runs differ, and each run's value, "-" where it has none.

    Where a run lacks a whole group of keys, such as those of an objective, it is the class of the group that differs.
    """
    found = {}
    groups = [{key.rpartition(".")[0] for key in run.settings} for run in runs]
    for key in sorted(set().union(*(run.settings for run in runs))):
        group, _, last = key.rpartition(".")
        values = [str(run.settings.get(key, "-")) for run in runs]
        if last == "class_path":
            found[group] = [value.rpartition(".")[2] for value in values]
        elif all(group in each for each in groups):
            found[key] = values
    return {key.replace(".init_args", ""): values for key, values in found.items() if len(set(values)) > 1}


def mistakes(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Of the rows of validation.csv those whose prediction is wrong, the most confident first."""
    wrong = [row for row in rows if row["label"] != row["prediction"]]
    return sorted(wrong, key=lambda row: -float(row["probability"]))


def in_words(metric: str, value: float) -> str:
    """A value of a metric: shares in per cent."""
    if metric == "step":  # where no metric tells which is best
        return "the last"
    is_share = metric.partition("/")[2].startswith(("top", "map", "knn", "probe"))
    return f"{100 * value:.2f} %" if is_share else f"{value:.4f}"
