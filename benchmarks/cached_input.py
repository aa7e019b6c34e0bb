"""Training speed on MNIST with and without kept images, and timm's train.py on the same folder, on two CPU cores.

    python benchmarks/cached_input.py --mnist FOLDER --timm TRAIN.py --work WORK --out RESULT.json

FOLDER is an image folder of MNIST's PNGs, FOLDER/{train,val}/CLASS/*. TRAIN.py is the training script of timm's
repository, which is not in its package. In a round every row trains once, one after the other, each with one data
worker and one thread, as the recipe says. timm trains a ViT of the same sizes with the same optimiser and batch, but
has no affine jitter: its row compares with vitlit's rows without it. Images per second are those between two lines of
the log, after the first `SKIPPED` steps; the start, with its decoding of all images, is given in seconds of its own.
"""

import argparse
import csv
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from runs import write

REPOSITORY = Path(__file__).resolve().parent.parent
BATCH, EVERY, SKIPPED = 64, 50, 100  # images of a step, steps between two lines, steps before the clock starts
PLAIN = "--data.augment null"
ROWS = {
    "vitlit": "",
    "vitlit, memory": "--data.cache memory",
    "vitlit, no jitter": PLAIN,
    "vitlit, no jitter, memory": f"{PLAIN} --data.cache memory",
    "vitlit, no jitter, device": f"{PLAIN} --data.cache device",
}
TIMM = f"""
--model vit_tiny_patch16_224 --img-size 28 --num-classes 10 --device cpu --workers 1 --batch-size {BATCH} --no-aug
--model-kwargs img_size=28 patch_size=7 embed_dim=96 depth=6 num_heads=3 mlp_ratio=2
--mean 0.5 0.5 0.5 --std 0.5 0.5 0.5 --crop-pct 1.0 --opt adamw --lr 1e-3 --weight-decay 0.05 --clip-grad 1.0
--smoothing 0.1 --log-interval {EVERY} --train-split train --val-split val --epochs 1 --warmup-epochs 0
"""


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}


def vitlit(flags: str, mnist: Path, work: Path, steps: int) -> list[tuple[int, float]]:
    """(step, time) of each line that a training logs."""
    name = f"run-{time.time_ns()}"
    where = ["--data.root", str(mnist), "--run.root", str(work), "--run.name", name, "--trainer.logger", "false"]
    length = ["--trainer.max_steps", str(steps), "--trainer.limit_val_batches", "0", "--trainer.max_epochs", "-1"]
    every = ["--trainer.log_every_n_steps", str(EVERY), "--trainer.enable_progress_bar", "false"]
    command = [sys.executable, "-m", "vitlit", "fit", "--config", "recipes/small_mnist", *flags.split()]
    with (work / f"{name}.log").open("w") as log:
        subprocess.run(
            [*command, *where, *length, *every], env=environment(), cwd=work, stdout=log, stderr=log, check=True
        )
    rows = csv.DictReader((work / name / "metrics.csv").open())
    return [(int(row["step"]), float(row["unix_seconds"])) for row in rows if row["train/images_per_second"]]


def timm(script: Path, mnist: Path, work: Path, steps: int) -> list[tuple[int, float]]:
    """The same for timm's script, which is ended after so many steps."""
    command = [sys.executable, str(script), "--data-dir", str(mnist), "--output", str(work / "timm"), *TIMM.split()]
    process = subprocess.Popen(
        command, env=environment(), cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines, said = [], []
    for line in process.stdout or ():
        said.append(line)
        if found := re.match(r"Train: \d+ \[ *(\d+)/", line):
            lines.append((int(found[1]), time.time()))
            if lines[-1][0] >= steps:
                break
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not lines or lines[-1][0] < steps:
        raise RuntimeError("timm ended early:\n" + "".join(said[-20:]))
    return lines


def measure(begun: float, lines: list[tuple[int, float]]) -> tuple[float, float]:
    """(images per second, seconds until the clock starts)."""
    first = next(line for line in lines if line[0] >= SKIPPED)
    return (lines[-1][0] - first[0]) * BATCH / (lines[-1][1] - first[1]), first[1] - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, required=True, help="the image folder")
    parser.add_argument("--timm", type=Path, required=True, help="timm's train.py")
    parser.add_argument("--work", type=Path, required=True, help="an empty folder for the runs")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600, help=f"of each training; {SKIPPED} of them are not measured")
    given = parser.parse_args()
    work, mnist = given.work.resolve(), given.mnist.resolve()
    work.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in (*ROWS, "timm, no jitter")}
    for number in range(given.rounds):
        for name, measured in found.items():
            begun = time.time()
            if name in ROWS:
                lines = vitlit(ROWS[name], mnist, work, given.steps)
            else:
                lines = timm(given.timm.resolve(), mnist, work, given.steps)
            measured.append(measure(begun, lines))
            print(f"round {number + 1}, {name}: {measured[-1][0]:.0f} images/s", flush=True)
    reference = [speed for speed, _ in found["timm, no jitter"]]
    rows: list[dict[str, Any]] = []
    for name, measured in found.items():
        speeds, starts = zip(*measured, strict=True)
        ratio = statistics.median(one / other for one, other in zip(speeds, reference, strict=True))
        row = {"name": name, "flags": ROWS.get(name, TIMM.strip()), "images_per_second": [round(one) for one in speeds]}
        rows.append({**row, "x_timm": round(ratio, 3), "seconds_before": [round(one, 1) for one in starts]})
    write(given.out, (__doc__ or "").splitlines()[0], rows, steps=given.steps, batch=BATCH)


if __name__ == "__main__":
    main()
