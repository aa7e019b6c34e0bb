"""Probes: neighbours, a linear layer and the rank of features while a ViT learns, and alarms of a collapse."""

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HEADS, SMALL, Result, done, launched, refused, user_error
from lightning.pytorch import Trainer
from small_stage import Memory, data, trainer
from test_ddp import no_rank_is_left_behind, read
from test_resume import assert_same
from test_without_labels import EACH, OBJECTIVES, TINY, Watch, made
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from vitlit.callbacks import EMA, Probes, probes
from vitlit.data import ImageFolderData
from vitlit.data.mixing import Mixing
from vitlit.evaluation import deviation, effective_rank, knn
from vitlit.images.decode import decode_bytes
from vitlit.model import ViT
from vitlit.objectives import MAE, Objective, Regression, Supervised
from vitlit.optim import Schedule
from vitlit.stages import Pretrain, Stage

__all__ = ["no_rank_is_left_behind"]  # of every test here, too
pytestmark = pytest.mark.usefixtures("undrawn")


def features_of(stage: Stage, root: Path, split: str, images: int | None = None) -> tuple[Tensor, Tensor]:
    """By the stage's weights, as evaluation sees the images, or so many of them, spread over the split."""
    folder = data(root)
    loader = {"train": folder.train_dataloader, "val": folder.val_dataloader}[split]
    loader()
    index, crop, normalise = folder.split(split), folder.preprocess.crop, folder.preprocess.normalise
    chosen = range(len(index)) if images is None else [i * len(index) // images for i in range(images)]
    pixels = torch.stack([crop(decode_bytes(index.read(i), index.path(i))) for i in chosen])
    stage.eval()
    with torch.no_grad():
        vit: Any = getattr(stage.objective, "teacher_vit", stage.vit)
        found: Tensor = vit.pool(vit.features(normalise(pixels, torch.float32)))
    return found, torch.from_numpy(index.labels[list(chosen)])


@pytest.mark.parametrize(("name", "bank"), [*((name, 25) for name in OBJECTIVES), ("mae", 1000)])
def test_neighbours_are_those_of_the_weights_that_go_on(name: str, bank: int, few: Path) -> None:
    stage, of_data = made(OBJECTIVES[name])
    runner = trainer(max_epochs=2, callbacks=[Probes(bank)])
    runner.fit(stage, data(few, **of_data))
    expected = knn(*features_of(stage, few, "train", min(bank, 40)), *features_of(stage, few, "val"))
    assert runner.callback_metrics["val/knn"].item() == pytest.approx(expected)
    assert {"val/probe", "train/rank", "train/deviation"} <= runner.callback_metrics.keys()


class Seen(Probes):
    """Keeps the features and labels of each step, as the training loop hands them over."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps = [*getattr(self, "steps", []), (pl_module.step_features.clone(), batch.labels.clone())]
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


@EACH
def test_the_linear_layer_learns_from_each_batch_and_moves_nothing_else(
    make: Callable[[ViT], Objective], few: Path
) -> None:
    logs, seen = Memory(), Seen()
    stage, of_data = made(make)
    runner = trainer(max_epochs=2, callbacks=[seen], logger=logs)
    runner.fit(stage, data(few, **of_data))
    layer = torch.nn.Linear(16, 4)
    for part in layer.parameters():
        torch.nn.init.zeros_(part)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-3)
    for step, (features, labels) in enumerate(seen.steps):
        assert not features.requires_grad
        assert logs.rows["train/rank"][step][1] == pytest.approx(effective_rank(features).item(), rel=1e-5)
        assert logs.rows["train/deviation"][step][1] == pytest.approx(deviation(features).item(), rel=1e-5)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(torch.nn.functional.layer_norm(features, (16,))), labels).backward()
        optimizer.step()
    features, labels = features_of(stage, few, "val")
    expected = (layer(torch.nn.functional.layer_norm(features, (16,))).argmax(1) == labels).float().mean().item()
    assert runner.callback_metrics["val/probe"].item() == pytest.approx(expected)
    alone, _ = made(make)
    trainer(max_epochs=2).fit(alone, data(few, **of_data))
    assert_same(stage.state_dict(), alone.state_dict())


def state_of(runner: Trainer) -> Any:
    callbacks: Any = runner.callbacks  # type: ignore[attr-defined]
    return next(callback for callback in callbacks if isinstance(callback, Probes)).state_dict()


@EACH
def test_a_continued_run_measures_what_the_uninterrupted_one_does(
    make: Callable[[ViT], Objective], few: Path, tmp_path: Path
) -> None:
    def fit(watch: Watch, source: Path | None = None) -> tuple[Any, Memory]:
        stage, of_data = made(make, dropout=0.1)
        logs = Memory()
        runner = trainer(max_epochs=3, callbacks=[Probes(every=2), EMA(0.7), watch], logger=logs)
        try:
            runner.fit(stage, data(few, **of_data), ckpt_path=source, weights_only=True)
        except (KeyboardInterrupt, SystemExit):
            return None, logs
        return state_of(runner), logs

    whole, logs = fit(Watch())
    assert [step for step, _ in logs.rows["val/knn"]] == [4, 14]  # the first epoch and the last
    assert fit(Watch(7, tmp_path / "a.ckpt"))[0] is None
    after, rest = fit(Watch(), tmp_path / "a.ckpt")
    assert_same(after, whole)
    for name in ("val/knn", "val/probe", "train/rank", "train/deviation"):
        assert rest.rows[name] == [(step, value) for step, value in logs.rows[name] if step and step >= 7], name


def spread(make: Callable[[ViT], Objective], root: Path, folder: Path, devices: int, **options: Any) -> list[Any]:
    """What each of so many devices comes to."""

    class Keep(Watch):
        def on_fit_end(self, trainer: Trainer, module: Any) -> None:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            torch.save({"metrics": metrics, "state": state_of(trainer)}, folder / f"rank{trainer.global_rank}.pt")

    folder.mkdir()
    stage, of_data = made(make)
    strategy = "auto" if devices == 1 else "ddp_fork"
    of_trainer: dict[str, Any] = {"devices": devices, "strategy": strategy, "precision": "64-true", "max_epochs": 3}
    trainer(callbacks=[Probes(33), Keep()], **of_trainer).fit(stage, data(root, **of_data, **options))
    return [read(folder / f"rank{rank}.pt") for rank in range(devices)]


@pytest.mark.parametrize(("name", "micro_batch"), [("dino", None), ("lejepa", None), ("mae", 2)])
def test_two_devices_measure_what_one_does(name: str, micro_batch: int | None, few: Path, tmp_path: Path) -> None:
    (one,) = spread(OBJECTIVES[name], few, tmp_path / "one", 1)
    for two in spread(OBJECTIVES[name], few, tmp_path / "two", 2, micro_batch=micro_batch):
        for metric in ("val/knn", "val/probe", "train/rank", "train/deviation"):
            assert two["metrics"][metric] == pytest.approx(one["metrics"][metric], rel=1e-5), metric
        for part, other in zip(two["state"]["layer"][0].values(), one["state"]["layer"][0].values(), strict=True):
            assert (part - other).abs().max() < 1e-6
            assert part.abs().max() > 1e-3


def test_an_average_is_what_is_measured(few: Path) -> None:
    stage, _ = made(OBJECTIVES["mae"])
    runner = trainer(max_epochs=4, callbacks=[Probes(), EMA(0.9)])  # in either order
    runner.fit(stage, data(few))  # and ends with the average in the stage
    expected = knn(*features_of(stage, few, "train"), *features_of(stage, few, "val"))
    assert runner.callback_metrics["val/knn"].item() == pytest.approx(expected)


def one_class(few: Path, folder: Path) -> Path:
    """A part of the images, of which all are of one class."""
    for split in ("train", "val"):
        (folder / "one" / split).mkdir(parents=True)
        (folder / "one" / split / "0").symlink_to(few / split / "0")
    return folder / "one"


def test_labels_are_needed_nowhere_and_used_where_they_are_classes(few: Path, tmp_path: Path) -> None:
    loose = tmp_path / "loose"
    for image in few.glob("*/*/*"):
        path = loose / image.parent.parent.name / f"{image.parent.name}-{image.name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(image)
    numbers = tmp_path / "numbers.csv"
    rows = [f"{image.relative_to(few)},{image.parent.name}.5,{image.parent.parent.name}" for image in few.glob("*/*/*")]
    numbers.write_text("\n".join(["path,label,split", *rows]))
    optimizer = partial(torch.optim.SGD, lr=0.01)
    regression = Pretrain(made(OBJECTIVES["mae"])[0].vit, Regression, optimizer)
    for stage, given in (
        (made(OBJECTIVES["mae"])[0], data(loose)),
        (regression, data(few, manifest=str(numbers), labels="numbers")),
        (made(OBJECTIVES["mae"])[0], data(one_class(few, tmp_path), batch_size=5)),
    ):
        runner = trainer(callbacks=[Probes()])
        runner.fit(stage, given)
        logged = runner.callback_metrics.keys()
        assert "train/rank" in logged
        assert not {"val/knn", "val/probe"} & logged
    mixed = Pretrain(made(OBJECTIVES["mae"])[0].vit, partial(Supervised, num_classes=4), optimizer)
    runner = trainer(callbacks=[Probes()])
    runner.fit(mixed, data(few, mixing=Mixing(0.8, 1.0)))
    assert {"val/knn", "val/probe", "val/top1"} <= runner.callback_metrics.keys()


def partly_labelled(self: ImageFolderData, batch: Any, index: int) -> Any:
    """A batch in which two of three images have no class, and all of some steps."""
    made = TRANSFERRED(self, batch, index)
    labelled = (made.indices % 3 == 0) & (made.indices < 36)
    return made._replace(labels=torch.where(labelled, made.labels, -1))


TRANSFERRED = ImageFolderData.on_after_batch_transfer


def test_images_without_a_class_have_no_part(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFolderData, "on_after_batch_transfer", partly_labelled)
    stage, _ = made(OBJECTIVES["mae"])
    seen = Seen()
    runner = trainer(max_epochs=2, callbacks=[seen])
    runner.fit(stage, data(few, batch_size=2))
    layer = torch.nn.Linear(16, 4)
    for part in layer.parameters():
        torch.nn.init.zeros_(part)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-3)
    counts = set()
    for features, labels in seen.steps:
        known = labels >= 0
        counts.add(int(known.sum()))
        rows = torch.nn.functional.layer_norm(features[known], (16,))
        optimizer.zero_grad()
        (
            torch.nn.functional.cross_entropy(layer(rows), labels[known], reduction="sum") / max(1, known.sum())
        ).backward()
        optimizer.step()
    assert counts == {0, 1, 2}
    state = state_of(runner)["layer"][0]
    torch.testing.assert_close(state["1.weight"], layer.weight.data)
    bank, labels = features_of(stage, few, "train")
    features, truth = features_of(stage, few, "val")
    chosen, of_val = [torch.arange(count)[::3] for count in (36, 11)]
    expected = knn(bank[chosen], labels[chosen], features[of_val], truth[of_val])
    assert runner.callback_metrics["val/knn"].item() == pytest.approx(expected)
    found = layer(torch.nn.functional.layer_norm(features[of_val], (16,))).argmax(1)
    right = (found == truth[of_val]).float().mean().item()
    assert runner.callback_metrics["val/probe"].item() == pytest.approx(right)
    (one,) = spread(OBJECTIVES["mae"], few, tmp_path / "one", 1)
    for two in spread(OBJECTIVES["mae"], few, tmp_path / "two", 2):
        for name in ("val/knn", "val/probe"):
            assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-5), name
        for part, other in zip(two["state"]["layer"][0].values(), one["state"]["layer"][0].values(), strict=True):
            assert (part - other).abs().max() < 1e-6


def plain(labels: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(len(labels), 3, 16, 16), labels), 4)


def test_labels_out_of_range_are_refused() -> None:
    labels = torch.arange(16) % 4
    labels[5] = 6  # in the second step, of which nothing is logged
    stage, _ = made(OBJECTIVES["mae"])
    runner = trainer(callbacks=[Probes(classes=4)], log_every_n_steps=3)
    message = "a label is 6, but Probes was told of 4 classes, by its classes or the data"
    user_error(message, runner.fit, stage, plain(labels), plain(labels % 4))
    assert runner.global_step == 3
    nothing = torch.full((4,), -1)
    runner = trainer(callbacks=[Probes(classes=7)])
    runner.fit(stage, plain(labels), plain(nothing))
    assert not {"val/knn", "val/probe"} & runner.callback_metrics.keys()


class Operations(TorchDispatchMode):
    """Counts what torch computes."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


class Counted(Seen):
    """Keeps, too, how much is computed after each micro-batch."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        with Operations() as operations:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.operations = [*getattr(self, "operations", []), operations.count - 2]  # Seen's


def test_without_classes_only_steps_that_log_are_looked_at_and_whole(few: Path, tmp_path: Path) -> None:
    logs, counted = Memory(), Counted()
    stage, _ = made(OBJECTIVES["mae"])
    runner = trainer(max_epochs=2, log_every_n_steps=3, callbacks=[counted], logger=logs)
    runner.fit(stage, data(one_class(few, tmp_path), batch_size=2, micro_batch=1))
    assert runner.global_step == 10
    by_step = list(zip(counted.operations[::2], counted.operations[1::2], strict=True))
    looked = [step for step, (before, after) in enumerate(by_step, start=1) if after]
    assert looked == [1, 3, 5, 6, 9, 10]  # also the first, and the last of an epoch
    assert not any(before for before, _ in by_step)
    for step, value in logs.rows["train/rank"]:
        assert step is not None
        features = torch.cat([seen for seen, _ in counted.steps[2 * step : 2 * step + 2]])
        assert value == pytest.approx(effective_rank(features).item(), rel=1e-5)
    assert [step for step, _ in logs.rows["train/rank"]] == [2, 4, 5, 8, 9]


def test_plain_loaders_and_a_plain_trainer(few: Path) -> None:
    folder = data(few)
    batches = [
        list(zip(*[(b.views[0], b.labels) for b in loader()], strict=True))
        for loader in (folder.train_dataloader, folder.val_dataloader)
    ]
    train, val = (TensorDataset(*map(torch.cat, parts)) for parts in batches)
    stage, _ = made(OBJECTIVES["mae"])
    plain = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    runner = Trainer(**plain, max_epochs=2, callbacks=[Probes(20, classes=4)], enable_model_summary=False)  # type: ignore
    loaders = DataLoader(train, 8, shuffle=True), DataLoader(val, 8)
    runner.fit(stage, *loaders)
    stage.eval()
    with torch.no_grad():
        of_train, of_val = (stage.vit(part.tensors[0]) for part in (train, val))
    expected = knn(of_train[::2], train.tensors[1][::2], of_val, val.tensors[1])
    assert runner.callback_metrics["val/knn"].item() == pytest.approx(expected)
    assert "val/probe" in runner.callback_metrics


PLANTED: dict[str, tuple[str, dict[str, Any], float, str]] = {
    "centring off": ("dino", {}, 3e-3, "the teacher says the same of every image; try centring sinkhorn"),
    "lambda 0": ("lejepa", {"weight": 0.0}, 3e-3, "all views have the same projections; raise LeJEPA's weight"),
    "mask ratio 0": ("mae", {"mask_ratio": 0.07}, 3e-3, "so few patches are hidden .* raise mask_ratio"),
    "a rate of DINO": ("dino", {}, 0.3, "the teacher says the same|.*nearly the same; lower the"),
    "a rate of LeJEPA": ("lejepa", {}, 0.3, "nearly the same; lower the learning rate"),
    "a rate of MAE": ("mae", {}, 0.3, "nearly the same; lower the learning rate"),
    "a rate of MaskedPatch": ("masked_patch", {}, 0.3, "nearly the same; lower the learning rate"),
}


def watched(name: str, root: Path, lr: float, steps: int, options: dict[str, Any], **of_probes: Any) -> Trainer:
    torch.manual_seed(0)
    make = partial(OBJECTIVES[name], **options)
    views = made(make)[1]
    stage = Pretrain(
        ViT(**{**TINY, "width": 32, "depth": 4}), make, partial(torch.optim.AdamW, lr=lr), Schedule(warmup=20)
    )
    runner = trainer(max_steps=steps, max_epochs=-1, log_every_n_steps=25, callbacks=[Probes(**of_probes)])
    runner.fit(stage, data(root, batch_size=32, **views))
    return runner


LONG = ("a rate of DINO", "a rate of LeJEPA", "a rate of MaskedPatch")


@pytest.mark.parametrize(
    ("name", "options", "lr", "words"),
    [pytest.param(*PLANTED[n], marks=pytest.mark.long if n in LONG else ()) for n in PLANTED],
    ids=PLANTED,
)
def test_a_collapse_stops_the_training(
    name: str, options: dict[str, Any], lr: float, words: str, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if words.startswith("the teacher says the same of every image; try centring"):
        monkeypatch.setattr("vitlit.objectives.dino.CENTRE_MOMENTUM", 1.0)
    monkeypatch.setattr(probes, "GRACE", 50)
    message = f"training has collapsed by step [12]?[0-9]?[05]: ({words}|.*{words})"
    user_error(message, partial(watched, bank=0), name, digits, lr, 300, options)


@pytest.mark.parametrize(
    "name", ["mae", *(pytest.param(name, marks=pytest.mark.long) for name in ("dino", "lejepa", "masked_patch"))]
)
def test_a_healthy_training_is_left_alone(name: str, digits: Path) -> None:
    assert watched(name, digits, 3e-3, 150, {}, bank=0).global_step == 150


def test_alarms_can_be_turned_off_and_are_not_for_labels(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "GRACE", 50)
    assert watched("mae", digits, 3e-3, 80, {"mask_ratio": 0.07}, bank=0, alarms=False).global_step == 80


def test_options_that_do_not_fit_are_refused_by_name(few: Path) -> None:
    user_error("Probes: bank is -1; give at least 0", Probes, -1)
    user_error("Probes: every is 0; give at least 1", partial(Probes, every=0))
    user_error("Probes: classes is -4; give at least 0", partial(Probes, classes=-4))
    stage, _ = made(OBJECTIVES["mae"])
    fit = trainer(callbacks=[Probes(classes=3)]).fit
    user_error("Probes' classes is 3, but the data has 4; leave it out", fit, stage, data(few))
    runner = trainer(callbacks=[Probes(classes=0)])
    runner.fit(stage, data(few))
    assert not {"val/knn", "val/probe"} & runner.callback_metrics.keys()


# The command line

MAE_RUN = ("fit", *SMALL, "--model.objective", "MAE", *(f"--model.objective.{n}={x}" for n, x in HEADS["MAE"].items()))


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_neighbours_choose_the_best_checkpoint_where_nothing_else_can(
    vitlit: Callable[..., Result], few: Path, run: Path
) -> None:
    said = done(vitlit(*MAE_RUN, "--data.root", few))
    measured = [float(row["val/knn"]) for row in rows(run) if row["val/knn"]]
    assert f"best val/knn   {100 * max(measured):.2f} %" in said
    assert len(measured) == 3
    assert all(float(row["train/rank"]) >= 1 for row in rows(run) if row["train/loss"])
    own = "[{class_path: vitlit.callbacks.Probes, init_args: {bank: 0, every: 2}}]"
    said = done(vitlit(*MAE_RUN, "--data.root", few, "--run.name", "own", "--trainer.callbacks", own))
    assert "best val/probe" in said
    said = done(vitlit(*MAE_RUN, "--data.root", few, "--run.name", "loss", "--run.monitor", "val/loss"))
    assert "best val/loss" in said
    stop = "[{class_path: EarlyStopping, init_args: {monitor: val/knn, patience: 9}}]"
    assert vitlit(*MAE_RUN, "--data.root", few, "--run.name", "stop", "--trainer.callbacks", stop).code == 0
    labelled = vitlit("fit", *SMALL, "--data.root", few, "--run.name", "labels", "--run.monitor", "val/knn")
    refused(labelled, "run.monitor val/knn is not among val/top1", "; vitlit.callbacks.Probes measures it")
    monitored = (*MAE_RUN, "--data.root", few, "--run.name", "knn", "--run.monitor", "val/knn")
    refused(vitlit(*monitored, "--trainer.callbacks", own), "not among val/probe val/loss; ")
    assert not (run.parent / "knn").exists()
    plain = vitlit(
        *MAE_RUN, "--data.root", one_class(few, run.parent / "data"), "--data.batch_size", 8, "--run.name", "one"
    )
    assert "best val/loss" in done(plain)


def test_an_alarm_ends_a_command_in_a_line(vitlit: Callable[..., Result], few: Path, run: Path) -> None:
    def before() -> None:
        setattr(probes, "GRACE", 3)  # noqa: B010
        setattr(MAE, "collapse", lambda objective, logs: "so few patches are hidden; raise mask_ratio")  # noqa: B010

    result = vitlit(*MAE_RUN, "--data.root", few, "--model.objective.mask_ratio", 0.3, before=before)
    refused(result, "has collapsed by step 3: so few patches are hidden", "raise mask_ratio", "--run.overwrite true")
    assert read(run / "checkpoints" / "last.ckpt")["global_step"] == 2


DINO_RUN = (
    *("fit", *SMALL, "--model.objective", "DINO", "--model.objective.prototypes", 16),
    *("--model.objective.hidden_dim", 8, "--data.views", '[{"count": 1, "size": 16}]'),
)


@pytest.mark.parametrize("command", [MAE_RUN, DINO_RUN], ids=["mae", "dino"])
def test_shards_measure_what_one_device_does(command: tuple[Any, ...], few: Path, tmp_path: Path) -> None:
    found = []
    for ranks, flags in ((1, ()), (2, ("--trainer.strategy", "fsdp2"))):
        cwd = tmp_path / str(ranks)
        cwd.mkdir()
        assert [r.code for r in launched(ranks, *command, "--data.root", few, *flags, cwd=cwd)] == [0] * ranks
        names = ("val/knn", "val/probe", "train/rank", "train/deviation")
        found.append([float(row[name]) for row in rows(cwd / "runs" / "pretrain") for name in names if row[name]])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_best_is_the_last_where_no_metric_tells_which_is(vitlit: Callable[..., Result], few: Path, run: Path) -> None:
    """A loss that compares views with a teacher's falls and rises as the teacher moves, whatever the features."""
    folder = one_class(few, run.parent / "data")
    said = done(vitlit(*DINO_RUN, "--data.root", folder, "--data.batch_size", 8, "--trainer.max_epochs", 3))
    assert "best.ckpt (the last: no metric tells which is best)" in said
    steps = [read(run / "checkpoints" / name)["global_step"] for name in ("best.ckpt", "last.ckpt")]
    assert steps[0] == steps[1] > 0
