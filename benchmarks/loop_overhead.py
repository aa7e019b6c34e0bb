"""What a step costs besides the step: a bare loop, Lightning's Trainer that logs nothing, and vitlit, interleaved.

    python benchmarks/loop_overhead.py --out benchmarks/results/loop_overhead.json

All train the same one-block ViT of width 8 on the same two images in memory, with the same loss, AdamW and schedule,
on one core. vitlit runs what `vitlit fit` lets run in a step: its stage, the callbacks for interruption, checkpoints,
progress, finite numbers and speed, and metrics.csv, with a loss every 50 steps. A row is one of the three: the
microseconds of processor time of a step, means of 50 steps of which one logs, with their quartiles. `ratios` compares
vitlit with Lightning: of whole steps, and of overheads, a step less the bare loop's. What else a machine does only adds
time, so that of a noisy one the first quartiles say more than the medians.
"""

import argparse
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from runs import write
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from vitlit.callbacks import Bar, Lines, NonFinite, Throughput
from vitlit.cli.trainer import Trainer
from vitlit.loggers import CSV
from vitlit.model import ViT
from vitlit.objectives import Batch, Supervised
from vitlit.optim import Schedule, build_optimizer
from vitlit.run.checkpoints import Best, Last
from vitlit.run.interrupt import Interrupt
from vitlit.stages import Pretrain

WARMUP = 50  # steps before the clock starts
EVERY = 50  # steps from one log to the next, which are timed together
TRIVIAL: dict[str, Any] = {"image_size": 8, "patch_size": 4, "width": 8, "depth": 1, "heads": 1, "mlp_dim": 16}
OBJECTIVE = partial(Supervised, num_classes=2, head="finetune")
OPTIMIZER = partial(AdamW, lr=1e-3, weight_decay=0.1)


class Clocked:
    """The same batch again and again; keeps the processor time at every 50th step from the warm-up's end."""

    def __init__(self, steps: int) -> None:
        self.steps = WARMUP + steps
        self.times: list[float] = []
        self.batch = Batch.of([torch.randn(2, 3, 8, 8), torch.tensor([0, 1])])

    def __len__(self) -> int:
        return self.steps + 1

    def __iter__(self) -> Iterator[Batch]:
        for step in range(len(self)):
            if step >= WARMUP and (step - WARMUP) % EVERY == 0:
                self.times.append(time.process_time())
            yield self.batch

    @property
    def microseconds(self) -> list[float]:
        """Of a step, by fifty."""
        return [1e6 * (later - earlier) / EVERY for earlier, later in pairwise(self.times)]


def optimizing(vit: ViT, steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """What the stage's configure_optimizers makes."""
    optimizer = build_optimizer(OPTIMIZER, vit.layers(), vit)
    return optimizer, LambdaLR(optimizer, Schedule().over(steps))


def bare(loader: Clocked, folder: Path) -> None:
    vit = ViT(**TRIVIAL)
    objective = OBJECTIVE(vit)
    optimizer, scheduler = optimizing(vit, len(loader))
    for batch in loader:
        loss = objective(vit, batch, 0.0).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()


class Plain(LightningModule):
    """The least that Lightning can train."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.vit, self.steps = ViT(**TRIVIAL), steps
        self.objective = OBJECTIVE(self.vit)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.objective(self.vit, batch, 0.0).loss

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = optimizing(self.vit, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def options(folder: Path) -> dict[str, Any]:
    """What both Trainers are given."""
    quiet = {"enable_model_summary": False, "enable_progress_bar": False, "limit_val_batches": 0}
    quiet["log_every_n_steps"] = EVERY
    return {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": folder, **quiet}


def lightning(loader: Clocked, folder: Path) -> None:
    LightningTrainer(**options(folder), logger=False, enable_checkpointing=False).fit(Plain(len(loader)), loader)


def vitlit(loader: Clocked, folder: Path, bar: bool = False) -> None:
    stage = Pretrain(ViT(**TRIVIAL), OBJECTIVE, OPTIMIZER)
    last = Last(folder)
    callbacks: list[Any] = [Interrupt(last, None, 30), Best(folder, "val/top1", "max"), last, Bar() if bar else Lines()]
    callbacks += [NonFinite(), Throughput()]
    Trainer(**options(folder), logger=[CSV(folder)], callbacks=callbacks).fit(stage, loader)


LOOPS: dict[str, Callable[[Clocked, Path], None]] = {"bare": bare, "lightning": lightning, "vitlit": vitlit}


def measure(rounds: int, steps: int) -> list[dict[str, Any]]:
    """One row a loop; the loops take turns in every round, each time in a folder of its own."""
    taken: dict[str, list[float]] = {name: [] for name in LOOPS}
    for turn in range(rounds):
        for name, loop in LOOPS.items():
            torch.manual_seed(turn)
            loader = Clocked(steps)
            with tempfile.TemporaryDirectory() as folder:
                loop(loader, Path(folder))
            taken[name] += loader.microseconds
        print(", ".join(f"{name} {found[-1]:,.0f} us" for name, found in taken.items()), flush=True)
    rows = []
    for name, found in taken.items():
        low, median, high = statistics.quantiles(found, n=4, method="inclusive")
        numbers = {"median_us": median, "quartile_1_us": low, "quartile_3_us": high}
        rows.append({"name": name, **{key: round(value, 1) for key, value in numbers.items()}})
        rows[-1]["us"] = [round(value, 1) for value in found]
    return rows


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """vitlit to Lightning: of whole steps, and of what is beyond the bare loop's; by first quartiles and by medians."""
    found: dict[str, dict[str, float]] = {"step": {}, "overhead": {}}
    for which in ("quartile_1_us", "median_us"):
        plain, light, own = (row[which] for row in rows)
        found["step"][which] = round(own / light, 3)
        found["overhead"][which] = round((own - plain) / (light - plain), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--rounds", type=int, default=9, help="how often each loop takes its turn")
    parser.add_argument("--steps", type=int, default=500, help="timed steps of a turn, a multiple of 50")
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = measure(options.rounds, options.steps)
    found = ratios(rows)
    print(found)
    about = "Microseconds of a training step of a one-block ViT of width 8 and two images, on one core, in turn."
    write(options.out, about, rows, rounds=options.rounds, steps=options.steps, ratios=found)


if __name__ == "__main__":
    main()
