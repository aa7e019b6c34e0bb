"""A temperature: fitted by `vitlit evaluate --calibrate`, stored with the weights, and used by `vitlit predict`."""

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, Result, done, refused
from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from test_evaluate import table

from vitlit import ViT, load, save_weights
from vitlit.evaluation import folds
from vitlit.images.preprocess import Preprocess
from vitlit.weights.calibrated import store_temperature

Command = Callable[..., Result]


def state(run: Path, name: str = "last") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return content


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    tensors = zip(one["state_dict"].items(), other["state_dict"].items(), strict=True)
    return all(name == again and torch.equal(tensor, there) for (name, tensor), (again, there) in tensors)


def cache() -> None:
    os.environ["XDG_CACHE_HOME"] = "cache"


@pytest.fixture
def too_sure(digits: Path, tmp_path: Path) -> tuple[Any, np.ndarray, np.ndarray]:
    """A classifier of digits with a head four times too large, sure.safetensors; its logits and the labels of val."""
    torch.manual_seed(0)
    vit: Any = ViT(16, 4, width=16, depth=1, heads=2, mlp_dim=32)
    vit.preprocess = Preprocess((16, 16))
    paths = {split: sorted((digits / split).rglob("*.png")) for split in ("train", "val")}
    labels = {split: np.array([int(path.parent.name) for path in found]) for split, found in paths.items()}
    with torch.inference_mode():
        found = {split: vit(vit.preprocess(paths[split])) for split in paths}
    fitted = LogisticRegression(max_iter=200).fit(found["train"], labels["train"])
    vit.set_head("finetune", 10)
    vit.classes = [str(number) for number in range(10)]
    with torch.no_grad():
        for parameter, value in ((vit.head.weight, fitted.coef_), (vit.head.bias, fitted.intercept_)):
            parameter.copy_(4 * torch.from_numpy(value))
        logits = vit.head(found["val"])
    save_weights(vit, tmp_path / "sure.safetensors")
    return vit, logits.double().numpy(), labels["val"]


def test_a_temperature_is_fitted_on_a_half_and_stored(
    too_sure: Any, digits: Path, vitlit: Command, tmp_path: Path
) -> None:
    vit, logits, labels = too_sure
    evaluate = ("evaluate", "sure.safetensors", "--root", digits, "--with", "classify")
    out = done(vitlit(*evaluate, "--calibrate", "--out", "out", before=cache))
    half = folds(labels, 2) == 0
    loss = lambda t, rows: log_loss(labels[rows], torch.from_numpy(logits[rows] / t).softmax(1))  # noqa: E731
    best = minimize_scalar(lambda t: loss(t, half), bounds=(0.1, 20), method="bounded", options={"xatol": 1e-8}).x
    again = load(tmp_path / "sure.safetensors")
    assert again.temperature == pytest.approx(best, rel=1e-5)
    assert f"temperature {best:.4g}, fitted on {half.sum()} of 359 images" in out
    assert all(torch.equal(own, there) for own, there in zip(vit.parameters(), again.parameters(), strict=True))
    assert again.classes == vit.classes
    assert again.preprocess == vit.preprocess

    rows = {(method, metric): row["value"] for (_, method, metric), row in table(tmp_path / "out").items()}
    assert rows["uncalibrated", "nll"] == pytest.approx(loss(1, ~half), abs=1e-5)
    assert rows["calibrated", "nll"] == pytest.approx(loss(best, ~half), abs=1e-5)
    assert all(rows["calibrated", name] < rows["uncalibrated", name] for name in ("nll", "ece", "brier"))
    assert rows["calibrated", "top1"] == rows["uncalibrated", "top1"] == (logits.argmax(1) == labels)[~half].mean()
    assert (tmp_path / "out" / "reliability.png").stat().st_size > 10_000

    out = done(vitlit(*evaluate, "--out", "later", before=cache))
    assert f"softmax(logits / {best:.4g})" in out
    found = table(tmp_path / "later")["s", "classify", "nll"]["value"]
    assert found == pytest.approx(loss(best, slice(None)), abs=1e-5)
    assert f"temperature  {best:.4g}\n" in done(vitlit("weights", "show", "sure.safetensors"))
    done(vitlit("weights", "convert", "sure.safetensors", "again.ckpt", "--format", "vitlit"))
    assert load(tmp_path / "again.ckpt").temperature == again.temperature
    assert "temperature" in done(vitlit("weights", "convert", "sure.safetensors", "timm.pth", "--format", "timm"))
    assert load(tmp_path / "timm.pth").temperature == 1
    again.set_head("finetune", 10)
    assert again.temperature == 1

    refused(vitlit("evaluate", "timm.pth", *evaluate[2:], "--calibrate"), "timm.pth", "convert timm.pth")
    content = torch.load(tmp_path / "again.ckpt", weights_only=True)
    content["hyper_parameters"] = {"objective": {"init_args": {"loss": "bce"}}}
    torch.save(content, tmp_path / "bce.ckpt")
    refused(vitlit("evaluate", "bce.ckpt", *evaluate[2:], "--calibrate", before=cache), "sigmoid")
    refused(vitlit(*evaluate, "--calibrate", "--image_size", 32), "--image_size")
    refused(vitlit(*evaluate[:-1], "knn", "--calibrate"), "add classify")


def test_predict_divides_by_it_and_says_so(vitlit: Command, few: Path, work: Path) -> None:
    run, photos = work / "runs" / "pretrain", sorted((few / "val").glob("*/*"))
    before, measured = state(run, "best"), done(vitlit("validate", "runs/pretrain"))
    assert "softmax" not in done(vitlit("predict", "runs/pretrain", *photos))
    store_temperature(str(run), 0.05)
    assert same(before, state(run, "best"))
    assert done(vitlit("validate", "runs/pretrain")) == measured
    assert "softmax(logits / 0.05)" in done(vitlit("predict", "runs/pretrain", *photos, "--out", "out.csv"))
    vit: Any = load(run)
    assert vit.temperature == 0.05
    with torch.inference_mode():
        expected = (vit(vit.preprocess(photos)) / 0.05).softmax(1).max(1)
    with (work / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["probability"]) for row in rows] == pytest.approx(expected.values.tolist(), abs=1e-5)
    assert [row["class"] for row in rows] == [vit.classes[number] for number in expected.indices]


def test_a_training_neither_sees_nor_inherits_it(vitlit: Command, few: Path, work: Path) -> None:
    run = work / "runs" / "pretrain"
    again = ("fit", *SMALL, "--data.root", few, "--model.vit.dropout", 0.1, "--trainer.max_steps", 7)
    refused(vitlit("evaluate", run / "checkpoints" / "last.ckpt", "--root", few, "--with", "classify", "--calibrate"),
            "last.ckpt", "continue a training", "weights convert")  # fmt: skip
    done(vitlit(*again, "--run.name", "plain", "--ckpt_path", run / "checkpoints" / "last.ckpt"))
    store_temperature(str(run), 2.0)
    done(vitlit(*again))
    assert same(state(run), state(work / "runs" / "plain"))
    assert {state(run, name)["vitlit"]["temperature"] for name in ("last", "best")} <= {1.0, 2.0}
    assert state(run)["vitlit"]["temperature"] == 1.0
    if state(run, "best")["global_step"] == 6:  # it was not bettered, and its temperature is its own
        assert load(run).temperature == 2.0
    store_temperature(str(run), 2.0)
    flags = ["--model.init_from", run, "--data.image_size", 16, "--data.batch_size", 16, "--data.num_workers", 0]
    flags += ["--trainer.max_steps", 1, "--trainer.logger", "false", "--model.schedule.warmup", 0]
    done(vitlit("fit", "--config", Path(SMALL[1]).with_name("finetune.yaml"), "--data.root", few, *flags))
    assert {
        load(work / "runs" / "finetune").temperature,
        state(work / "runs" / "finetune")["vitlit"]["temperature"],
    } == {1}
