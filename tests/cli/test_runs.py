"""`vitlit runs`: the list of runs, and runs side by side."""

import csv
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import Result, done, refused
from test_report import Page

from vitlit.cli.main import main
from vitlit.evaluation import compare

Command = Callable[..., Result]


def derived(source: Path, to: Path, scale: float = 1.0, settings: Any = (), shift: int = 0) -> Path:
    """A run like another, with its own val/top1, settings by path of keys, and predictions of some images."""
    shutil.copytree(source, to, ignore=shutil.ignore_patterns(".lock"))
    config = yaml.safe_load((to / "config.yaml").read_text())
    for keys, value in dict(settings).items():
        *groups, last = keys.split(".")
        branch = config
        for group in groups:
            branch = branch[group]
        branch[last] = value
    (to / "config.yaml").write_text(yaml.safe_dump(config))
    for name in ("metrics.csv", "validation.csv"):
        with (to / name).open(newline="") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
        for row in rows[:shift] if name == "validation.csv" else []:
            row["prediction"] = row["label"]
        for row in (row for row in rows if row.get("val/top1")):
            row["val/top1"] = float(row["val/top1"]) * scale
        with (to / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return to


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    """Runs of three seeds, and one of another learning rate."""
    source, root = trained / "runs" / "pretrain", tmp_path / "runs"
    for seed in range(3):
        derived(source, root / f"seed{seed}", 1 - 0.1 * seed, {"seed_everything": seed}, shift=5 * seed)
    lr = "model.init_args.optimizer.init_args.lr"
    derived(source, root / "warm", 0.5, {lr: 0.5, "trainer.devices": 4, "run.name": "warm"})
    return root


def best_of(run: Path) -> tuple[float, int]:
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/top1"]]
    best = max(rows, key=lambda row: float(row["val/top1"]))
    return float(best["val/top1"]), int(best["epoch"]) + 1


def cells(out: str) -> dict[str, list[list[str]]]:
    """The lines of cells below each title, the head first."""
    tables: dict[str, list[list[str]]] = {}
    title = ""
    for line in out.splitlines():
        if "\t" in line:
            tables.setdefault(title, []).append(line.split("\t"))
        else:
            title = line
    return tables


def test_the_list_has_state_best_metric_epochs_time_and_what_differs(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "seed1" / "finished.json").unlink()
    (root / "seed2" / "finished.json").unlink()
    (root / "seed2" / ".lock").touch()
    (root / "notes").mkdir()
    assert main(["runs", str(root)]) == 0
    head, *rows = cells(capsys.readouterr().out)[""]
    assert head == ["run", "state", "metric", "best", "in epoch", "epochs", "time", "settings"]
    assert [row[:2] for row in rows] == [
        ["seed0", "finished"],
        ["seed1", "interrupted"],
        ["seed2", "running"],
        ["warm", "finished"],
    ]
    for row in rows:
        value, epoch = best_of(root / row[0])
        assert row[2:5] == ["val/top1", f"{100 * value:.2f} %", str(epoch)]
        assert row[5] == "3"
        seconds = json.loads((root / row[0] / "run.json").read_text())["result"]["seconds"]
        hours, minutes, rest = map(int, row[6].split(":"))
        assert hours * 3600 + minutes * 60 + rest == round(seconds)
    lr = yaml.safe_load((root / "seed0" / "config.yaml").read_text())["model"]["init_args"]["optimizer"]["init_args"]
    assert [row[7] for row in rows] == [f"lr={lr['lr']}  seed_everything={s}" for s in range(3)] + [
        "lr=0.5  seed_everything=0"
    ]
    os.utime(root / "seed2" / ".lock", (0, 0))  # its process died long ago
    assert main(["runs", str(root)]) == 0
    assert "seed2\tinterrupted" in capsys.readouterr().out


def test_runs_are_compared(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["seed0", "seed1", "seed2", "warm"]
    out = tmp_path / "page.html"
    assert main(["runs", "compare", *(str(root / name) for name in names), "--out", str(out)]) == 0
    found = cells(capsys.readouterr().out)
    settings = {row[0]: row[1:] for row in found["Settings"]}
    assert settings.pop("setting") == names
    assert settings.pop("seed_everything") == ["0", "1", "2", "0"]
    assert settings.pop("model.optimizer.lr")[3] == "0.5"
    assert not settings  # neither the name nor the number of devices makes another result

    best = {name: best_of(root / name)[0] for name in names}
    results = {(row[0], row[1]): row[2] for row in found["Results"]}
    assert {name: results["val/top1", name] for name in names} == {n: f"{100 * v:.2f} %" for n, v in best.items()}
    groups = {row[0]: row[1:4] for row in found["Seeds"]}
    three = [best[name] for name in names[:3]]
    spread = [f"{100 * number:.2f} %" for number in (np.mean(three), np.std(three, ddof=1))]
    assert groups["val/top1"] == ["seed0 seed1 seed2", *spread]

    right = []
    for name in names:
        with (root / name / "validation.csv").open(newline="") as file:
            right.append(np.array([row["label"] == row["prediction"] for row in csv.DictReader(file)], float))
    assert right[0].mean() < right[2].mean()
    for row, own in zip(found["Paired"][1:], right[1:], strict=True):
        apart, low, high = compare(np.mean, (right[0],), (own,))
        assert apart == pytest.approx(own.mean() - right[0].mean())
        assert row[2:] == ["11", f"{100 * apart:+.2f} %", f"{100 * low:+.2f} % to {100 * high:+.2f} %"]

    page = Page(out)
    page.opens_without_a_network()
    page.is_readable_by_ear()
    for title, table in found.items():
        assert page.rows.get(title, table) == table
    assert any("loss" in image["alt"] and all(name in image["alt"] for name in names) for image in page.images)


def test_on_a_terminal_the_columns_are_aligned(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["runs", str(root)]) == 0
    head, *rows = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out).splitlines()
    assert {row.index("val/top1") for row in rows} == {head.index("metric")}


def test_mistakes_are_one_line(vitlit: Command, root: Path, tmp_path: Path) -> None:
    refused(vitlit("runs", tmp_path / "nowhere"), "nowhere holds no runs")
    refused(vitlit("runs", "compare", root / "seed0"), "name another")
    refused(vitlit("runs", "compare", root / "seed0", root), "is not the folder of a run")
    (tmp_path / "page.html").write_text("mine")
    refused(vitlit("runs", "compare", root / "seed0", root / "warm", "--out", "page.html"), "page.html exists")
    assert (tmp_path / "page.html").read_text() == "mine"
    assert done(vitlit("runs", root)).count("\n") == 5
