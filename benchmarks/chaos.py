"""A training on MNIST that is killed at random times and one that is not: both end with the same bits.

    python benchmarks/chaos.py --mnist FOLDER --work WORK --out RESULT.json [--kills 30]

Everything random is on: dropout, stochastic depth, augmentation, mixup, cutmix, erasing. EMA averages the weights. Each
kill sends SIGKILL to the command and its data workers, a few seconds after the start. Then the same command runs again.
"""

import argparse
import csv
import hashlib
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from runs import write

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a child forked from a process with OpenMP threads hangs

FLAGS = """
fit --config pretrain --data.image_size 28 --data.batch_size 100 --data.num_workers 1 --model.vit.patch_size 7
--model.vit.width 64 --model.vit.depth 3 --model.vit.mlp_dim 128 --model.vit.dropout 0.1 --model.vit.drop_path 0.1
--model.vit.attention_dropout 0.1 --data.mixing.mixup 0.2 --data.mixing.cutmix 1.0 --data.erasing.prob 0.25
--trainer.max_epochs 4 --run.save_minutes 0.05 --trainer.logger false --trainer.accelerator cpu --run.name mnist
"""
EMA = "[{class_path: vitlit.callbacks.EMA, init_args: {decay: 0.99}}]"
LONGEST = 15.0  # seconds until a kill, including the few of the start


def begin(line: list[str], folder: Path) -> int:
    """Start the command in a forked process group, where its imports are already done."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            from vitlit.cli.main import main

            code = main(line)
        finally:
            sys.stdout.flush()
            os._exit(code)
    return child


def complete(line: list[str], folder: Path, kills: int, draw: random.Random) -> list[int]:
    """Repeat the command until its run is complete, killing it `kills` times. Returns the logged steps at each kill."""
    folder.mkdir(parents=True)
    line = [*line, "--run.root", str(folder)]
    hit: list[int] = []
    while True:
        child = begin(line, folder)
        until = time.monotonic() + (draw.uniform(0, LONGEST) if len(hit) < kills else float("inf"))
        while time.monotonic() < until:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                if os.waitstatus_to_exitcode(status):
                    raise RuntimeError(f"the command failed; see {folder}/log.txt")
                return hit
            time.sleep(0.02)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        file = folder / "mnist" / "metrics.csv"
        rows = list(csv.DictReader(file.open())) if file.exists() else []
        hit.append(int(rows[-1]["step"]) + 1 if rows else 0)
        print(f"killed {len(hit)} times, after step {hit[-1]}", flush=True)


def left(folder: Path) -> dict[str, str]:
    """Digests of the results of the run: weights, average, optimizer, and metrics without the speed."""
    import torch

    content = torch.load(folder / "mnist" / "checkpoints" / "last.ckpt", weights_only=True)
    names = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "loops")
    rows = csv.DictReader((folder / "mnist" / "metrics.csv").open())
    kept = [[row[name] for name in row if "second" not in name and "wait" not in name] for row in rows]
    return {name: digest(content[name]) for name in names} | {"metrics": digest(kept)}


def digest(value: Any) -> str:
    import torch

    if isinstance(value, torch.Tensor):
        said = value.numpy().tobytes()
    elif isinstance(value, dict):
        said = "".join(f"{key}:{digest(value[key])}" for key in sorted(value, key=str)).encode()
    elif isinstance(value, list | tuple):
        said = "".join(map(digest, value)).encode()
    else:
        said = repr(value).encode()
    return hashlib.sha256(said).hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mnist", type=Path, required=True, help="MNIST as an image folder")
    parser.add_argument("--work", type=Path, required=True, help="an empty folder for the two runs")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="for the times of the kills")
    given = parser.parse_args()
    import vitlit.cli.fit  # noqa: F401

    line = [*FLAGS.split(), "--trainer.callbacks", EMA, "--data.root", str(given.mnist)]
    killed = complete(line, given.work / "killed", given.kills, random.Random(given.seed))
    complete(line, given.work / "undisturbed", 0, random.Random())
    ours, theirs = left(given.work / "killed"), left(given.work / "undisturbed")
    same = ours == theirs
    rows = [
        {"killed": len(killed), "after_steps": killed, "identical": same, "killed_run": ours, "undisturbed": theirs}
    ]
    write(given.out, (__doc__ or "").splitlines()[0], rows, flags=FLAGS.split())
    print("identical" if same else "different", ours, theirs, sep="\n")
    return 0 if same and len(killed) == given.kills else 1


if __name__ == "__main__":
    sys.exit(main())
