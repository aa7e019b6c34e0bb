"""A run that is interrupted and continued is, bit for bit, the run that was not."""

import csv
import itertools
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import SMALL, launched
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from vitlit.data import ImageFolderData
from vitlit.data.stream import order
from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.objectives import Supervised
from vitlit.optim import Schedule
from vitlit.stages import Pretrain, Stage

EPOCHS, STEPS = 3, 5  # 40 images by 8


class Recorder(Callback):
    """The indices of every step's samples; a checkpoint and the end where it is told to stop."""

    def __init__(self, stop: int | None, checkpoint: Path | None) -> None:
        self.stop, self.checkpoint = stop, checkpoint
        self.steps: dict[int, list[int]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.steps.setdefault(trainer.global_step, []).extend(batch[2].tolist())

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self.stop is not None and trainer.global_step == self.stop and self.stop % STEPS:
            self._end(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self.stop:
            self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        assert self.checkpoint is not None
        trainer.save_checkpoint(self.checkpoint)
        raise KeyboardInterrupt


class Outcome(NamedTuple):
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    steps: dict[int, list[int]]


def run(
    root: Path,
    stop: int | None = None,
    checkpoint: Path | None = None,
    source: Path | None = None,
    epochs: int = EPOCHS,
    **options: Any,
) -> Outcome:
    """Train with dropout and augmentation, from the checkpoint `source`, up to step `stop` and its `checkpoint`."""
    torch.manual_seed(0 if source is None else 12345)  # of the initial weights; nothing else may depend on it
    vit = ViT(image_size=16, patch_size=8, width=16, depth=2, heads=2, mlp_dim=32, dropout=0.2, attention_dropout=0.1)
    optimizer = partial(torch.optim.AdamW, lr=5e-3)
    stage = Pretrain(vit, partial(Supervised, num_classes=4), optimizer, Schedule(warmup=3))
    recorder = Recorder(stop, checkpoint)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[recorder],
        gradient_clip_val=1.0,
    )
    data = ImageFolderData(str(root), **{"image_size": 16, "batch_size": 8, "num_workers": 0, **options})
    try:
        trainer.fit(stage, data, ckpt_path=source, weights_only=True)
    except (KeyboardInterrupt, SystemExit):
        assert stop is not None
    else:
        assert stop is None
        assert trainer.global_step == epochs * STEPS
    weights = {name: tensor.clone() for name, tensor in stage.state_dict().items()}
    return Outcome(weights, trainer.optimizers[0].state_dict() if trainer.optimizers else {}, recorder.steps)


def assert_same(a: Any, b: Any) -> None:
    """Equal to the last bit, at any depth."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.fixture(scope="module")
def whole(few: Path) -> Outcome:
    """The run that nothing interrupts."""
    return run(few)


@pytest.fixture(scope="module")
def whole_in_parts(few: Path) -> Outcome:
    """The same in two micro-batches a step."""
    return run(few, micro_batch=4)


def test_an_uninterrupted_run_visits_each_epochs_order(whole: Outcome) -> None:
    for epoch in range(EPOCHS):
        visited = [index for step in range(STEPS) for index in whole.steps[epoch * STEPS + step]]
        assert visited == order(0, epoch, 40).tolist()


@pytest.mark.parametrize("stop", [2, 5, 7, 10, 14], ids=["warm-up", "epoch", "middle", "second epoch", "last step"])
def test_a_continued_run_is_the_uninterrupted_one(stop: int, few: Path, tmp_path: Path, whole: Outcome) -> None:
    before = run(few, stop, tmp_path / "a.ckpt")
    after = run(few, source=tmp_path / "a.ckpt")
    assert sorted(after.steps) == list(range(stop, EPOCHS * STEPS))
    assert {**before.steps, **after.steps} == whole.steps
    assert_same(after.weights, whole.weights)
    assert_same(after.optimizer, whole.optimizer)


@pytest.mark.parametrize("stop", [5, 7])
def test_a_continued_run_with_worker_processes_is_the_uninterrupted_one_without(
    stop: int, few: Path, tmp_path: Path, whole: Outcome
) -> None:
    run(few, stop, tmp_path / "a.ckpt", num_workers=2)
    after = run(few, source=tmp_path / "a.ckpt", num_workers=2)
    assert all(after.steps[step] == whole.steps[step] for step in range(stop, EPOCHS * STEPS))
    assert_same(after.weights, whole.weights)
    assert_same(after.optimizer, whole.optimizer)


@pytest.mark.parametrize("stop", [5, 7])
def test_a_continued_run_with_accumulation_is_the_uninterrupted_one(
    stop: int, few: Path, tmp_path: Path, whole: Outcome, whole_in_parts: Outcome
) -> None:
    run(few, stop, tmp_path / "a.ckpt", micro_batch=4)
    after = run(few, source=tmp_path / "a.ckpt", micro_batch=4)
    assert whole_in_parts.steps == whole.steps
    assert all(after.steps[step] == whole.steps[step] for step in range(stop, EPOCHS * STEPS))
    assert_same(after.weights, whole_in_parts.weights)
    assert_same(after.optimizer, whole_in_parts.optimizer)


def test_a_run_continued_twice_is_the_uninterrupted_one(few: Path, tmp_path: Path, whole: Outcome) -> None:
    parts = [run(few, 4, tmp_path / "a.ckpt"), run(few, 9, tmp_path / "b.ckpt", source=tmp_path / "a.ckpt")]
    parts.append(run(few, source=tmp_path / "b.ckpt"))
    assert [sorted(part.steps) for part in parts] == [list(range(4)), list(range(4, 9)), list(range(9, 15))]
    assert_same(parts[-1].weights, whole.weights)
    assert_same(parts[-1].optimizer, whole.optimizer)


def test_a_longer_run_of_a_finished_one_visits_the_next_epochs(few: Path, tmp_path: Path, whole: Outcome) -> None:
    run(few, EPOCHS * STEPS, tmp_path / "a.ckpt")
    longer = run(few, source=tmp_path / "a.ckpt", epochs=EPOCHS + 2)
    assert sorted(longer.steps) == list(range(EPOCHS * STEPS, (EPOCHS + 2) * STEPS))
    for epoch in (EPOCHS, EPOCHS + 1):
        visited = [index for step in range(STEPS) for index in longer.steps[epoch * STEPS + step]]
        assert visited == order(0, epoch, 40).tolist()
    assert any(not torch.equal(longer.weights[name], whole.weights[name]) for name in whole.weights)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"batch_size": 4}, "run had batch_size 8, this one has 4: give --data.batch_size 8"),
        ({"holdout": "10%"}, "run had images 40, this one has 36: restore the data"),
        ({"seed": 1}, "run had seed 0, this one has 1: give --data.seed 0"),
    ],
)
def test_another_stream_of_samples_cannot_continue_a_run(
    options: dict[str, Any], pattern: str, few: Path, tmp_path: Path
) -> None:
    run(few, 2, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=f"{pattern}, or start another with --model.init_from$"):
        run(few, source=tmp_path / "a.ckpt", **options)


def test_other_images_cannot_continue_a_run(few: Path, tmp_path: Path) -> None:
    run(few, 2, tmp_path / "a.ckpt")
    for name, (old, new) in {"renamed": ("0", "0"), "moved": ("0", "1")}.items():
        other = Path(shutil.copytree(few, tmp_path / name))
        image = sorted((other / "train" / old).iterdir())[0]
        image.rename(other / "train" / new / "another.png")
        with pytest.raises(UserError, match="had images of other names or labels: restore the data"):
            run(other, source=tmp_path / "a.ckpt")


@pytest.mark.parametrize(("first", "second"), [(8, 2), (4, 8), (2, 4)])
@pytest.mark.parametrize("stop", [5, 7])
def test_another_division_of_the_batch_may_continue_a_run(
    stop: int, first: int, second: int, few: Path, tmp_path: Path, whole: Outcome
) -> None:
    run(few, stop, tmp_path / "a.ckpt", micro_batch=first)
    after = run(few, source=tmp_path / "a.ckpt", micro_batch=second)
    assert after.steps == {step: whole.steps[step] for step in range(stop, EPOCHS * STEPS)}


# Kills: the command line, with all that draws numbers, is killed at random moments and run again.

COMMAND = (
    *("fit", *SMALL, "--data.batch_size", 8, "--trainer.max_steps", -1),  # 5 steps an epoch
    *("--model.vit.dropout", 0.1, "--model.vit.attention_dropout", 0.1, "--model.vit.drop_path", 0.1),
    *("--data.mixing.mixup", 0.8, "--data.mixing.cutmix", 1.0, "--data.erasing.prob", 0.5),
    *("--trainer.callbacks", "[{class_path: vitlit.callbacks.EMA, init_args: {decay: 0.7}}]"),
    *("--run.save_minutes", 0),  # after every step
)
KILLED = -signal.SIGKILL
CASES = [(workers, ranks) for ranks in (1, 2) for workers in (0, 2)]


def log_samples() -> None:
    """Let every rank append the samples of each step to a file of its own."""
    original = Stage.on_train_batch_start

    def patched(self: Stage, batch: Any, index: int) -> None:
        with Path(f"samples-{self.global_rank}").open("a") as file:
            file.write(f"{self.trainer.global_step} {batch[2].tolist()}\n")
        original(self, batch, index)

    setattr(Stage, "on_train_batch_start", patched)  # noqa: B010


def killed_in(step: int, seconds: float, rank: int) -> Callable[[], None]:
    """Let a rank kill itself so long after a step of this start has begun, whatever it is doing then."""

    def before() -> None:
        log_samples()
        original, steps = Stage.on_train_batch_start, itertools.count()

        def patched(self: Stage, batch: Any, index: int) -> None:
            original(self, batch, index)
            if self.global_rank == rank and next(steps) == step:
                timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
                timer.daemon = True
                timer.start()

        setattr(Stage, "on_train_batch_start", patched)  # noqa: B010

    return before


def samples(folder: Path) -> dict[tuple[int, int], str]:
    """The samples of each (rank, step); a step that was trained twice must have had the same ones."""
    found: dict[tuple[int, int], str] = {}
    for file in folder.glob("samples-*"):
        for line in file.read_text().splitlines(keepends=True):
            step, _, listed = line.partition(" ")
            if line.endswith("\n"):  # else cut off by a kill
                assert found.setdefault((int(file.name[8:]), int(step)), listed) == listed
    return found


def left(folder: Path) -> dict[str, Any]:
    """What a run comes to: weights, average, optimizer, probes and metrics, but for the speed."""
    run = folder / "runs" / "pretrain"
    content = torch.load(run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
    names = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "loops")
    best = torch.load(run / "checkpoints" / "best.ckpt", map_location="cpu", weights_only=True)
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    speed = ("second", "wait", "memory")
    metrics = [{name: row[name] for name in row if not any(word in name for word in speed)} for row in rows]
    made = {name: content.get(name) for name in names}  # None without an average
    made["probes"] = content["callbacks"].get("Probes")
    return {**made, "step": content["global_step"], "best": best["state_dict"], "metrics": metrics}


def survive(
    kills: int,
    epochs: int,
    workers: int,
    ranks: int,
    few: Path,
    folder: Path,
    draw: random.Random,
    given: Sequence[object] = COMMAND,
) -> None:
    """Run the command until it is complete, killing it so often, in one of its first steps and the checkpoint after."""
    command = (*given, "--trainer.max_epochs", epochs, "--data.root", few, "--data.num_workers", workers)
    for _ in range(kills):
        before = killed_in(draw.randrange(3), draw.uniform(0, 0.03), draw.randrange(ranks))
        assert KILLED in [result.code for result in launched(ranks, *command, cwd=folder, before=before)]
    for result in launched(ranks, *command, cwd=folder, before=log_samples):
        assert result.code == 0, result.err


@pytest.fixture(scope="module")
def undisturbed(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """The folder in which so many processes trained so many epochs and were never killed."""

    @cache
    def run(ranks: int, epochs: int) -> Path:
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        survive(0, epochs, 0, ranks, few, folder, random.Random(0))
        return folder

    return run


def check_kills(
    kills: int, epochs: int, workers: int, ranks: int, few: Path, folder: Path, whole: Path, seed: int
) -> None:
    survive(kills, epochs, workers, ranks, few, folder, random.Random(seed))
    assert_same(left(folder), left(whole))
    assert samples(folder) == samples(whole)
    print(f"{workers} workers, {ranks} processes: killed {kills} times, identical")


@pytest.mark.parametrize(("workers", "ranks"), CASES[::3])
def test_a_run_that_is_killed_twice_is_the_undisturbed_one(
    workers: int, ranks: int, few: Path, tmp_path: Path, undisturbed: Callable[[int, int], Path]
) -> None:
    check_kills(2, 3, workers, ranks, few, tmp_path, undisturbed(ranks, 3), seed=workers)


@pytest.mark.long
@pytest.mark.parametrize(("workers", "ranks"), CASES)
def test_a_run_that_is_killed_twenty_times_is_the_undisturbed_one(
    workers: int, ranks: int, few: Path, tmp_path: Path, undisturbed: Callable[[int, int], Path]
) -> None:
    check_kills(20, 14, workers, ranks, few, tmp_path, undisturbed(ranks, 14), seed=100 + workers)
