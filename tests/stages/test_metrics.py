"""Validation measures against scikit-learn's."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    log_loss,
    top_k_accuracy_score,
)
from small_stage import data, fit, pretrain, trainer

from vitlit.objectives import Step
from vitlit.stages.metrics import metrics, update


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_validation_numbers_are_scikit_learns_on_uneven_batches(digits: Path) -> None:
    stage = pretrain(num_classes=10).eval()
    folder = data(digits, batch_size=64)  # 359 images: five batches and 39
    measured = trainer().validate(stage, folder, verbose=False)[0]
    index = folder.split("val")
    with torch.no_grad():
        logits = stage(folder.preprocess([index.path(i) for i in range(len(index))])).double()
    probabilities, labels = logits.softmax(-1).numpy(), index.labels
    assert len(labels) == 359
    expected = {
        "val/loss": log_loss(labels, probabilities, labels=range(10)),
        "val/top1": accuracy_score(labels, probabilities.argmax(-1)),
        "val/top1_macro": balanced_accuracy_score(labels, probabilities.argmax(-1)),
        "val/top5": top_k_accuracy_score(labels, probabilities, k=5),
    }
    assert measured == pytest.approx(expected, abs=1e-6)
    assert len(set(expected.values())) == 4


@pytest.mark.parametrize(("classes", "top5"), [(2, False), (4, False)])
def test_top5_is_left_out_where_five_classes_are_all(classes: int, top5: bool, few: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    for split in ("train", "val"):
        for label in range(classes):
            shutil.copytree(few / split / str(label), root / split / str(label))
    stage = pretrain(num_classes=classes)
    runner = fit(stage, root)
    assert {"train/loss", "val/loss", "val/top1", "val/top1_macro"} <= runner.callback_metrics.keys()
    assert ("val/top5" in runner.callback_metrics) is top5
    assert stage(torch.randn(2, 3, 16, 16)).shape == (2, classes)


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_measures_what_its_run_measured(weights_only: bool, few: Path, tmp_path: Path) -> None:
    runner = fit(pretrain(), few)
    runner.save_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
    options: Any = {"ckpt_path": tmp_path / "a.ckpt", "weights_only": True, "verbose": False}
    [measured] = trainer().validate(pretrain(), data(few), **options)
    assert measured == {name: runner.callback_metrics[name].item() for name in measured}


def test_the_mean_average_precision_is_scikit_learns_over_the_classes_that_have_images() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 5, generator=generator)
    labels = (torch.rand(40, 5, generator=generator) < 0.3).float()
    labels[:, 3] = 0
    measures = metrics({"map": 5})
    for part in (slice(0, 15), slice(15, 40)):
        update(measures, Step(torch.tensor(1.0), logits[part]), labels[part])
    measure: Any = measures["map"]
    present = [0, 1, 2, 4]
    expected = average_precision_score(labels[:, present], logits[:, present], average="macro")
    assert measure.compute().item() == pytest.approx(expected, abs=1e-6)
