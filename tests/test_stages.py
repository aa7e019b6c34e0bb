"""The stages built in Python: what they learn, log, refuse and leave in a checkpoint."""

import argparse
import copy
import math
import os
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    log_loss,
    top_k_accuracy_score,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import vitlit
from vitlit.data import ImageFolderData
from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.objectives import Supervised
from vitlit.optim import Schedule
from vitlit.stages import Finetune, Pretrain, Stage
from vitlit.stages.metrics import metrics, update

TINY: dict[str, Any] = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 2, "heads": 2, "mlp_dim": 32}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Memory(Logger):
    """Keeps what is logged: name -> (step, value) pairs."""

    name = version = "memory"

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, list[tuple[int | None, float]]] = {}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.rows.setdefault(name, []).append((step, value))


def perturbed(module: nn.Module) -> None:
    """Move every parameter: a zero head would hide mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def pretrain(num_classes: int = 4, dropout: float = 0.0, schedule: Schedule = Schedule(), **optimizer: Any) -> Pretrain:
    stage = Pretrain(
        ViT(**TINY, dropout=dropout),
        partial(Supervised, num_classes=num_classes),
        partial(torch.optim.AdamW, **{"lr": 1e-3, "weight_decay": 0.1, **optimizer}),
        schedule,
    )
    perturbed(stage)
    return stage


def finetune(init_from: Path | None = None, **options: Any) -> Finetune:
    vit = None if init_from else ViT(**TINY)
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    source = str(init_from) if init_from else None
    return Finetune(**{"vit": vit, "init_from": source, "num_classes": 4, "optimizer": sgd, **options})


def data(root: Path, **options: Any) -> ImageFolderData:
    return ImageFolderData(str(root), **{"image_size": 16, "batch_size": 8, "num_workers": 0, **options})


def trainer(**options: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    small = {"accelerator": "cpu", "logger": False, "max_epochs": 1, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    return Trainer(**{**quiet, **small, **options})


def fit(stage: Stage, root: Path, data_options: dict[str, Any] | None = None, **options: Any) -> Trainer:
    runner = trainer(**options)
    runner.fit(stage, data(root, **(data_options or {})))
    return runner


def saved(stage: Stage, root: Path, path: Path) -> Path:
    fit(stage, root, max_steps=2).save_checkpoint(path)
    return path


def state_of(stage: Stage) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in stage.state_dict().items()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


# Checkpoints


@pytest.mark.parametrize("kind", [pretrain, finetune])
def test_a_checkpoint_holds_plain_values_and_gives_the_stage_back(kind: Any, few: Path, tmp_path: Path) -> None:
    stage = kind()
    path = saved(stage, few, tmp_path / "a.ckpt")
    torch.load(path, weights_only=True)
    images = torch.randn(3, 3, 16, 16)
    expected = stage.eval()(images)
    for again in (type(stage).load_from_checkpoint(path), Stage.load_from_checkpoint(path)):
        assert type(again) is type(stage)
        assert torch.equal(again.eval()(images), expected)
        assert again.schedule == stage.schedule
        optimizers = [s.optimizer([nn.Parameter(torch.zeros(1))]) for s in (stage, again)]
        assert type(optimizers[0]) is type(optimizers[1])
        assert optimizers[0].defaults == optimizers[1].defaults
    assert torch.equal(vitlit.load(path)(images), expected)


def test_a_checkpoint_of_the_other_stage_is_refused(few: Path, tmp_path: Path) -> None:
    path = saved(pretrain(), few, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"a\.ckpt holds a \S*Pretrain, not a Finetune"):
        Finetune.load_from_checkpoint(path)


class Derived(Pretrain):
    """A stage of a user's own."""


def test_a_stage_of_ones_own_loads_where_its_package_is_trusted(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Derived(ViT(**TINY), partial(Supervised, num_classes=4), partial(torch.optim.AdamW, lr=1e-3))
    path = saved(stage, few, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=rf"{__name__}\.Derived is outside the packages that may be named"):
        Stage.load_from_checkpoint(path)
    monkeypatch.setenv("VITLIT_TRUST", __name__)
    for again in (Derived.load_from_checkpoint(path), Stage.load_from_checkpoint(path)):
        assert type(again) is Derived
        assert distance(state_of(again), state_of(stage)) == 0


def test_a_stage_that_was_loaded_trains_and_saves_again(few: Path, tmp_path: Path) -> None:
    again = Stage.load_from_checkpoint(saved(pretrain(schedule=Schedule(1, "linear")), few, tmp_path / "a.ckpt"))
    third = Stage.load_from_checkpoint(saved(again, few, tmp_path / "b.ckpt"))
    assert third.schedule == Schedule(1, "linear")
    assert distance(state_of(again), state_of(third)) == 0


def test_a_parameter_has_one_name_in_a_checkpoint(few: Path, tmp_path: Path) -> None:
    stage = pretrain()
    names = torch.load(saved(stage, few, tmp_path / "a.ckpt"), weights_only=True)["state_dict"].keys()
    assert names == {f"vit.{name}" for name in stage.vit.state_dict()}


def test_a_checkpoint_says_what_the_model_is_and_sees(few: Path, tmp_path: Path) -> None:
    about = torch.load(saved(pretrain(), few, tmp_path / "a.ckpt"), weights_only=True)["vitlit"]
    assert about["classes"] == ["0", "1", "2", "3"]
    assert about["preprocess"]["image_size"] == (16, 16)
    assert ViT(**about["vit"]).config.plain() == about["vit"]


@pytest.mark.parametrize(
    "factory", [lambda vit: Supervised(vit, 4), partial(lambda vit, n: Supervised(vit, n), n=4), Supervised.__call__]
)
def test_what_a_checkpoint_could_not_name_is_refused_in_one_line(factory: Any) -> None:
    with pytest.raises(UserError, match=r"cannot be stored in a checkpoint; give a class or a functools\.partial") as e:
        Pretrain(ViT(**TINY), factory, partial(torch.optim.AdamW, lr=1e-3))
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="cannot be stored"):
        Pretrain(ViT(**TINY), partial(Supervised, num_classes=4), lambda groups: torch.optim.AdamW(groups, lr=1e-3))


def test_a_finetuned_checkpoint_needs_no_other_file(few: Path, tmp_path: Path) -> None:
    source = saved(pretrain(), few, tmp_path / "pretrain.ckpt")
    stage = finetune(source)
    path = saved(stage, few, tmp_path / "finetune.ckpt")
    source.unlink()
    images = torch.randn(2, 3, 16, 16)
    again = Finetune.load_from_checkpoint(path)
    assert torch.equal(again.eval()(images), stage.eval()(images))
    fit(finetune(vit=ViT(**TINY)), few, max_epochs=2)  # and a run of it goes on
    trainer(max_epochs=2).fit(Finetune.load_from_checkpoint(path), data(few), ckpt_path=path, weights_only=True)


class Evil:
    """A pickle that runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


POPEN = "lightning.pytorch.strategies.launchers.subprocess_script.subprocess.Popen"  # beneath a trusted package


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_instantiator", "subprocess.check_output"),
        ("_class_path", "subprocess.Popen"),
        ("_class_path", POPEN),
        ("optimizer", {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "MARKER"]}}),
        ("optimizer", {"class_path": POPEN, "init_args": {"args": ["touch", "MARKER"]}}),
        ("objective", {"class_path": "os.system", "init_args": {"command": "touch MARKER"}}),
        ("objective", {"class_path": POPEN, "dict_kwargs": {"args": ["touch", "MARKER"]}}),
        ("vit", {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "MARKER"]}}),
        ("vit", {"class_path": POPEN, "init_args": {"args": ["touch", "MARKER"]}}),
    ],
)
def test_a_checkpoint_that_names_a_foreign_callable_does_not_get_it_called(
    key: str, value: Any, few: Path, tmp_path: Path
) -> None:
    path = saved(pretrain(), few, tmp_path / "a.ckpt")
    marker = tmp_path / "marker"
    checkpoint = torch.load(path, weights_only=True)

    def filled(item: Any) -> Any:
        if isinstance(item, dict):
            return {name: filled(part) for name, part in item.items()}
        if isinstance(item, list):
            return [filled(part) for part in item]
        return item.replace("MARKER", str(marker))

    checkpoint["hyper_parameters"][key] = filled(value)
    torch.save(checkpoint, path)
    with pytest.raises((UserError, ValueError, argparse.ArgumentError)) as caught:
        fit(Stage.load_from_checkpoint(path), few, max_steps=1)
    assert not marker.exists()
    if "subprocess.Popen" in str(value) and POPEN not in str(value):
        assert isinstance(caught.value, UserError)
        assert "subprocess.Popen is outside the packages" in str(caught.value)


@pytest.mark.parametrize("nested", [False, True])
def test_a_pickle_that_would_run_a_command_is_refused(nested: bool, few: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = tmp_path / "evil.ckpt"
    if nested:
        checkpoint = torch.load(saved(pretrain(), few, path), weights_only=True)
        torch.save({**checkpoint, "extra": Evil(marker)}, path)
    else:
        torch.save(Evil(marker), path)
    for read in (vitlit.load, Stage.load_from_checkpoint, lambda p: vitlit.load_weights(ViT(**TINY), p)):
        with pytest.raises(UserError, match=r"evil\.ckpt is not a checkpoint"):
            read(path)
    assert not marker.exists()


# Measures


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


def test_a_finetune_starts_from_zero_logits(few: Path, tmp_path: Path) -> None:
    stage = finetune(saved(pretrain(), few, tmp_path / "a.ckpt"))
    measured = trainer().validate(stage, data(few), verbose=False)[0]
    assert measured["val/loss"] == pytest.approx(math.log(4), abs=1e-6)


class Watch(Callback):
    """Keeps each micro-batch's loss, computed by hand with the weights of that moment."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        vit = copy.deepcopy(pl_module.vit).double()
        with torch.no_grad():
            logits = vit(batch[0].double())
        picked = logits.log_softmax(-1)[torch.arange(len(batch[1])), batch[1]]
        self.losses.append(-picked.mean().item())


@pytest.mark.parametrize("micro_batch", [8, 4])
def test_the_training_loss_is_that_of_the_whole_batch_before_its_update(few: Path, micro_batch: int) -> None:
    memory, watch = Memory(), Watch()
    fit(pretrain(), few, {"micro_batch": micro_batch}, max_steps=3, logger=memory, callbacks=[watch])
    parts = 8 // micro_batch
    by_hand = [sum(watch.losses[i : i + parts]) / parts for i in range(0, len(watch.losses), parts)]
    assert [value for _, value in memory.rows["train/loss"]] == pytest.approx(by_hand, abs=1e-5)
    assert len(by_hand) == 3


def test_rates_are_logged_for_the_update_that_used_them_and_the_first_is_zero(few: Path) -> None:
    memory = Memory()
    stage = pretrain(schedule=Schedule(2, "linear"), lr=0.01)
    fit(stage, few, max_steps=5, logger=memory)
    assert [value for _, value in memory.rows["train/lr"]] == pytest.approx([0, 0.005, 0.01, 0.02 / 3, 0.01 / 3])
    assert [step for step, _ in memory.rows["train/lr"]] == [0, 1, 2, 3, 4]

    stage = pretrain(schedule=Schedule(1), lr=0.01)
    before = state_of(stage)
    runner = trainer(max_steps=2, callbacks=[StopAfter(1)])
    runner.fit(stage, data(few))
    assert runner.global_step == 1
    assert distance(state_of(stage), before) == 0


class StopAfter(Callback):
    """Ends a run after some steps, as an interruption would, without changing how long it thinks it is."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.steps:
            trainer.should_stop = True


def test_throughput_counts_images_not_batches(few: Path) -> None:
    memory = Memory()
    fit(pretrain(), few, {"micro_batch": 4}, logger=memory)
    rates = [value for _, value in memory.rows["train/images_per_second"]]
    assert len(rates) == 5
    assert all(math.isfinite(rate) and rate > 8 for rate in rates)


def test_the_wait_for_data_is_its_share_of_the_time(few: Path) -> None:
    """A loader that sleeps for four fifths of the time, beside a step that sleeps for the rest."""

    class Slow(ImageFolderData):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            time.sleep(0.2)
            return super().on_before_batch_transfer(batch, dataloader_idx)

    class Busy(Callback):
        def on_before_zero_grad(self, *args: Any) -> None:
            time.sleep(0.05)

    waits = {}
    for name, kind in (("slow", Slow), ("fast", ImageFolderData)):
        memory = Memory()
        slow = kind(str(few), image_size=16, batch_size=4, num_workers=0)
        trainer(max_steps=10, log_every_n_steps=2, callbacks=[Busy()], logger=memory).fit(pretrain(), slow)
        waits[name] = [value for _, value in memory.rows["train/data_wait"]]
    assert len(waits["slow"]) >= 4
    assert all(0.5 < wait < 0.85 for wait in waits["slow"][1:])
    assert all(wait < 0.4 for wait in waits["fast"][1:])


# Training


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-5), ("64-true", 1e-9)])
def test_accumulating_micro_batches_gives_the_whole_batchs_weights(few: Path, precision: Any, tolerance: float) -> None:
    start = pretrain(eps=1e-4)  # a bias of the keys has no gradient: Adam would blow its rounding errors up
    results = []
    for micro_batch in (8, 4, 2):
        stage = copy.deepcopy(start)
        runner = fit(stage, few, {"micro_batch": micro_batch}, precision=precision, max_epochs=2)
        assert runner.global_step == 10
        results.append(state_of(stage))
    assert distance(results[0], results[1]) < tolerance
    assert distance(results[0], results[2]) < tolerance
    assert distance(results[0], state_of(start)) > 1e-4


def test_a_run_does_not_depend_on_hidden_random_state(few: Path) -> None:
    start = pretrain(dropout=0.3)
    results = []
    for seed in (1, 2):
        stage = copy.deepcopy(start)
        torch.manual_seed(seed)
        fit(stage, few)
        results.append(state_of(stage))
    assert distance(*results) == 0
    other = copy.deepcopy(start)
    fit(other, few, {"seed": 1})
    assert distance(results[0], state_of(other)) > 0


def test_dropout_differs_from_step_to_step_and_between_micro_batches(few: Path) -> None:
    seen: list[Tensor] = []

    class Draws(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            def keep(module: nn.Module, args: Any, output: Tensor) -> None:
                seen.append(output == 0)
                hook.remove()

            hook = pl_module.vit.pos_drop.register_forward_hook(keep)

    fit(pretrain(dropout=0.5), few, {"micro_batch": 4}, max_steps=3, callbacks=[Draws()])
    assert len(seen) == 6
    assert all(0.4 < mask.double().mean() < 0.6 for mask in seen)
    assert all(not torch.equal(seen[i], seen[j]) for i in range(6) for j in range(i))


def test_freezing_trains_the_head_alone_without_dropout(few: Path) -> None:
    stage = finetune(vit=ViT(**TINY, dropout=0.5), freeze=True)
    before = state_of(stage)
    fit(stage, few)
    after = state_of(stage)
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        "vit.head.weight",
        "vit.head.bias",
    }
    stage.train()
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(stage(images), stage(images))
    whole = finetune(vit=ViT(**TINY, dropout=0.5)).train()
    perturbed(whole)
    assert not torch.equal(whole(images), whole(images))


class Modes(Callback):
    """Keeps, for every training batch, which of encoder and head are in training mode."""

    def __init__(self) -> None:
        self.seen: set[tuple[bool, bool]] = set()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.add((pl_module.vit.blocks[0].training, pl_module.vit.head.training))


@pytest.mark.parametrize("sanity", [0, 1])
def test_a_frozen_encoder_is_in_evaluation_mode_from_the_first_batch_on(few: Path, sanity: int) -> None:
    modes = Modes()
    fit(finetune(freeze=True), few, max_epochs=2, num_sanity_val_steps=sanity, callbacks=[modes])
    assert {encoder for encoder, _ in modes.seen} == {False}


def test_a_vit_that_was_used_for_evaluation_trains_in_training_mode(few: Path) -> None:
    modes = Modes()
    fit(finetune(vit=ViT(**TINY, dropout=0.5).eval()), few, max_epochs=2, callbacks=[modes])
    assert modes.seen == {(True, True)}


def test_freezing_survives_a_checkpoint(few: Path, tmp_path: Path) -> None:
    again = Finetune.load_from_checkpoint(saved(finetune(freeze=True), few, tmp_path / "a.ckpt"))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {"vit.head.weight", "vit.head.bias"}


def test_finetuning_takes_the_encoder_and_leaves_the_head(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = pretrain()
    path = saved(source, few, tmp_path / "a.ckpt")
    stage = finetune(path, schedule=Schedule(1))
    runner = trainer(max_steps=2, callbacks=[StopAfter(1)])  # the one step has the rate 0
    runner.fit(stage, data(few))
    mine, theirs = stage.vit.state_dict(), source.vit.state_dict()
    encoder = [name for name in mine if not name.startswith("head")]
    assert all(torch.equal(mine[name], theirs[name]) for name in encoder)
    assert not mine["head.weight"].any()
    assert f"{len(encoder)} matched" in capsys.readouterr().out


def test_finetuning_without_weights_or_architecture_is_refused() -> None:
    with pytest.raises(UserError, match=r"needs model\.init_from .* or model\.vit"):
        finetune(vit=None)


@pytest.mark.parametrize("classes", [None, 0, 1])
def test_fewer_than_two_classes_are_refused(classes: int | None) -> None:
    with pytest.raises(UserError, match=f"num_classes of at least 2, not {classes}"):
        finetune(num_classes=classes)


def test_gradients_are_clipped_to_the_norm_given(few: Path) -> None:
    for clip, expected in ((0.01, 0.01), (None, None)):
        stage = finetune(optimizer=partial(torch.optim.SGD, lr=1.0))
        perturbed(stage)
        before = state_of(stage)
        fit(stage, few, max_steps=1, gradient_clip_val=clip)
        after = state_of(stage)
        moved = math.sqrt(sum(((after[name] - before[name]) ** 2).sum().item() for name in after))
        if expected is None:
            assert moved > 0.05
        else:
            assert moved == pytest.approx(expected, rel=1e-3)


def test_sgd_moves_by_its_momentum_as_written_by_hand(few: Path) -> None:
    stage = finetune(optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9), schedule=Schedule(0, "linear"))
    perturbed(stage)
    gradients: list[Tensor] = []
    weight = stage.vit.head.weight
    assert isinstance(weight, nn.Parameter)
    before = weight.detach().clone()
    weight.register_hook(lambda gradient: gradients.append(gradient.clone()))
    fit(stage, few, max_steps=3)
    buffer, expected = torch.zeros_like(before), before
    for gradient, factor in zip(gradients, (1, 2 / 3, 1 / 3), strict=True):
        buffer = 0.9 * buffer + gradient
        expected = expected - 0.1 * factor * buffer
    assert (weight - expected).abs().max() < 1e-6


@pytest.mark.parametrize(("steps", "validations"), [(3, 1), (5, 1), (7, 2)])
def test_a_run_that_ends_within_an_epoch_is_validated_at_its_end(few: Path, steps: int, validations: int) -> None:
    memory = Memory()
    runner = fit(pretrain(), few, max_epochs=-1, max_steps=steps, logger=memory)
    assert runner.global_step == steps
    assert len(memory.rows["val/top1"]) == validations


def test_training_without_an_end_is_refused(few: Path) -> None:
    with pytest.raises(UserError, match="training has no end"):
        fit(pretrain(), few, max_epochs=-1)


def test_a_warm_up_longer_than_the_training_is_refused(few: Path) -> None:
    with pytest.raises(UserError, match="warmup is 5 steps but training has only 5"):
        fit(pretrain(schedule=Schedule(5)), few)


def test_a_loss_that_is_no_number_stops_the_training(few: Path) -> None:
    with pytest.raises(UserError, match=r"the loss of step \d+ .*is no finite number; lower the learning rate"):
        fit(pretrain(lr=1e30), few, max_epochs=5)


def test_a_small_vit_overfits_forty_digits(few: Path) -> None:
    runner = fit(pretrain(lr=5e-3, weight_decay=0.0), few, {"crop_scale": (1.0, 1.0), "flip": 0.0}, max_epochs=40)
    assert runner.callback_metrics["train/loss"] < 0.05


def test_loaders_in_place_of_a_data_module_train(few: Path, tmp_path: Path) -> None:
    images, labels = torch.randn(12, 3, 16, 16), torch.arange(12) % 4
    loader = DataLoader(TensorDataset(images, labels), 4)
    stage = pretrain()
    runner = trainer()
    runner.fit(stage, loader, loader)
    assert runner.callback_metrics["val/loss"] == pytest.approx(F.cross_entropy(stage(images), labels).item(), abs=1e-5)
    runner.save_checkpoint(tmp_path / "a.ckpt")
    loaded = vitlit.load(tmp_path / "a.ckpt")
    assert torch.equal(loaded(images), stage.eval()(images))
    assert loaded.classes == []
    assert loaded.preprocess is None


def test_prediction_gives_probabilities(few: Path) -> None:
    stage = pretrain()
    folder = data(few)
    folder.splits.photos = [few / "val" / "0"]
    batches = trainer().predict(stage, folder)
    assert isinstance(batches, list)
    probabilities = torch.cat(batches)  # type: ignore[arg-type]
    assert probabilities.shape == (3, 4)
    assert torch.allclose(probabilities.sum(-1), torch.ones(3))


@pytest.mark.parametrize(("size", "classes", "words"), [(24, 4, "images of 16"), (16, 7, "num_classes=4")])
def test_data_that_does_not_fit_the_network_is_refused(few: Path, size: int, classes: int, words: str) -> None:
    stage = Pretrain(
        ViT(image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp_dim=16),
        partial(Supervised, num_classes=classes),
        partial(torch.optim.AdamW, lr=1e-3),
    )
    data = ImageFolderData(str(few), image_size=size, batch_size=8, num_workers=0)
    with pytest.raises(UserError, match=words):
        Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1).fit(stage, data)


def test_the_mean_average_precision_is_scikit_learns_over_the_classes_that_have_images() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 5, generator=generator)
    labels = (torch.rand(40, 5, generator=generator) < 0.3).float()
    labels[:, 3] = 0
    measures = metrics(5, multi_label=True)
    for part in (slice(0, 15), slice(15, 40)):
        update(measures, torch.tensor(1.0), logits[part], labels[part], len(logits[part]))
    measure: Any = measures["map"]
    present = [0, 1, 2, 4]
    expected = average_precision_score(labels[:, present], logits[:, present], average="macro")
    assert measure.compute().item() == pytest.approx(expected, abs=1e-6)
