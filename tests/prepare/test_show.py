"""`vitlit data show RUN`: the training images of a step."""

import csv
from collections.abc import Callable
from pathlib import Path

from conftest import Result, done, refused

from vitlit.data.stream import order

Command = Callable[..., Result]


def test_the_images_of_any_step_of_a_run_are_shown(vitlit: Command, few: Path, work: Path) -> None:
    printed = done(vitlit("data", "show", "runs/pretrain", "--step", 3))
    rows = list(csv.DictReader(printed.splitlines()))
    assert [int(row["index"]) for row in rows] == order(0, 1, 40)[16:32].tolist()
    for row in rows:
        assert Path(row["path"]).parent == few / "train" / row["label"]
        assert Path(row["path"]).is_file()
    refused(vitlit("data", "show", "runs/pretrain", "--step", -1), "step is -1; give at least 0")
    refused(vitlit("data", "show", "runs", "--step", 1), "runs is not the folder of a run")
    (work / "runs" / "config.yaml").write_text("optimizer: adam\n")
    refused(vitlit("data", "show", "runs", "--step", 1), "runs is not the folder of a run")
    refused(vitlit("data", "show", "runs/pretrain"), "--step")
