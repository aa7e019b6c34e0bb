"""Two devices: the numbers, the weights and the samples of one, and one run folder however it is launched."""

import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, command
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.multiprocessing import ProcessRaisedException

from vitlit.callbacks import EMA
from vitlit.data import ImageFolderData
from vitlit.data.augment import TimmRandAugment
from vitlit.data.erasing import Erasing
from vitlit.data.mixing import Mixing
from vitlit.data.stream import order
from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.objectives import Supervised
from vitlit.optim import Schedule
from vitlit.stages import Pretrain


@pytest.fixture(autouse=True)
def no_rank_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what a launcher tells its processes through the environment."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


class Record(Callback):
    """Writes, from every rank, the samples of each step and what came of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: dict[int, list[int]] = {}
        self.seen: list[int] = []

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *rest: Any) -> None:
        self.seen.extend(batch[2].tolist())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.steps.setdefault(trainer.global_step, []).extend(batch[2].tolist())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        content = {"steps": self.steps, "weights": pl_module.state_dict(), "metrics": metrics}
        torch.save(content, self.folder / f"rank{trainer.global_rank}.pt")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        torch.save({"seen": self.seen, **metrics}, self.folder / f"val{trainer.global_rank}.pt")


def stage_and_data(root: Path, **options: Any) -> tuple[Pretrain, ImageFolderData]:
    torch.manual_seed(0)
    vit = ViT(image_size=16, patch_size=8, width=16, depth=2, heads=2, mlp_dim=32)
    # A bias of the keys has no gradient: with a small eps Adam would blow its rounding errors up.
    optimizer = partial(torch.optim.AdamW, lr=3e-3, eps=1e-4, weight_decay=0.1)
    stage = Pretrain(vit, partial(Supervised, num_classes=4), optimizer, Schedule(warmup=1))
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    data = ImageFolderData(str(root), **{"image_size": 16, "batch_size": 8, "num_workers": 0, **options})
    return stage, data


def run(
    what: str,
    root: Path,
    folder: Path,
    devices: int,
    precision: Any = "32-true",
    epochs: int = 2,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> None:
    """Fit or validate on one device, or on two, which are forked; `folder` gets what Record writes."""
    folder.mkdir()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="auto" if devices == 1 else "ddp_fork",
        precision=precision,
        max_epochs=epochs,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, Record(folder)],
    )
    stage, data = stage_and_data(root, **options)
    if what == "fit":
        trainer.fit(stage, data)
    else:
        trainer.validate(stage, data, verbose=False)


def read(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def test_validation_numbers_of_an_odd_set_are_those_of_one_device(few: Path, tmp_path: Path) -> None:
    run("validate", few, tmp_path / "one", 1)
    run("validate", few, tmp_path / "two", 2)
    one = read(tmp_path / "one" / "val0.pt")
    ranks = [read(tmp_path / "two" / f"val{rank}.pt") for rank in range(2)]
    assert sorted(ranks[0]["seen"] + ranks[1]["seen"]) == one["seen"] == list(range(11))
    for two in ranks:
        assert two["val/loss"] == pytest.approx(one["val/loss"], abs=1e-6)
        assert two["val/top1"] == one["val/top1"]
        assert two["val/top1_macro"] == pytest.approx(one["val/top1_macro"], abs=1e-6)
    assert one["val/top1"] * 11 == pytest.approx(round(one["val/top1"] * 11), abs=1e-5)


@pytest.mark.parametrize(
    ("precision", "tolerance", "options"),
    [("32-true", 1e-6, {}), ("64-true", 1e-10, {}), ("64-true", 1e-10, {"micro_batch": 2})],
    ids=["float32", "float64", "accumulated"],
)
def test_two_devices_train_the_weights_of_one_on_the_same_samples(
    precision: str, tolerance: float, options: dict[str, Any], few: Path, tmp_path: Path
) -> None:
    run("fit", few, tmp_path / "one", 1, precision)
    run("fit", few, tmp_path / "two", 2, precision, **options)
    one = read(tmp_path / "one" / "rank0.pt")
    two = [read(tmp_path / "two" / f"rank{rank}.pt") for rank in range(2)]
    for step in range(10):
        expected = order(0, step // 5, 40)[step % 5 * 8 :][:8].tolist()
        assert one["steps"][step] == two[0]["steps"][step] + two[1]["steps"][step] == expected
    for name, tensor in one["weights"].items():
        assert torch.equal(two[0]["weights"][name], two[1]["weights"][name])
        assert (two[0]["weights"][name] - tensor).abs().max() < tolerance
    for name in ("train/loss", "val/loss"):
        assert two[0]["metrics"][name] == pytest.approx(one["metrics"][name], abs=1e-6)
    assert two[0]["metrics"]["train/lr"] == one["metrics"]["train/lr"]
    start = stage_and_data(few)[0].state_dict()
    assert any((one["weights"][name] - start[name]).abs().max() > 1e-3 for name in start)


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_two_devices_mix_erase_repeat_balance_and_average_as_one(
    micro_batch: int | None, few: Path, tmp_path: Path
) -> None:
    drawn: dict[str, Any] = {"augment": [TimmRandAugment()], "erasing": Erasing(0.5), "mixing": Mixing(0.8, 1.0)}
    drawn |= {"repeats": 2, "balanced": True}
    run("fit", few, tmp_path / "one", 1, "64-true", callbacks=[EMA(0.7)], **drawn)
    run("fit", few, tmp_path / "two", 2, "64-true", callbacks=[EMA(0.7)], micro_batch=micro_batch, **drawn)
    one, *two = (read(tmp_path / folder) for folder in ("one/rank0.pt", "two/rank0.pt", "two/rank1.pt"))
    for rank in two:
        for name, tensor in one["weights"].items():
            assert (rank["weights"][name] - tensor).abs().max() < 1e-10
        for name in one["metrics"].keys() - {"train/images_per_second", "train/data_wait", "train/memory_gib"}:
            assert rank["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-6)
    assert {"val/loss", "val/loss_raw", "val/top1_raw"} <= one["metrics"].keys()
    assert one["metrics"]["val/loss"] != one["metrics"]["val/loss_raw"]


DRAWN: dict[str, Any] = {"augment": [TimmRandAugment()], "erasing": Erasing(0.5), "mixing": Mixing(0.8, 1.0)}


class Losses(Callback):
    """Notes each step's global loss, and what of its samples reaches the network, from every rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses: dict[int, list[float]] = {}
        self.inputs: dict[int, list[Any]] = {}

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = (batch_idx // trainer.accumulate_grad_batches) + trainer.current_epoch * 2
        self.losses.setdefault(step, []).append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        rows = zip(batch[2].tolist(), batch.views[0].double(), batch.labels.double(), strict=True)
        self.inputs.setdefault(step, []).extend((i, image.clone(), share.clone()) for i, image, share in rows)

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        content = {"losses": self.losses, "inputs": self.inputs}
        torch.save(content, self.folder / f"losses{trainer.global_rank}.pt")


def measured(
    few: Path, folder: Path, ranks: int, accumulate: int, precision: str, steps: int
) -> tuple[list[float], list[Any]]:
    """(the global loss, the samples by index as the network sees them) of so many steps, two an epoch."""
    callbacks = [Losses(folder), EMA(0.7)]
    size = {"batch_size": 16, "micro_batch": 16 // ranks // accumulate}
    run("fit", few, folder, ranks, precision, steps // 2, callbacks, **size, **DRAWN)
    parts = [read(folder / f"losses{rank}.pt") for rank in range(ranks)]
    losses, inputs = [], []
    for step in range(steps):
        own = [loss for part in parts for loss in part["losses"][step]]
        losses.append(sum(own) / len(own))
        inputs.append(sorted((row for part in parts for row in part["inputs"][step]), key=lambda row: row[0]))
    return losses, inputs


ALL = [(ranks, accumulate) for ranks in (1, 2, 4) for accumulate in (1, 2)][1:]


@pytest.mark.parametrize(
    ("precision", "divisions", "steps"),
    [
        ("64-true", [(4, 2)], 20),  # the tests above have two
        pytest.param("64-true", ALL, 50, marks=pytest.mark.long),
        pytest.param("32-true", ALL, 50, marks=pytest.mark.long),
    ],
)
def test_steps_are_the_same_on_any_number_of_devices(
    precision: str, divisions: list[tuple[int, int]], steps: int, few: Path, tmp_path: Path
) -> None:
    """Augmentation, erasing, mixing and averaging on, dropout off; float32 is compared for 10 steps, then it drifts."""
    losses, inputs = measured(few, tmp_path / "one", 1, 1, precision, steps)
    compared, tolerance = (steps, 1e-9) if precision == "64-true" else (10, 1e-6)
    for ranks, accumulate in divisions:
        others, seen = measured(few, tmp_path / f"{ranks}x{accumulate}", ranks, accumulate, precision, steps)
        apart = max(abs(a - b) / abs(a) for a, b in zip(losses[:compared], others[:compared], strict=True))
        print(f"{precision} {ranks} processes x {accumulate}: losses of {compared} steps differ by {apart:.1e}")
        assert apart <= tolerance
        for mine, theirs in zip(inputs, seen, strict=True):
            for (i, image, share), (j, other, others_share) in zip(mine, theirs, strict=True):
                assert i == j
                assert torch.equal(image, other)
                assert torch.equal(share, others_share)


def test_fewer_validation_images_than_devices_are_refused(few: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    for split, labels in (("train", "0123"), ("val", "0")):
        for label in labels:
            (root / split / label).mkdir(parents=True)
            for image in sorted((few / split / label).iterdir())[: 5 if split == "train" else 1]:
                (root / split / label / image.name).symlink_to(image)
    message = "the val split needs an image for each device, but has 1 for 2"
    with pytest.raises(UserError, match=message):
        ImageFolderData(str(root), batch_size=8).check("fit", 2)
    with pytest.raises(ProcessRaisedException, match=f"UserError: {message}"):
        run("fit", root, tmp_path / "two", 2)


@pytest.fixture
def console_script(tmp_path: Path) -> Path:
    """The installed `vitlit`, or one like it where the package is not installed."""
    installed = Path(sys.executable).with_name("vitlit")
    if installed.exists():
        return installed
    script = tmp_path / "bin" / "vitlit"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nimport sys\nfrom vitlit.cli.main import main\n\nsys.exit(main())\n")
    script.chmod(0o755)
    return script


def test_the_console_script_starts_a_process_a_device(few: Path, tmp_path: Path, console_script: Path) -> None:
    config = shutil.copy(SMALL[1], tmp_path / "pretrain.yaml")  # each process reads it: nobody may edit it meanwhile
    fit = ["fit", "--config", str(config), *SMALL[2:], "--data.root", str(few), "--trainer.accelerator", "cpu"]
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    assert command(*fit, cwd=one).code == 0
    fit += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]

    def as_a_shell_has_it() -> None:
        """The first process is forked, as a script of that name; Lightning executes the other with its import."""
        sys.argv = [str(console_script), *fit]
        sys.modules["__main__"].__spec__ = None
        for name in [name for name in os.environ if "RANK" in name or "MASTER" in name]:
            del os.environ[name]  # of a test before

    done = command(*fit, cwd=two, before=as_a_shell_has_it)
    assert done.code == 0, done.err
    assert done.out.count("runs/pretrain is complete") == 1
    assert [path.name for path in (two / "runs").glob("[!.]*")] == ["pretrain"]
    assert (two / "runs" / "pretrain" / "finished.json").read_text() == '{"step": 6}\n'
    ours, theirs = (read(folder / "runs" / "pretrain" / "checkpoints" / "last.ckpt") for folder in (one, two))
    assert theirs["global_step"] == 6
    for name, tensor in ours["state_dict"].items():
        assert (theirs["state_dict"][name] - tensor).abs().max() < 1e-5
