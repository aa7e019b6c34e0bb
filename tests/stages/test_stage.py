"""The stages built in Python: what they learn, log and refuse."""

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from small_stage import TINY, Memory, data, distance, finetune, fit, perturbed, pretrain, saved, state_of, trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import vitlit
from vitlit.data import ImageFolderData
from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.objectives import Supervised
from vitlit.optim import Schedule
from vitlit.stages import Finetune, Pretrain


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


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
            logits = vit(batch.views[0].double())
        picked = logits.log_softmax(-1)[torch.arange(len(batch.labels)), batch.labels]
        self.losses.append(-picked.mean().item())


class Row(Callback):
    """Logs a number of its own beside the stage's."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.log_step("train/steps", torch.tensor(float(trainer.global_step)), prog_bar=True)


def test_a_step_is_logged_in_one_row_every_so_many_steps(few: Path) -> None:
    """One row on a tracker's page, with what callbacks log; what monitors and bars read has the same values."""

    class Rows(Memory):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            rows.append((step, dict(metrics)))

    rows: list[tuple[int | None, dict[str, float]]] = []
    options: dict[str, Any] = {"max_epochs": 2, "log_every_n_steps": 3, "limit_val_batches": 0}
    runner = fit(pretrain(), few, logger=Rows(), callbacks=[Row()], **options)
    assert [step for step, _ in rows] == [2, 4, 5, 8, 9]  # every third, and the last of an epoch
    for _, row in rows:
        assert {"train/steps", "train/loss", "train/lr", "epoch"} <= row.keys()
    assert [row["train/steps"] for _, row in rows] == [3, 5, 6, 9, 10]
    last = runner.callback_metrics["train/loss"].item()
    assert last == rows[-1][1]["train/loss"]
    assert runner.logged_metrics["train/loss"] == last
    assert {"train/steps": 10.0, "train/loss": last}.items() <= runner.progress_bar_metrics.items()


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
    with pytest.raises(UserError, match=r"there is no architecture: give model\.init_from .* or model\.vit"):
        finetune(vit=None)


@pytest.mark.parametrize("classes", [None, 0, 1])
def test_fewer_than_two_classes_are_refused(classes: int | None) -> None:
    with pytest.raises(UserError, match=f"num_classes of at least 2, not {classes or 0}"):
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


def test_a_longer_training_goes_on_at_its_own_rate(few: Path, tmp_path: Path) -> None:
    stage, memories = partial(pretrain, schedule=Schedule(warmup=2)), [Memory(), Memory()]
    fit(stage(), few, logger=memories[0], max_epochs=3)
    fit(stage(), few).save_checkpoint(path := tmp_path / "first.ckpt")
    longer = trainer(logger=memories[1], max_epochs=3)
    longer.fit(stage(), data(few), ckpt_path=path, weights_only=True)
    expected, rates = (memory.rows["train/lr"] for memory in memories)
    assert rates == expected[5:]


def test_training_without_an_end_is_refused(few: Path) -> None:
    with pytest.raises(UserError, match="training has no end"):
        fit(pretrain(), few, max_epochs=-1)


def test_a_warm_up_longer_than_the_training_is_refused(few: Path) -> None:
    with pytest.raises(UserError, match="warmup is 5 steps but training has only 5"):
        fit(pretrain(schedule=Schedule(5)), few)


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


@pytest.mark.parametrize(
    ("size", "classes", "words"),
    [(24, 4, "images of 16"), (16, 7, "num_classes is 7, but the data has 4 classes")],
)
def test_data_that_does_not_fit_the_network_is_refused(few: Path, size: int, classes: int, words: str) -> None:
    stage = Pretrain(
        ViT(image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp_dim=16),
        partial(Supervised, num_classes=classes),
        partial(torch.optim.AdamW, lr=1e-3),
    )
    data = ImageFolderData(str(few), image_size=size, batch_size=8, num_workers=0)
    with pytest.raises(UserError, match=words):
        Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1).fit(stage, data)
