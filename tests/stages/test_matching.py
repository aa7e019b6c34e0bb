"""In Python as on the command line: data follows the weights and the seed wherever a stage and data meet."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomized, user_error
from lightning.pytorch import seed_everything
from small_stage import TINY, data, distance, finetune, fit, pretrain, state_of, trainer
from torch._dynamo.utils import counters

import vitlit
from vitlit.data import Preprocess
from vitlit.model import ViT
from vitlit.objectives import Supervised
from vitlit.stages import Finetune, Pretrain

IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bilinear"}
MADE_WITH: Any = Preprocess((16, 16), 0.9, **IMAGENET)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    vit = randomized(ViT(**TINY, num_classes=4))
    vit.classes, vit.preprocess = list("0123"), MADE_WITH
    return vitlit.save_weights(vit, tmp_path / "weights.safetensors")


def test_finetuning_takes_the_preprocessing_of_its_weights(weights: Path, few: Path, tmp_path: Path) -> None:
    runner = fit(finetune(weights), few, max_steps=1)
    folder: Any = runner.datamodule  # type: ignore[attr-defined]
    assert folder.preprocess == MADE_WITH
    runner.save_checkpoint(tmp_path / "a.ckpt")
    assert vitlit.load(tmp_path / "a.ckpt").preprocess == MADE_WITH
    assert torch.equal(next(iter(folder.val_dataloader())).views[0][0], MADE_WITH(folder.split("val").path(0))[0])
    larger: Any = fit(
        finetune(weights, image_size=24),
        few,
        {"image_size": 24, "crop_ratio": 1.0, "interpolation": "bicubic"},
        max_steps=1,
    )
    assert larger.datamodule.preprocess == replace(
        MADE_WITH, image_size=(24, 24), crop_ratio=1.0, interpolation="bicubic"
    )


@pytest.mark.parametrize("given", [{"mean": (0.5, 0.5, 0.5)}, {"std": (0.5, 0.5, 0.5)}], ids=["mean", "std"])
def test_what_contradicts_the_weights_is_refused(given: dict[str, Any], weights: Path, few: Path) -> None:
    [name] = given
    words = rf"data\.{name} is .*, but {weights} was made with .*; leave it out"
    user_error(words, partial(fit, max_steps=1), finetune(weights), few, given)
    fit(finetune(weights), few, {name: getattr(MADE_WITH, name)}, max_steps=1)


@pytest.mark.parametrize("given", [None, False, True])
def test_how_evaluation_resizes_comes_from_the_weights_but_may_be_changed(given: bool | None) -> None:
    how: dict[str, Any] = {} if given is None else {"interpolation": "bicubic", "crop_ratio": 0.5, "squash": given}
    vit, folder = ViT(**TINY), data(Path("folder"), **how)
    vit.preprocess = Preprocess((16, 16), 1.0, "bilinear", squash=True)
    folder.follow(vit)
    assert folder.preprocess == replace(vit.preprocess, **how)
    assert folder.transform.crop.interpolation.value == ("bilinear" if given is None else "bicubic")


def test_a_loaded_vit_brings_its_preprocessing_and_classes(weights: Path, few: Path, tmp_path: Path) -> None:
    def loaded() -> Pretrain:
        return Pretrain(vitlit.load(weights), Supervised, partial(torch.optim.AdamW, lr=1e-3))

    assert fit(loaded(), few, max_steps=1).datamodule.preprocess == MADE_WITH  # type: ignore[attr-defined]
    other = tmp_path / "other"
    for split in ("train", "val"):
        for name, new in zip("0123", "abcd", strict=True):
            (other / split).mkdir(parents=True, exist_ok=True)
            (other / split / new).symlink_to(few / split / name)
    user_error(r"the classes a, b, c, d \(4\), the weights 0, 1, 2, 3", fit, loaded(), other)
    fit(
        Finetune(vit=vitlit.load(weights), num_classes=4, optimizer=partial(torch.optim.SGD, lr=0.1)),
        other,
        max_steps=1,
    )


def test_a_checkpoint_is_evaluated_as_it_was_trained_even_without_training_images(
    weights: Path, few: Path, tmp_path: Path
) -> None:
    runner = fit(finetune(weights), few)
    runner.save_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "val").symlink_to(few / "val")
    stage = Finetune.load_from_checkpoint(tmp_path / "a.ckpt")
    both: tuple[dict[str, Any], ...] = ({}, {"ckpt_path": tmp_path / "a.ckpt", "weights_only": True})
    for options in both:
        start = finetune() if options else stage
        root = few if options else tmp_path / "alone"
        [measured] = trainer().validate(start, data(root), verbose=False, **options)
        assert measured == {name: runner.callback_metrics[name].item() for name in measured}
    user_error("data.mean", lambda: trainer().validate(stage, data(few, mean=(0.1, 0.2, 0.3)), verbose=False))


def test_training_continued_in_python_keeps_the_checkpoints_preprocessing(
    weights: Path, few: Path, tmp_path: Path
) -> None:
    fit(finetune(weights), few, max_steps=2).save_checkpoint(tmp_path / "a.ckpt")
    weights.unlink()
    again, folder = finetune(), data(few)
    trainer(max_steps=4).fit(again, folder, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert folder.preprocess == MADE_WITH


def test_grey_images_follow_from_the_vit(few: Path) -> None:
    stage = Pretrain(
        ViT(**TINY, in_channels=1), partial(Supervised, num_classes=4), partial(torch.optim.AdamW, lr=1e-3)
    )
    assert fit(stage, few, max_steps=1).datamodule.preprocess.mean == (0.5,)  # type: ignore[attr-defined]
    user_error(
        r"data\.mean has 3 numbers, but model\.vit\.in_channels is 1", fit, stage, few, {"mean": (0.5, 0.5, 0.5)}
    )


def test_seed_everything_seeds_data_and_dropout(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    start, orders, ends = pretrain(dropout=0.3), [], []
    for seed in (1, 2, 1):
        seed_everything(seed, verbose=False)
        stage = copy.deepcopy(start)
        runner = fit(stage, few, max_steps=2)
        orders.append([sample.index for sample in runner.datamodule.samples(0)])  # type: ignore[attr-defined]
        ends.append(state_of(stage))
    assert orders[0] == orders[2] != orders[1]
    assert distance(ends[0], ends[2]) == 0 < distance(ends[0], ends[1])
    assert data(few, seed=5).seed == 5  # given, it is meant


def test_a_compiled_stage_is_not_compiled_again_at_each_step(few: Path) -> None:
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    plain, compiled = (copy.deepcopy(stage) for stage in [pretrain()] * 2)
    fit(plain, few, max_steps=8, max_epochs=2)
    trainer(max_steps=8, max_epochs=2).fit(torch.compile(compiled, backend="eager"), data(few))  # type: ignore[arg-type]
    assert counters["stats"]["unique_graphs"] - before <= 4  # training and evaluation, and their last batches
    assert distance(state_of(plain), state_of(compiled)) < 1e-6
