"""What a run leaves in its folder: run.json, tables of its mistakes, and no more checkpoints or locks than needed."""

import csv
import json
import math
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, done
from PIL import Image
from test_run import FIT, checkpoint, differences, rows, signalled

Command = Callable[..., Result]


def history(run: Path) -> Any:
    return json.loads((run / "run.json").read_text())


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_says_what_worked_on_it_and_which_step_was_best(vitlit: Command, few: Path, run: Path) -> None:
    command = (*FIT, "--data.root", few)
    assert vitlit(*command, before=signalled(4, signal.SIGTERM)).code == 143
    assert "result" not in history(run)
    done(vitlit(*command))
    first, second = history(run)["commands"]
    assert (first["step"], first["ended"]) == (5, "stopped by SIGTERM after step 5")
    assert (second["step"], second["ended"]) == (6, "complete")
    assert second["command"].startswith("vitlit fit --config ")
    assert second["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert len(second["commit"]["vitlit"].removesuffix("-dirty")) == 40
    result = history(run)["result"]
    assert result["seconds"] == pytest.approx(first["seconds"] + second["seconds"], abs=0.11)
    best = max((float(row["val/top1"]), -int(row["step"])) for row in rows(run) if row["val/top1"])
    assert (result["best"]["value"], result["best"]["step"]) == (pytest.approx(best[0]), 1 - best[1])
    assert checkpoint(run, "best")["global_step"] == result["best"]["step"]


def test_an_early_stop_says_why(vitlit: Command, few: Path, run: Path) -> None:
    stop = "[{class_path: EarlyStopping, init_args: {monitor: val/loss, patience: 1, min_delta: 9}}]"
    out = done(vitlit(*FIT, "--data.root", few, "--trainer.callbacks", stop))
    ended = history(run)["commands"][0]["ended"]
    assert ended.startswith("early, in epoch 2: Monitored metric val/loss did not improve")
    assert ended in out


def test_each_validation_image_has_its_row_of_the_best_weights(vitlit: Command, few: Path, run: Path) -> None:
    done(vitlit(*FIT, "--data.root", few, "--run.monitor", "val/loss", "--model.optimizer.lr", 0.1))
    measured = [row for row in rows(run) if row["val/loss"]]
    best = min(measured, key=lambda row: float(row["val/loss"]))
    assert best is not measured[-1]  # at such a rate it gets worse
    images = table(run / "validation.csv")
    assert sorted(row["path"] for row in images) == sorted(map(str, (few / "val").glob("*/*")))
    assert all(Path(row["path"]).parent.name == row["label"] for row in images)
    right = [row["prediction"] == row["label"] for row in images]
    assert sum(right) / len(images) == pytest.approx(float(best["val/top1"]))
    losses = [-math.log(float(row["label_probability"])) for row in images]
    assert sum(losses) / len(images) == pytest.approx(float(best["val/loss"]), rel=1e-5)
    assert [row["above"] == "0" for row in images] == right
    assert sum(int(row["count"]) for row in table(run / "confusion.csv")) == len(images)
    assert len(table(run / "mistakes.csv")) == right.count(False)


def test_the_mistakes_are_those_of_the_best_weights(trained: Path, few: Path) -> None:
    run = trained / "runs" / "pretrain"
    counts = Counter({(row["label"], row["prediction"]): int(row["count"]) for row in table(run / "confusion.csv")})
    labels = {label: len(list((few / "val" / label).iterdir())) for label in "0123"}
    assert {label: sum(n for (truth, _), n in counts.items() if truth == label) for label in labels} == labels
    right = sum(n for (label, guess), n in counts.items() if label == guess)
    assert history(run)["result"]["best"]["value"] == pytest.approx(right / counts.total())
    wrong = table(run / "mistakes.csv")
    assert len(wrong) == counts.total() - right > 0
    assert all(Path(row["path"]).parent.name == row["label"] != row["prediction"] for row in wrong)
    sure = [float(row["probability"]) for row in wrong]
    assert sure == sorted(sure, reverse=True)
    with Image.open(run / "mistakes.png") as sheet:
        colours = {colour for _, colour in sheet.getcolors(1 << 20) or []}
    assert (178, 34, 34) in colours  # the mistakes' captions


def test_nothing_of_a_run_is_left_outside_its_folder_nor_more_than_it_needs_in_it(work: Path) -> None:
    assert [path.name for path in (work / "runs").iterdir()] == ["pretrain"]
    assert {path.name for path in (work / "runs" / "pretrain" / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    shutil.rmtree(work / "runs" / "pretrain")
    assert not list((work / "runs").iterdir())


@pytest.mark.parametrize("way", [("--model.freeze", "true"), ("--model.lora.rank", "2")])
def test_frozen_weights_are_stored_once_beside_their_average(vitlit: Command, few: Path, work: Path, way: Any) -> None:
    average = "[{class_path: vitlit.callbacks.EMA, init_args: {decay: 0.5}}]"
    stages = ("--config", "finetune", "--model.init_from", "runs/pretrain", "--data.image_size", 16, "--data.root", few)
    small = (
        "--run.report",
        "false",
        "--trainer.logger",
        "false",
        "--trainer.max_steps",
        6,
        "--data.batch_size",
        16,
        "--data.num_workers",
        0,
    )
    quick = ("--model.schedule.warmup", 1, "--trainer.log_every_n_steps", 1, "--trainer.callbacks", average)
    command = ("fit", *stages, *small, *quick, *way)
    done(vitlit(*command, "--run.name", "whole"))
    stored = checkpoint(work / "runs" / "whole")
    shared = {tensor.data_ptr() for tensor in stored["state_dict"].values()} | {
        tensor.data_ptr() for tensor in stored.get("adapters", {}).values()
    }
    frozen = [
        name for name in stored["current_model_state"] if "blocks.0.mlp.fc1.weight" in name or "qkv.weight" in name
    ]
    assert len(frozen) == 3
    assert all(stored["current_model_state"][name].data_ptr() in shared for name in frozen)
    assert vitlit(*command, "--run.name", "parts", before=signalled(3, signal.SIGTERM)).code == 143
    done(vitlit(*command, "--run.name", "parts"))
    assert differences(stored["state_dict"], checkpoint(work / "runs" / "parts")["state_dict"]) == []
    assert rows(work / "runs" / "parts") == rows(work / "runs" / "whole")
