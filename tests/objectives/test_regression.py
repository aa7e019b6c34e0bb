"""Regression: numbers of a manifest, learnt, measured, predicted and kept."""

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, Result, done, refused, user_error
from PIL import Image
from sklearn.metrics import mean_absolute_error, r2_score
from small_stage import TINY, data, fit, perturbed, trainer
from torch.nn import functional as F

import vitlit
from vitlit.data import ImageFolderData
from vitlit.data.mixing import Mixing
from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.objectives import Batch, Regression, Step, Supervised
from vitlit.stages import Finetune, Pretrain
from vitlit.stages.metrics import metrics, update

Command = Callable[..., Result]


@pytest.fixture(scope="module")
def bright(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest whose labels are how bright the digits are, from 2,000: with another unit and origin than a head's."""
    path = tmp_path_factory.mktemp("numbers") / "bright.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label", "split"])
        for split in ("train", "val"):
            for image in sorted((few / split).rglob("*.png")):
                mean = float(np.asarray(Image.open(image).convert("L")).mean())
                table.writerow([image.relative_to(few), f"{2000 + mean / 4:.3f}", split])
    return path


def labels(manifest: Path, split: str) -> list[float]:
    with manifest.open() as file:
        return [float(row["label"]) for row in csv.DictReader(file) if row["split"] == split]


def made(**options: Any) -> Pretrain:
    torch.manual_seed(0)
    return Pretrain(ViT(**TINY), partial(Regression, **options), partial(torch.optim.AdamW, lr=3e-3))


PLAIN = {"flip": 0.0, "crop": "center"}


@pytest.mark.parametrize(("loss", "error"), [("squared", F.mse_loss), ("absolute", F.l1_loss)])
def test_the_loss_is_torchs_on_standardised_labels(loss: str, error: Any, few: Path, bright: Path) -> None:
    stage = made(loss=loss)
    stage.check_data(data(few, manifest=str(bright)))
    perturbed(stage.vit)
    images, numbers = torch.randn(5, 3, 16, 16), torch.tensor([2000.0, 2010, 2020, 2005, 2015])
    step = stage.objective(stage.vit, Batch.of((images, numbers)), 0.0)
    train = np.array(labels(bright, "train"))
    wanted = (numbers - train.mean()) / train.std()
    torch.testing.assert_close(step.loss, error(stage.vit(images)[:, 0], wanted.float()), rtol=1e-3, atol=1e-4)


def test_a_number_is_learnt_and_measured_as_scikit_learn_does(few: Path, bright: Path, tmp_path: Path) -> None:
    stage = made()
    runner = fit(stage, few, {"manifest": str(bright), **PLAIN}, max_epochs=30)
    folder = data(few)
    folder.splits.photos = [few / "val"]
    guesses = torch.cat(trainer().predict(stage, folder)).tolist()  # type: ignore[arg-type]
    truth = labels(bright, "val")
    measured = {name: runner.callback_metrics[f"val/{name}"].item() for name in ("mae", "r2")}
    expected = {"mae": mean_absolute_error(truth, guesses), "r2": r2_score(truth, guesses)}
    assert measured == pytest.approx(expected, rel=1e-3)
    assert measured["r2"] > 0.5

    runner.save_checkpoint(tmp_path / "a.ckpt")
    vit = vitlit.load(tmp_path / "a.ckpt")
    assert vit.classes == []
    assert vit.preprocess is not None
    outputs = vit(vit.preprocess(sorted((few / "val").rglob("*.png"))))
    assert outputs.shape == (11, 1)
    assert outputs[:, 0].tolist() == pytest.approx(guesses, abs=1e-2)
    [again] = trainer().validate(made(), data(few, manifest=str(bright)), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert again["val/mae"] == pytest.approx(measured["mae"], rel=1e-5)


def test_r2_survives_labels_far_from_zero() -> None:
    truth = 20_000 + torch.randn(200, generator=torch.Generator().manual_seed(0))
    guesses = truth + 0.5 * torch.randn(200, generator=torch.Generator().manual_seed(1))
    measures = metrics({"r2": 1})
    for part in (slice(0, 150), slice(150, 200)):
        update(measures, Step(torch.tensor(0.0), guesses[part]), truth[part])
    measure: Any = measures["r2"]
    assert measure.compute().item() == pytest.approx(r2_score(truth.double(), guesses.double()), abs=1e-6)


def test_the_command_line_trains_validates_and_predicts_numbers(
    vitlit: Command, few: Path, bright: Path, tmp_path: Path
) -> None:
    manifest = tmp_path / "bright.csv"
    manifest.write_text(bright.read_text())
    out = done(
        vitlit("fit", *SMALL, "--data.root", few, "--data.manifest", manifest, "--model.objective", "Regression")
    )
    assert "best val/mae" in out
    assert "numbers" in out
    manifest.unlink()  # predicting needs photos alone
    done(vitlit("predict", "runs/pretrain", few / "val", "--out", "numbers.csv"))
    with (tmp_path / "numbers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [*rows[0]] == ["path", "number"]
    assert len(rows) == 11
    assert all(2000 < float(row["number"]) < 2060 for row in rows)


def test_numbers_are_finetuned_from_weights_of_classes(few: Path, work: Path, bright: Path) -> None:
    source = str(work / "runs" / "pretrain")
    sgd = partial(torch.optim.SGD, lr=0.01)
    stage = Finetune(init_from=source, objective=Regression, optimizer=sgd)
    fit(stage, few, {"manifest": str(bright)})
    assert stage.vit.config.num_classes == 1
    with pytest.raises(UserError, match=r"model\.keep_head is for classes"):
        fit(
            Finetune(init_from=source, objective=Regression, optimizer=sgd, keep_head=True),
            few,
            {"manifest": str(bright)},
        )


def test_numbers_never_become_classes_in_silence(vitlit: Command, few: Path, bright: Path) -> None:
    command = ("fit", *SMALL, "--data.root", few, "--data.manifest", bright)
    refused(vitlit(*command), "learns no numbers", "--model.objective Regression")
    classifier = Pretrain(ViT(**TINY), partial(Supervised, num_classes=4), partial(torch.optim.AdamW, lr=1e-3))
    words = "Supervised learns no numbers; give --model.objective Regression"
    user_error(words, fit, classifier, few, {"manifest": str(bright)})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, r"Regression learns numbers: give data\.manifest"),
        ({"manifest": True, "mixing": Mixing(0.2)}, r"data\.mixing mixes labels, which Regression does not learn from"),
        ({"manifest": True, "balanced": True}, r"data\.balanced needs one label an image"),
    ],
)
def test_what_numbers_do_not_go_with_is_refused(options: dict[str, Any], words: str, few: Path, bright: Path) -> None:
    manifest = {"manifest": str(bright)} if options.pop("manifest", False) else {}
    user_error(words, fit, made(), few, {**options, **manifest})


def test_equal_labels_are_refused(few: Path, tmp_path: Path) -> None:
    paths = [path.relative_to(few) for path in sorted((few / "train").rglob("*.png"))]
    (tmp_path / "same.csv").write_text("path,label\n" + "".join(f"{path},1.5\n" for path in paths))
    folder = ImageFolderData(str(few), 16, 8, manifest=str(tmp_path / "same.csv"), holdout=0.1)
    folder.check("fit", 1)
    user_error("every training label is 1.5", made().check_data, folder)


def test_an_unknown_loss_is_refused() -> None:
    user_error("loss is 'huber'", lambda: Regression(ViT(**TINY), loss="huber"))  # type: ignore[arg-type]
