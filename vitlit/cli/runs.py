"""`vitlit runs [ROOT]` lists runs, `vitlit runs compare RUN RUN ...` compares them."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from vitlit.errors import CommandParser, UserError
from vitlit.files import check_new, expand, from_here, read_csv
from vitlit.run.folder import RunOptions
from vitlit.run.history import VALIDATION, History, differing, in_words

ABOUT = """\
List the runs in a folder: their state, best metric, epochs and time, and the settings in which they differ. vitlit runs
compare RUN RUN ... puts some side by side. Into a pipe, a table is lines of cells with tabs between them.
"""
ABOUT_COMPARE = """\
Put runs side by side: the settings in which they differ, best and last numbers, mean and deviation of those that differ
in their seed alone, and how much better each is than the first on the same validation images.
"""

SEEDS = ("seed_everything", "data.seed")
SHOWN = 8  # settings of a run in the list
RESULTS = ("metric", "run", "best", "last")
SPREAD = ("metric", "runs", "best", "deviation", "last", "deviation")
PAIRED = ("run", "against", "images", "top-1 difference", "95 % interval")
Row = Sequence[str]


def run(arguments: list[str]) -> int:
    if arguments[:1] == ["compare"]:
        return compare(arguments[1:])
    parser = CommandParser("vitlit runs", ABOUT)
    parser.add_argument("root", metavar="ROOT", nargs="?", type=expand, default=RunOptions.root)
    root = Path(parser.parse_args(arguments).root)
    found = sorted(file.parent for file in root.glob("*/config.yaml"))
    if not found:
        raise UserError(f"{root} holds no runs; name the folder of runs, which run.root has")
    runs = [History(path) for path in found]
    settings = differing(runs)
    short = [key.rpartition(".")[2] for key in settings]
    names = [name if short.count(name) == 1 else key for name, key in zip(short, settings, strict=True)]
    rows = []
    for number, each in enumerate(runs):
        best = each.best
        value = [best.metric, in_words(*best[:2]), f"{best.row['epoch'] + 1:.0f}"] if best else ["-"] * 3
        pairs = zip(names, settings.values(), strict=True)
        cells = [f"{name}={values[number]}" for name, values in pairs if values[number] != "-"]
        cells[SHOWN:] = ["..."] if len(cells) > SHOWN else []
        rows.append([each.name, each.state, *value, str(each.epoch), str(each.time), "  ".join(cells)])
    show("", ("run", "state", "metric", "best", "in epoch", "epochs", "time", "settings"), rows)
    return 0


def compare(arguments: list[str]) -> int:
    parser = CommandParser("vitlit runs compare", ABOUT_COMPARE)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=expand, help="the folder of a run")
    parser.add_argument("--out", metavar="FILE.html", type=Path, help="write a page, with curves over each other")
    given = parser.parse_args(arguments or ["--help"])
    check_new(given.out)
    runs = [History(Path(path)) for path in dict.fromkeys(given.runs)]
    if len(runs) < 2:
        parser.error("one run has none to be compared with; name another")
    if len({each.name for each in runs}) < len(runs):
        for each in runs:
            each.name = str(each.path)
    settings: list[Row] = [(name, *values) for name, values in differing(runs).items()]
    results: list[Row] = [
        (metric, run, in_words(metric, best), in_words(metric, last))
        for metric, by_run in validated(runs).items()
        for run, (best, last) in by_run.items()
    ]
    tables = [
        ("Settings", "Those that differ.", ("setting", *(each.name for each in runs)), settings),
        ("Results", "Best: at the validation after which best.ckpt was saved.", RESULTS, results),
        ("Seeds", "Mean and standard deviation of runs that differ in their seed alone.", SPREAD, list(seeds(runs))),
        ("Paired", "How much better on the same validation images; paired bootstrap.", PAIRED, list(paired(runs))),
    ]
    tables = [table for table in tables if table[-1]]
    for title, _, head, rows in tables:
        show(title, head, rows)
    if given.out:
        # It loads torch, for which the tables do not wait.
        from vitlit.inspection.report import Section, curves, write_page

        sections = [Section(*table) for table in tables]
        sections.append(Section("Curves", pictures=curves({run.name: run.rows for run in runs})))
        write_page(given.out, "Compared runs", ", ".join(str(run.path) for run in runs), sections)
        print(from_here(given.out))
    return 0


def validated(runs: Sequence[History]) -> dict[str, dict[str, tuple[float, float]]]:
    """Of each validation metric the values of the runs, by name: at their best, and the last."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for each in runs:
        for name, value in (each.best.row if each.best else {}).items():
            if name.startswith("val/"):
                found.setdefault(name, {})[each.name] = value, each.last(name)
    return found


def seeds(runs: Sequence[History]) -> Iterator[Row]:
    groups: dict[str, list[History]] = {}
    for each in runs:
        fixed = {key: value for key, value in each.settings.items() if key not in SEEDS}
        groups.setdefault(json.dumps(fixed, sort_keys=True), []).append(each)
    for group in groups.values():
        for metric, by_run in validated(group).items():
            if len(by_run) > 1:
                best, last = zip(*by_run.values(), strict=True)
                spread = [mean(best), stdev(best), mean(last), stdev(last)]
                yield metric, " ".join(by_run), *(in_words(metric, number) for number in spread)


def paired(runs: Sequence[History]) -> Iterator[Row]:
    """Each run against the first, on the images that both have validated with the same label."""
    rows = [{(row["path"], row["label"]): row for row in read_csv(each.path / VALIDATION)} for each in runs]
    for each, own in zip(runs[1:], rows[1:], strict=True):
        if both := [key for key in rows[0] if key in own]:
            import numpy as np

            from vitlit.evaluation import compare as bootstrap  # loads torch

            one, other = (
                np.array([part[key]["prediction"] == key[1] for key in both], float) for part in (rows[0], own)
            )
            difference, low, high = (f"{100 * share:+.2f} %" for share in bootstrap(np.mean, (one,), (other,)))
            yield each.name, runs[0].name, f"{len(both):,}", difference, f"{low} to {high}"


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table: on a terminal as one, else as lines of cells with tabs between them."""
    if not sys.stdout.isatty():
        print(*([title] if title else []), *("\t".join(map(str, row)) for row in (head, *rows)), sep="\n")
        return
    table = Table(*head, title=title or None, title_justify="left", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(str, row))
    Console(highlight=False, markup=False).print(table)
