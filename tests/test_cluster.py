"""Many machines: the shipped scripts, and two node groups that train one run, one of whose processes is killed."""

import csv
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, command, finish, start
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed import TCPStore
from torch.distributed import run as torchrun
from torch.distributed.launcher.api import elastic_launch

from vitlit.cli import main

KILLED = 3  # steps that were done when rank 1 dies: an epoch has two, so that the third is done again


class Notes(Callback):
    """Writes each step's samples, a line a step and a file a rank; rank 1 of two is killed in its first attempt."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if trainer.global_rank == 1 and trainer.global_step == KILLED and not again:
            os.kill(os.getpid(), signal.SIGKILL)
        with open(f"samples{trainer.global_rank}.csv", "a") as file:
            print(trainer.global_step, *batch[2].tolist(), sep=",", file=file)


def worker(*arguments: str) -> None:
    """What a process of torchrun's executes."""
    # Lightning reads it when it is imported.
    rank_zero_only.rank = int(os.environ["RANK"])  # type: ignore[attr-defined]
    code = main(list(arguments))
    if code:
        sys.exit(code)


def agent(*arguments: object) -> int:
    """`torchrun ARGUMENTS -m vitlit ...`, whose workers are forked rather than executed, which saves their imports."""
    options = torchrun.parse_args([str(argument) for argument in ("--start-method", "fork", *arguments)])
    config, _, line = torchrun.config_from_args(options)
    assert line[:3] == ["-u", "-m", "vitlit"]
    elastic_launch(config, worker)(*line[3:])
    return 0


def samples(folder: Path, rank: int) -> dict[int, list[str]]:
    """The samples of each step, which are the same where it was done twice."""
    steps: dict[int, list[str]] = {}
    for step, *indices in csv.reader((folder / f"samples{rank}.csv").open()):
        assert steps.setdefault(int(step), indices) == indices
    return steps


def losses(folder: Path) -> list[float]:
    """Of every row of a run's metrics: the step, and what of train/loss and val/loss it has."""
    rows = csv.DictReader((folder / "runs" / "pretrain" / "metrics.csv").open())
    return [float(row[name]) for row in rows for name in ("step", "train/loss", "val/loss") if row[name]]


def test_two_nodes_train_the_run_of_one_process_though_a_rank_is_killed(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if "RANK" in name or "MASTER" in name or name == "WORLD_SIZE"]:
        monkeypatch.delenv(name)  # of a test before
    monkeypatch.setenv("VITLIT_TRUST", "test_cluster")
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    fit: list[Any] = ["fit", *SMALL, "--data.root", few, "--trainer.accelerator", "cpu"]
    fit += ["--trainer.callbacks.class_path", "test_cluster.Notes"]
    alone = command(*fit, cwd=one)
    assert alone.code == 0, alone.err

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launch: list[Any] = ["--nnodes", 2, "--nproc-per-node", 1, "--max-restarts", 1, "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", f"127.0.0.1:{store.port}", "--rdzv-conf", "is_host=false", "-m", "vitlit"]
    devices = ["--trainer.num_nodes", 2, "--trainer.devices", 1, "--trainer.strategy", "ddp"]
    nodes = [start(partial(agent, *launch, *fit, *devices), two, str(node)) for node in range(2)]
    results = [finish(child, two, str(node)) for node, child in enumerate(nodes)]
    assert [result.code for result in results] == [0, 0], "".join(result.err for result in results)

    printed = "".join(result.out for result in results)
    assert printed.count("continuing runs/pretrain from runs/pretrain/checkpoints/last.ckpt") == 1
    assert printed.count("runs/pretrain is complete") == 1
    assert (two / "runs" / "pretrain" / "finished.json").read_text() == '{"step": 6}\n'
    assert losses(two) == pytest.approx(losses(one), abs=1e-6)
    assert len(losses(one)) == 6 * 2 + 3  # a step and its loss, and a loss of each epoch's validation
    first, second = samples(two, 0), samples(two, 1)
    assert {step: first[step] + second[step] for step in range(6)} == samples(one, 0)
