"""CONTRIBUTING's objective, from the current folder, as its commands say."""

import csv
import os
import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import REPOSITORY, SMALL, Result, command, done, refused

PAGE = (REPOSITORY / "CONTRIBUTING.md").read_text()
SHELL = "VITLIT_TRUST=mylab vitlit fit --config configs/pretrain.yaml "


def trusting(packages: str) -> Callable[[], None]:
    return partial(os.environ.update, {"VITLIT_TRUST": packages})


@pytest.fixture(scope="module")
def mylab(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with CONTRIBUTING's package, and the run that its command makes."""
    folder = tmp_path_factory.mktemp("contributing")
    (folder / "mylab").mkdir()
    (folder / "mylab" / "__init__.py").touch()
    code = re.search(r"```python\n(.*?)```", PAGE, re.S)
    line = re.search(r"```sh\n(.*?)\n```", PAGE, re.S)
    assert code
    assert line
    assert line[1].startswith(SHELL)
    (folder / "mylab" / "objectives.py").write_text(code[1])
    arguments = ["fit", *SMALL, "--data.root", few, *shlex.split(line[1].removeprefix(SHELL))]
    out = done(command(*arguments, cwd=folder, before=trusting("mylab, otherlab")))
    assert "best val/top1" in out
    return folder


def test_an_objective_of_ones_own_has_an_accuracy_and_logs(mylab: Path) -> None:
    with (mylab / "runs" / "rotation" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["train/upright"] != "" for row in rows].count(True) == 6
    measured = [row for row in rows if row["val/top1"]]
    assert measured
    assert all(0 < float(row["val/top1"]) <= 1 and 0 < float(row["val/upright"]) < 1 for row in measured)


def test_its_logs_may_be_monitored_and_a_name_that_nothing_logs_is_refused(mylab: Path, few: Path) -> None:
    again = ("fit", *SMALL, "--data.root", few, "--model.objective", "mylab.objectives.Rotation")
    run = partial(command, cwd=mylab, before=trusting("mylab"))
    said = done(run(*again, "--run.name", "b", "--run.monitor", "val/upright"))
    assert "best val/upright" in said
    wrong = run(*again, "--run.name", "c", "--run.monitor", "val/uprigth")
    refused(wrong, "val/uprigth", "could not find the monitored key", "val/loss", "val/upright")


def test_a_run_asks_for_what_it_was_told_to_trust(mylab: Path) -> None:
    validate: Callable[..., Result] = partial(command, "validate", "runs/rotation", cwd=mylab)
    refused(validate(), "mylab.objectives.Rotation is outside", "set VITLIT_TRUST=mylab")
    assert "val/top1" in done(validate(before=trusting("mylab,otherlab")))


def test_it_predicts_nothing(mylab: Path, few: Path) -> None:
    result = command("predict", "runs/rotation", few / "val", cwd=mylab, before=trusting("mylab"))
    refused(result, "Rotation learns nothing to predict")
