"""`vitlit data show RUN`: the training images of a step."""

import csv
from collections.abc import Callable
from pathlib import Path

import yaml
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
    refused(vitlit("data", "show", "runs/pretrain", "--step", -1), "step -1 is less than 0")
    refused(vitlit("data", "show", "runs", "--step", 1), "runs is not a run's folder")
    refused(vitlit("data", "show", "runs/pretrain"), "--step")


def test_a_step_beyond_the_end_of_a_run_is_none_of_its(vitlit: Command, few: Path, work: Path) -> None:
    def show(step: int) -> Result:
        return vitlit("data", "show", "runs/pretrain", "--step", step)

    def limit(epochs: object, steps: object, share: object = None) -> None:
        trainer = {"max_epochs": epochs, "max_steps": steps, "limit_train_batches": share}
        file.write_text(yaml.safe_dump({**config, "trainer": trainer}))

    run, file = work / "runs" / "pretrain", work / "runs" / "pretrain" / "config.yaml"
    config = yaml.safe_load(file.read_text())
    done(show(5))
    refused(show(6), "step 6 is beyond the run's end; its last step is 5, counted from 0")
    (run / "finished.json").write_text('{"step": 4}')  # it was stopped early
    refused(show(5), "its last step is 3")
    (run / "finished.json").unlink()
    for limits, last in (((2, -1), 3), ((9, 2), 1), ((3, -1, 0.5), 2)):  # two steps an epoch
        limit(*limits)
        refused(show(last + 1), f"its last step is {last},")
    limit(-1, -1)
    done(show(1000))
