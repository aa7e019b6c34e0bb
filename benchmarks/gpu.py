"""Training on one GPU: two recipes with `vitlit fit`, loader included, and S/16 without a loader against timm's.

    python benchmarks/gpu.py --work WORK --out benchmarks/results/gpu.json

The script makes the images: smooth noise plus pixel noise, 256 x 256 JPEGs for the ImageNet recipe and 32 x 32 PNGs for
CIFAR's. Only speed and memory are measured. MFU is the FLOP of forward and backward, two per multiply-add, divided by
the dense bf16 peak of the card's data sheet.
"""

import argparse
import csv
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from runs import write
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import vitlit
from vitlit.data.workers import cores
from vitlit.model import ViT

RECIPES = {
    "vit_s16_imagenet1k_90ep": {"size": 256, "classes": 1000, "each": 60, "suffix": "jpg"},
    "small_cifar10": {"size": 32, "classes": 10, "each": 5000, "suffix": "png"},
}
STEPS = 1000  # for a recipe
BATCH, ROUNDS, REPEATS = 256, 15, 5  # for the ViT without a loader


def draw(size: int, suffix: str, paths: list[Path]) -> None:
    """Write images that compress about as well as photographs."""
    generator = np.random.default_rng(int(paths[0].parent.name))
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8))
        smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.int16)
        noisy = smooth + generator.integers(-12, 13, smooth.shape, np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, **({"quality": 90} if suffix == "jpg" else {}))


def folder(out: Path, size: int, classes: int, each: int, suffix: str) -> Path:
    """Write an image folder with `each` training images per class, and a twentieth as many for validation."""
    names = [f"{label:04}" for label in range(classes)]
    counts = {"train": each, "val": max(1, each // 20)}
    jobs = [[out / split / name / f"{i}.{suffix}" for i in range(n)] for split, n in counts.items() for name in names]
    with ProcessPoolExecutor(cores()) as pool:
        list(pool.map(partial(draw, size, suffix), jobs))
    return out


def fit(name: str, root: Path, work: Path, steps: int, limit: str) -> dict[str, Any]:
    """Train a recipe for `steps` steps or until `limit`. Returns the numbers of metrics.csv and the peak memory."""
    from vitlit.cli.main import main

    torch.cuda.reset_peak_memory_stats()
    flags = ["--data.root", root, "--trainer.max_steps", steps, "--trainer.logger", "false", "--run.root", work]
    flags += ["--run.time_limit", limit]
    flags += ["--model.schedule.warmup", "10%"]  # the recipe's warm-up is longer than this training
    run = work / f"{name}-{time.time_ns()}"
    start = time.perf_counter()
    code = main(["fit", "--config", f"recipes/{name}", *map(str, flags), "--run.name", run.name])
    seconds = time.perf_counter() - start
    if code not in (0, 75):
        raise RuntimeError(f"{name} ended with {code}")
    rows = [row for row in csv.DictReader((run / "metrics.csv").open()) if row["train/images_per_second"]]
    rows = rows[1:]  # the first row includes the start of the workers
    speed = statistics.median(float(row["train/images_per_second"]) for row in rows)
    waits = [float(row["train/data_wait"]) for row in rows]
    flop = training_flop(vitlit.load(run))
    return {
        "name": name,
        "steps": int(rows[-1]["step"]) + 1,
        "images_per_second": round(speed),
        "data_wait": round(statistics.median(waits), 3),
        "gflop_per_image": round(flop / 1e9, 2),
        "mfu": round(flop * speed / peak(), 4),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "seconds_in_all": round(seconds, 1),
        "last_loss": float(rows[-1]["train/loss"]),
    }


def training_flop(vit: ViT) -> float:
    """FLOP of one image's forward and backward, two per multiply-add; attention counts as two products."""
    vit = vit.to("meta").train()
    with FlopCounterMode(display=False) as counter:
        vit(torch.empty(1, 3, *vit.config.sides, device="meta")).sum().backward()
    return float(counter.get_total_flops())


def peak() -> float:
    """FLOP per second of dense bf16 matrix products, from the card's data sheet."""
    from lightning.fabric.utilities.throughput import get_available_flops

    flops = get_available_flops(torch.device("cuda"), torch.bfloat16)
    assert flops is not None, "Lightning does not know this card"
    return float(flops)


def alone() -> list[dict[str, Any]]:
    """Forward and backward of S/16 in bf16 on images in GPU memory, vitlit's and timm's in turn."""
    import timm

    def ours() -> torch.nn.Module:
        return ViT.from_preset("S/16", image_size=224, num_classes=1000, pool="gap").cuda().train()

    def theirs() -> torch.nn.Module:
        made: torch.nn.Module = timm.create_model("vit_small_patch16_224", global_pool="avg", fc_norm=False)
        return made.cuda().train()

    images = torch.randn(BATCH, 3, 224, 224, device="cuda")
    labels = torch.arange(BATCH, device="cuda")
    models = {"vitlit": ours(), "timm": theirs()}
    flop = training_flop(ViT.from_preset("S/16", image_size=224, num_classes=1000, pool="gap"))

    def step(model: torch.nn.Module) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        model.zero_grad()

    seconds: dict[str, list[float]] = {name: [] for name in models}
    memory = {}
    for model in models.values():
        for _ in range(3):
            step(model)
    for _ in range(ROUNDS):
        for name, model in models.items():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            for _ in range(REPEATS):
                step(model)
            torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - start) / REPEATS)
            memory[name] = torch.cuda.max_memory_allocated()
    rows = []
    for name, times in seconds.items():
        speed = BATCH / statistics.median(times)
        rows.append(
            {
                "name": name,
                "images_per_second": round(speed),
                "mfu": round(flop * speed / peak(), 4),
                "speed_over_timm": round(statistics.median(map(truediv, seconds["timm"], times)), 3),
                "peak_memory_gib": round(memory[name] / 2**30, 2),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder for images and runs")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--share", type=float, default=1.0, help="share of the images and steps, for a trial")
    parser.add_argument("--limit", default="0:30:00", help="time limit of a recipe, H:MM:SS")
    given = parser.parse_args()
    made = {}
    for name, about in RECIPES.items():  # before CUDA starts, because processes cannot be forked after that
        each = max(2, round(about["each"] * given.share))
        made[name] = folder(given.work / f"images-{name}", about["size"], about["classes"], each, about["suffix"])
        size = statistics.mean(path.stat().st_size for path in (made[name] / "train" / "0000").iterdir())
        print(f"{name}: {about['classes'] * each:,} images of {size / 1024:.1f} KiB", flush=True)
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "peak_bf16_tflops": peak() / 1e12}

    def save(rows: list[dict[str, Any]]) -> None:
        print(rows[-1], flush=True)
        write(given.out, (__doc__ or "").splitlines()[0], rows, **result)

    result["alone"] = alone()
    print(*result["alone"], sep="\n", flush=True)
    rows: list[dict[str, Any]] = []
    for name in reversed(RECIPES):
        steps = max(100, round(STEPS * given.share))
        rows.append(fit(name, made[name], given.work, steps, given.limit))
        save(rows)


if __name__ == "__main__":
    main()
