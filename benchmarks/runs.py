"""Shared by the benchmarks: `vitlit fit` commands in forked children, and results with date, machine and versions."""

import argparse
import csv
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("WANDB_MODE", "offline")

LIBRARIES = ("torch", "torchvision", "lightning", "torchmetrics", "timm")


class Run(NamedTuple):
    """One training: its name in the table, its seed, and the flags of `vitlit fit`."""

    name: str
    seed: int
    flags: list[str]


class Made(NamedTuple):
    """The result of a run: the metrics of its last validation, the best value of each, and its CPU time in seconds."""

    run: Run
    last: dict[str, float]
    best: dict[str, float]
    seconds: float


def arguments(description: str, *needs: str) -> argparse.ArgumentParser:
    """The options of every benchmark, and the paths that this one needs."""
    parser = argparse.ArgumentParser(description=description)
    for name in needs:
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument(
        "--work", type=Path, required=True, help="a folder for runs and logs; what ended is not run again"
    )
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--at-once", type=int, default=1, help="how many trainings run at once, on one core each")
    return parser


def fit_all(runs: Iterable[Run], work: Path, at_once: int) -> list[Made]:
    """Run them, several at once on one thread each or one at a time on all cores. Stop at the first that fails."""
    work.mkdir(parents=True, exist_ok=True)
    made = []
    # Imported before the forks: each process would otherwise spend its first seconds importing Lightning.
    import vitlit.cli.fit  # noqa: F401

    with get_context("fork").Pool(at_once, maxtasksperchild=1) as pool:
        jobs = [(run, work, at_once > 1) for run in runs]
        for done in pool.imap(_fit, jobs, chunksize=1):
            print(f"{done.run.name} {done.run.seed}: {done.last} in {done.seconds:.0f} s", flush=True)
            made.append(done)
    return made


def _fit(job: tuple[Run, Path, bool]) -> Made:
    import torch

    from vitlit.cli.main import main

    run, work, alone = job
    name = f"{run.name}-{run.seed}".replace(" ", "_")
    took = work / f"{name}.seconds"
    if took.exists():  # in a benchmark that was broken off, and goes on
        return Made(run, *measured(work / name / "metrics.csv"), float(took.read_text()))
    if alone:
        torch.set_num_threads(1)
    log = os.open(work / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    flags = ["--run.root", str(work), "--run.name", name, "--seed_everything", str(run.seed)]
    start = time.process_time()  # which other work on the machine changes little
    code = main(["fit", *run.flags, *flags, "--trainer.logger", "false", "--data.num_workers", "0"])
    seconds = time.process_time() - start
    sys.stdout.flush()
    if code:
        raise RuntimeError(f"{name} ended with {code}; see {work / name}.log")
    took.write_text(str(seconds))
    return Made(run, *measured(work / name / "metrics.csv"), seconds)


def measured(path: Path) -> tuple[dict[str, float], dict[str, float]]:
    """(the last, the best) of each validation metric in a metrics.csv."""
    last: dict[str, float] = {}
    best: dict[str, float] = {}
    for row in csv.DictReader(path.open()):
        for name, cell in row.items():
            if name.startswith("val/") and cell:
                last[name] = float(cell)
                better = min if "loss" in name else max
                best[name] = better(best.get(name, last[name]), last[name])
    return last, best


def summary(made: list[Made], metric: str) -> list[dict[str, Any]]:
    """One row per name, in order: the values by seed in percent, their mean and standard deviation."""
    rows = []
    for name in dict.fromkeys(done.run.name for done in made):
        own = [done for done in made if done.run.name == name]
        values = [round(100 * done.last[metric], 2) for done in own]
        rows.append(
            {
                "name": name,
                "flags": own[0].run.flags,
                "seeds": [done.run.seed for done in own],
                metric: values,
                "mean": round(statistics.mean(values), 2),
                "std": round(statistics.stdev(values), 2) if len(values) > 1 else None,
                "best": [round(100 * done.best[metric], 2) for done in own],
                "cpu_seconds": [round(done.seconds) for done in own],
            }
        )
        print(f"{name:<34} {rows[-1]['mean']:>6} +- {rows[-1]['std']}")
    return rows


def write(out: Path, about: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write a result with date, machine and versions."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    result = {
        "about": about,
        "date": date.today().isoformat(),
        "machine": {"cpu": cpu.partition(": ")[2] or platform.processor(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        **more,
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
