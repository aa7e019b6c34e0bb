"""What holds for every objective that needs no labels: resumed, on two devices, compiled and in low precision."""

import random
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL as SMALL_RUN
from conftest import Result, refused, user_error
from lightning.pytorch import Callback, Trainer
from small_stage import data, trainer
from test_ddp import no_rank_is_left_behind, read
from test_resume import assert_same, left, samples, survive
from torch import Tensor
from torch.utils.data import DataLoader

from vitlit import load
from vitlit.callbacks import EMA
from vitlit.data.views import Views
from vitlit.images.preprocess import Preprocess
from vitlit.model import ViT
from vitlit.objectives import DINO, MAE, Batch, LeJEPA, MaskedPatch, Objective
from vitlit.optim import Schedule
from vitlit.stages import Finetune, Pretrain

__all__ = ["no_rank_is_left_behind"]  # of every test here, too
pytestmark = pytest.mark.usefixtures("undrawn")

TINY: dict[str, Any] = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 2, "heads": 2, "mlp_dim": 32}
SMALL = partial(DINO, prototypes=24, hidden_dim=16, bottleneck=8, temperature_warmup=0.5, freeze_prototypes=0.3)
OBJECTIVES: dict[str, Callable[[ViT], Objective]] = {
    "masked_patch": MaskedPatch,
    "mae": partial(MAE, decoder_width=16, decoder_depth=1, decoder_heads=2),
    "dino": SMALL,
    "ibot": partial(SMALL, masked=1.0),
    "dinov2": partial(SMALL, masked=1.0, shared_head=True, koleo=0.1, centring="sinkhorn"),
    "lejepa": partial(LeJEPA, width=8, hidden_dim=16, slices=32),
}
EACH = pytest.mark.parametrize("make", OBJECTIVES.values(), ids=OBJECTIVES)


def made(make: Callable[[ViT], Objective], **options: Any) -> tuple[Pretrain, dict[str, Any]]:
    """A stage, and the options of data for it."""
    torch.manual_seed(0)
    optimizer = partial(torch.optim.AdamW, lr=3e-3, eps=1e-4, weight_decay=0.04)
    stage = Pretrain(ViT(**{**TINY, **options}), make, optimizer, Schedule(warmup=1, weight_decay_end=0.4))
    views = [Views(1, 16, (0.4, 1.0)), Views(2, 8, (0.1, 0.4))] if stage.objective.views > 1 else None
    return stage, {"views": views}


def batch_of(stage: Pretrain, images: int = 4, dtype: torch.dtype = torch.float32) -> Batch:
    sizes, numbers = (16, 16, 8, 8) if stage.objective.views > 1 else (16,), torch.arange(images) * 2**50 + 5
    views = [torch.randn(images, 3, size, size, dtype=dtype) for size in sizes]
    return Batch(views, torch.full((images,), -1), numbers, numbers)


class Watch(Callback):
    """The loss, the weight decay and the views of each step; an end where it is told to stop."""

    def __init__(self, stop: int | None = None, checkpoint: Path | None = None, folder: Path | None = None) -> None:
        self.stop, self.checkpoint, self.folder = stop, checkpoint, folder
        self.losses: list[float] = []
        self.decays: list[list[float]] = []
        self.views: list[list[tuple[int, str]]] = []  # by index

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        images = zip(*(view.double().numpy() for view in batch.views), strict=True)
        digests = [sha256(b"".join(view.tobytes() for view in views)).hexdigest() for views in images]
        self.views.append(list(zip(batch.indices.tolist(), digests, strict=True)))
        self.decays.append([group["weight_decay"] for group in trainer.optimizers[0].param_groups])
        if self.stop is not None and trainer.global_step == self.stop:
            trainer.save_checkpoint(str(self.checkpoint))
            raise KeyboardInterrupt

    def on_fit_end(self, trainer: Trainer, module: Any) -> None:
        if self.folder is not None:
            content = {"losses": self.losses, "views": self.views, "state": module.state_dict()}
            torch.save(content, self.folder / f"rank{trainer.global_rank}.pt")


def fit(
    make: Callable[[ViT], Objective], root: Path, watch: Watch, source: Path | None = None, averaged: bool = False
) -> dict[str, Any]:
    """Train and return what the run left: everything that a checkpoint holds of it."""
    stage, of_data = made(make, dropout=0.1, drop_path=0.1)
    if source is not None:
        with torch.no_grad():
            for parameter in stage.parameters():
                parameter.add_(1)  # the checkpoint has them
    runner = trainer(max_epochs=2, callbacks=[*([EMA(0.7)] if averaged else []), watch])
    try:
        runner.fit(stage, data(root, **of_data), ckpt_path=source, weights_only=True)
    except (KeyboardInterrupt, SystemExit):
        return {}
    return {"weights": stage.state_dict(), "optimizer": runner.optimizers[0].state_dict(), "losses": watch.losses}


# The same by the command line, killed. The probes are those that it adds by itself, or given, beside an average.
PROBED = "[{class_path: vitlit.callbacks.Probes, init_args: {bank: 33, every: 2}}, {class_path: vitlit.callbacks.EMA}]"
VIEWS = ("--data.views", '[{"count": 1, "size": 16}, {"count": 1, "size": 8}]')
BY_DINO = (
    *("--model.objective", "DINO", "--model.objective.prototypes", 24, "--model.objective.hidden_dim", 16),
    *("--model.objective.freeze_prototypes", 0.3, *VIEWS),
)
FLAGS: dict[str, tuple[object, ...]] = {
    "masked_patch": ("--model.objective", "MaskedPatch"),
    "mae": (
        *("--model.objective", "MAE", "--model.objective.decoder_depth", 1, "--model.objective.decoder_width", 32),
        *("--trainer.callbacks", PROBED),
    ),
    "dino": BY_DINO,
    "dinov2": (
        *(*BY_DINO, "--model.objective.masked", 1, "--model.objective.koleo", 0.1),
        *("--model.objective.centring", "sinkhorn", "--trainer.callbacks", PROBED),
    ),
    "lejepa": ("--model.objective", "LeJEPA", "--model.objective.hidden_dim", 16, *VIEWS),
}
KILLED_RUN = (
    *("fit", *SMALL_RUN, "--model.vit.patch_size", 4, "--data.batch_size", 8, "--trainer.max_steps", -1),
    *("--model.vit.dropout", 0.1, "--model.vit.drop_path", 0.1, "--model.schedule.weight_decay_end", 0.4),
    *("--trainer.log_every_n_steps", 2, "--run.save_minutes", 0),
)


@pytest.mark.parametrize(
    ("name", "ranks", "workers", "kills"),
    [
        ("dinov2", 1, (0,), 2),
        *(pytest.param(name, ranks, (0, 2), 5, marks=pytest.mark.long) for name in FLAGS for ranks in (1, 2)),
    ],
)
def test_a_run_with_probes_that_is_killed_is_the_undisturbed_one(
    name: str, ranks: int, workers: tuple[int, ...], kills: int, few: Path, tmp_path: Path
) -> None:
    runs = {count: tmp_path / str(count) for count in (-1, *workers)}
    for count, folder in runs.items():
        folder.mkdir()
        times, draw = 0 if count < 0 else kills, random.Random(kills + count)
        survive(times, 5, max(0, count), ranks, few, folder, draw, (*KILLED_RUN, *FLAGS[name]))
    whole = left(runs[-1])
    assert whole["probes"]["layer"][0]["1.weight"].any()
    assert all(any(row[name] for row in whole["metrics"]) for name in ("val/knn", "val/probe", "train/rank"))
    for count in workers:
        assert_same(left(runs[count]), whole)
        assert samples(runs[count]) == samples(runs[-1])
        print(f"{name}, {count} workers, {ranks} processes: killed {kills} times, identical")


@EACH
def test_a_continued_run_is_the_uninterrupted_one(make: Callable[[ViT], Objective], few: Path, tmp_path: Path) -> None:
    averaged = make is OBJECTIVES["dinov2"]
    whole = fit(make, few, Watch(), averaged=averaged)
    assert fit(make, few, Watch(4, tmp_path / "a.ckpt"), averaged=averaged) == {}
    after = fit(make, few, Watch(), tmp_path / "a.ckpt", averaged=averaged)
    assert_same(after["weights"], whole["weights"])
    assert_same(after["optimizer"], whole["optimizer"])
    assert after["losses"] == whole["losses"][4:]
    assert len(set(whole["losses"])) == 10


def spread(make: Callable[[ViT], Objective], root: Path, folder: Path, devices: int, epochs: int) -> tuple[Any, Any]:
    """Train on so many devices in float64; each step's loss over all of them, and its views by index."""
    folder.mkdir()
    stage, of_data = made(make)
    strategy = "auto" if devices == 1 else "ddp_fork"
    options: dict[str, Any] = {"devices": devices, "strategy": strategy, "precision": "64-true", "max_epochs": epochs}
    trainer(callbacks=[Watch(folder=folder)], **options, gradient_clip_val=3.0).fit(stage, data(root, **of_data))
    parts = [read(folder / f"rank{rank}.pt") for rank in range(devices)]
    for part in parts[1:]:
        assert_same(part["state"], parts[0]["state"])
    views = [sorted(chain(*of_step)) for of_step in zip(*(part["views"] for part in parts), strict=True)]
    return [sum(losses) / devices for losses in zip(*(part["losses"] for part in parts), strict=True)], views


@pytest.mark.parametrize(
    ("devices", "epochs"), [((2,), 1), pytest.param((2, 4), 6, marks=pytest.mark.long)], ids=["short", "long"]
)
@EACH
def test_losses_are_the_same_on_any_number_of_devices(
    make: Callable[[ViT], Objective], devices: tuple[int, ...], epochs: int, few: Path, tmp_path: Path
) -> None:
    one, views = spread(make, few, tmp_path / "one", 1, epochs)
    assert len(one) == 5 * epochs
    for count in devices:
        others, theirs = spread(make, few, tmp_path / str(count), count, epochs)
        assert theirs == views
        apart = max(abs(a - b) / abs(a) for a, b in zip(one, others, strict=True))
        print(f"{count} processes: losses of {len(one)} steps differ by {apart:.1e}")
        assert apart <= 1e-9


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(OBJECTIVES[n], marks=pytest.mark.long if n in ("dino", "ibot", "dinov2") else ())
        for n in OBJECTIVES
    ],
    ids=OBJECTIVES,
)
def test_every_parameter_is_used_and_a_step_compiles_whole(make: Callable[[ViT], Objective], few: Path) -> None:
    stage, of_data = made(make, registers=1, depth=1)
    stage.check_data(data(few, **of_data))
    stage.train()
    graphs: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(stage.objective, fullgraph=True, backend=backend)
    for progress in (0.0, 0.2, 0.4, 0.8):
        stage.zero_grad()
        batch = batch_of(stage)
        state = {name: tensor.clone() for name, tensor in stage.objective.named_buffers()}
        expected = stage.objective(stage.vit, batch, progress).loss
        for name, tensor in stage.objective.named_buffers():
            tensor.copy_(state[name])
        loss: Tensor = compiled(stage.vit, batch, progress).loss
        torch.testing.assert_close(loss, expected)
        loss.backward()
        stage.objective.after_step(stage.vit, progress)
    assert len(graphs) <= 3  # progress is a symbol, but for before and after a warm-up
    for name, parameter in stage.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


@EACH
def test_mixed_precision_loses_little(make: Callable[[ViT], Objective], few: Path) -> None:
    stage, of_data = made(make)
    stage.check_data(data(few, **of_data))
    batch = batch_of(stage, images=16)
    stage.eval()
    expected = stage.objective(stage.vit, batch, 0.5).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = stage.objective(stage.vit, batch, 0.5).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.01)


def test_weight_decay_follows_its_cosine(few: Path) -> None:
    watch = Watch()
    fit(OBJECTIVES["mae"], few, watch)
    for step, decays in enumerate(watch.decays):
        expected = 0.4 + (0.04 - 0.4) * (1 + torch.tensor(torch.pi * step / 10).double().cos().item()) / 2
        assert decays == [pytest.approx(expected if decay else 0, rel=1e-7) for decay in decays]
        assert 0 in decays
        assert max(decays) > 0


@pytest.mark.parametrize("name", ["dinov2", "mae", "lejepa"])
def test_training_starts_from_weights_and_hands_on_the_teachers(name: str, few: Path, tmp_path: Path) -> None:
    stage, of_data = made(OBJECTIVES[name])
    runner = trainer(max_steps=2)
    runner.fit(stage, data(few, **of_data))
    runner.save_checkpoint(tmp_path / "a.ckpt")
    dino = stage.objective if isinstance(stage.objective, DINO) else None
    goes_on = dino.teacher_vit if dino else stage.vit
    loaded = dict(load(tmp_path / "a.ckpt").state_dict())
    assert_same(loaded, {name: t for name, t in goes_on.state_dict().items() if name != "mask_token"})
    if dino:
        assert any(not torch.equal(loaded[name], stage.vit.state_dict()[name]) for name in loaded)

    optimizer = partial(torch.optim.SGD, lr=1e-300)
    again = Pretrain(None, OBJECTIVES["ibot"], optimizer, init_from=str(tmp_path / "a.ckpt"))
    assert isinstance(again.objective, DINO)
    views = [Views(1, 16), Views(1, 8)]
    trainer(max_steps=1).fit(again, data(few, views=views))
    for vit in (again.vit, again.objective.teacher_vit):
        state = vit.state_dict()
        assert_same({name: state[name] for name in loaded}, loaded)
    tuned = Finetune(init_from=str(tmp_path / "a.ckpt"), num_classes=4, optimizer=partial(torch.optim.SGD, lr=1e-300))
    trainer(max_steps=1).fit(tuned, data(few))
    assert torch.equal(tuned.vit.state_dict()["cls_token"], loaded["cls_token"])


ALONE = "compares images, but a batch has 1 on all devices; raise its size, or drop"


def test_what_would_change_the_objective_is_refused(few: Path) -> None:
    stage, of_data = made(OBJECTIVES["dino"])
    message = "DINO compares the images of a whole batch; raise data.micro_batch, or take more devices"
    user_error(message, trainer(max_steps=1).fit, stage, data(few, micro_batch=4, **of_data))
    for name in ("dinov2", "lejepa"):
        stage, of_data = made(OBJECTIVES[name])
        user_error(ALONE, trainer(max_steps=2).fit, stage, data(few, batch_size=1, **of_data))
        stage, _ = made(OBJECTIVES[name])
        loader = DataLoader([batch_of(stage, 2), batch_of(stage, 1)], batch_size=None)  # type: ignore[arg-type, var-annotated]
        runner = trainer()
        user_error(ALONE, runner.fit, stage, loader, loader)
        assert runner.global_step == 1
    stage, _ = made(OBJECTIVES["lejepa"])
    images = DataLoader(torch.randn(8, 3, 16, 16), batch_size=4)  # type: ignore[arg-type, var-annotated]
    user_error("LeJEPA needs at least 2 views", trainer(max_steps=2).fit, stage, images, images)
    optimizer = partial(torch.optim.SGD, lr=0.1)
    stage = Pretrain(ViT(**TINY), OBJECTIVES["mae"], optimizer, Schedule(weight_decay_end=0.4))
    user_error("no weight_decay to begin with", trainer(max_steps=1).fit, stage, data(few))
    user_error("give model.init_from", Pretrain, None, MaskedPatch, optimizer)
    for objective in (MAE, MaskedPatch, DINO):
        user_error("leave model.vit.patch_dropout out", objective, ViT(**TINY, patch_dropout=0.5))


def test_a_trial_of_a_few_batches_runs_whatever_the_schedule(few: Path) -> None:
    optimizer = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
    stage = Pretrain(ViT(**TINY), OBJECTIVES["mae"], optimizer, Schedule(warmup=9, weight_decay_end=0.4))
    trainer(fast_dev_run=2).fit(stage, data(few))
    assert stage.global_step == 2


def test_plain_loaders_draw_anew_in_every_step() -> None:
    class Draws(MaskedPatch):
        seen: list[list[int]]

        def forward(self, vit: ViT, batch: Batch, progress: float) -> Any:
            self.seen.append(batch.draws.tolist())
            return super().forward(vit, batch, progress)

    Draws.seen = []
    vit = ViT(**TINY)
    vit.preprocess = Preprocess((16, 16))
    stage = Pretrain(vit, Draws, partial(torch.optim.SGD, lr=0.1))
    images = DataLoader(torch.randn(8, 3, 16, 16), batch_size=4)  # type: ignore[arg-type, var-annotated]
    trainer().fit(stage, images, images)
    first, second, *validated = Draws.seen
    assert len({*first, *second}) == 8
    assert validated == [[0, 1, 2, 3]] * 2


def test_the_command_line_distils_continues_and_starts_another_from_the_teacher(
    vitlit: Callable[..., Result], few: Path, run: Path
) -> None:
    views = ["--data.root", few, "--data.views", '[{"count": 1, "size": 16}, {"count": 2, "size": 8}]']
    small = ["--model.objective.prototypes", 16, "--model.objective.hidden_dim", 8, "--model.objective.masked", 1]
    command = ["fit", *SMALL_RUN, *views, "--model.objective", "DINO", *small, "--model.schedule.weight_decay_end", 0.5]
    assert vitlit(*command, "--trainer.max_steps", 3).code == 0
    result = vitlit(*command)
    assert result.code == 0, result.err
    assert "continuing runs/pretrain" in result.out
    assert "weights of" not in result.out
    start = ["--model.init_from", run, "--model.objective", "LeJEPA", "--model.objective.hidden_dim", 8]
    shared = [*SMALL_RUN[:2], *SMALL_RUN[10:]]  # without the sizes of model.vit
    result = vitlit("fit", *shared, *views, "--model.vit", "null", *start, "--run.name", "another")
    assert result.code == 0, result.err
    assert f"weights of {run}: 30 matched" in result.out
    refused(vitlit("fit", *shared, *views, "--model.vit", "null", "--run.name", "none"), "give --model.init_from")
