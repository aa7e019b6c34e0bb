"""A training step and inference: vitlit through its Trainer and in a bare loop, and other libraries' ViTs.

    python benchmarks/train_step.py --out benchmarks/results/train_step.json

The same architecture, batch, precision, optimiser (AdamW, fused on a GPU) and setting of torch.compile for all. On a
GPU S/16, B/16 and L/16 in bf16, on a CPU S/16 in float32 with 8 images on one core and one thread; 224 pixels. In a
round each takes its turn, on the same images in the device's memory, and the next round begins with the next of them:
whoever comes first finds the memory that another has just freed. Seconds are CPU time on a CPU, so that other work on
the machine changes little, and wall-clock time on a GPU. Read the ratios, each from one round. Through the Trainer is a
Pretrain with vitlit's callbacks and metrics.csv. Memory is the peak of a training step in a process of its own, after
steps of a tiny model: what torch holds on a GPU, or by how much the process grew on a CPU. A library that is missing is
left out.
"""

import os

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a process that has asked CUDA itself cannot be forked

import argparse
import ctypes
import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from importlib import import_module
from importlib.metadata import version
from multiprocessing import get_context
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from runs import write
from torch import Tensor, nn
from torch.nn import functional as F

from vitlit import callbacks
from vitlit.benchmark.mfu import flop_of_step, peak_tflops
from vitlit.cli.trainer import Trainer
from vitlit.loggers import CSV
from vitlit.model import SIZES, ViT
from vitlit.objectives import Batch, Supervised
from vitlit.stages import Pretrain

CLASSES = 1000
BATCHES = {"S/16": 256, "B/16": 256, "L/16": 128}  # on a GPU
WARM_UP = 3  # steps of each that are not timed
PEERS = {"timm": "timm", "torchvision": "torchvision", "transformers": "transformers", "vit-pytorch": "vit_pytorch"}
BARE, THROUGH = "vitlit", "vitlit through its Trainer"


class Logits(nn.Module):
    """A ViT of transformers, with logits for its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images).logits
        return logits


def build(name: str, preset: str, image_size: int) -> nn.Module:
    """A library's ViT with a class token, learned positions and one linear layer for its head."""
    if name in (BARE, THROUGH):
        return ViT.from_preset(preset, image_size=image_size, num_classes=CLASSES)
    size, patch_size = preset.split("/")
    (width, depth, mlp_dim, heads), patch = SIZES[size], int(patch_size)
    peer = import_module(PEERS[name])
    if name == "timm":
        sizes = {
            "patch_size": patch,
            "embed_dim": width,
            "depth": depth,
            "num_heads": heads,
            "mlp_ratio": mlp_dim / width,
        }
        model = peer.models.VisionTransformer(img_size=image_size, num_classes=CLASSES, **sizes)
    elif name == "torchvision":
        model = peer.models.VisionTransformer(image_size, patch, depth, heads, width, mlp_dim, num_classes=CLASSES)
    elif name == "transformers":
        sizes = {"image_size": image_size, "patch_size": patch, "hidden_size": width, "num_hidden_layers": depth}
        sizes |= {"num_attention_heads": heads, "intermediate_size": mlp_dim, "num_labels": CLASSES}
        model = Logits(peer.ViTForImageClassification(peer.ViTConfig(**sizes, attn_implementation="sdpa")))
    else:
        sizes = {"image_size": image_size, "patch_size": patch, "dim": width, "depth": depth, "heads": heads}
        model = peer.ViT(**sizes, mlp_dim=mlp_dim, dim_head=width // heads, num_classes=CLASSES)
    made: nn.Module = model
    return made


class Setting:
    """What all contenders of a comparison share."""

    def __init__(self, given: argparse.Namespace, preset: str) -> None:
        self.preset, self.image_size, self.compile = preset, given.image_size, given.compile
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.gpu = self.device.type == "cuda"
        self.precision = "bf16-mixed" if self.gpu else "32-true"
        self.batch_size = given.batch_size or (BATCHES.get(preset, 128) if self.gpu else 8)
        self.optimizer = partial(torch.optim.AdamW, lr=1e-4, fused=self.gpu)

    def tiny(self) -> "Setting":
        """The same with the smallest model and images."""
        tiny = copy(self)
        tiny.preset, tiny.image_size = "Ti/16", 16
        return tiny

    def batch(self) -> tuple[Tensor, Tensor]:
        images = torch.randn(self.batch_size, 3, self.image_size, self.image_size, device=self.device)
        return images, torch.arange(self.batch_size, device=self.device) % CLASSES

    def clock(self) -> float:
        if not self.gpu:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def compiled(self, model: nn.Module) -> nn.Module:
        if self.compile != "false":
            model.compile(mode=self.compile)
        return model


class Bare:
    """A ViT in a bare loop."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.setting, self.images, self.labels = setting, *setting.batch()
        self.model = build(name, setting.preset, setting.image_size).to(setting.device)
        self.optimizer = setting.optimizer(self.model.parameters())
        setting.compiled(self.model)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.setting.device.type, torch.bfloat16, enabled=self.setting.gpu)

    def step(self) -> None:
        self.model.train()
        with torch.enable_grad(), self.autocast():
            loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.inference_mode()
    def infer(self) -> None:
        self.model.eval()
        with self.autocast():
            self.model(self.images)


class Turns:
    """The Trainer's batches: between the turns of its own steps, which are timed, the others take theirs."""

    def __init__(self, setting: Setting, rounds: int, repeats: int, others: Callable[[], None]) -> None:
        self.setting, self.rounds, self.repeats, self.others = setting, rounds, repeats, others
        self.batch, self.seconds = setting.batch(), list[float]()

    def __len__(self) -> int:
        return WARM_UP + self.rounds * self.repeats + 1  # with the last, the turn before it has ended

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(WARM_UP):
            yield self.batch
        for _ in range(self.rounds):
            start = self.setting.clock()
            for _ in range(self.repeats):
                yield self.batch
            self.seconds.append((self.setting.clock() - start) / self.repeats)
            self.others()
        yield self.batch


def through_trainer(setting: Setting, rounds: int, repeats: int, others: Callable[[], None]) -> list[float]:
    """Seconds a step of each round, through the Trainer."""
    turns = Turns(setting, rounds, repeats, others)
    vit = ViT.from_preset(setting.preset, image_size=setting.image_size)
    stage = Pretrain(vit, partial(Supervised, num_classes=CLASSES, head="finetune"), setting.optimizer)
    setting.compiled(stage.vit)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="gpu" if setting.gpu else "cpu",
            devices=1,
            precision=setting.precision,  # type: ignore[arg-type]
            max_epochs=1,
            logger=[CSV(folder)],
            callbacks=[callbacks.NonFinite(), callbacks.Throughput()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # there are no images for validation, and few steps
            trainer.fit(stage, turns)
    return turns.seconds


def memory(name: str, setting: Setting) -> float:
    """GiB of three training steps, at their peak; called in a process of its own."""
    torch.set_num_threads(1)
    status = Path("/proc/self/status")

    def train(setting: Setting) -> None:
        if name == THROUGH:
            through_trainer(setting, 0, 0, lambda: None)
        else:
            bare = Bare(name, setting)
            for _ in range(WARM_UP):
                bare.step()

    def kib(field: str) -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1])

    train(setting.tiny())  # loads what is loaded at the first step
    if setting.gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be taken first, and not count
        Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
        before = kib("VmRSS")
    train(setting)
    return torch.cuda.max_memory_allocated() / 2**30 if setting.gpu else (kib("VmHWM") - before) / 2**20


def compare(setting: Setting, names: list[str], rounds: int, repeats: int) -> list[dict[str, Any]]:
    """A row a contender: seconds a step and an inference, ratios to vitlit's bare loop, peak memory."""
    peaks = {}
    for name in names:
        with get_context("fork").Pool(1) as pool:
            peaks[name] = pool.apply(memory, (name, setting))
    bares = {name: Bare(name, setting) for name in names if name != THROUGH}
    steps: dict[str, list[float]] = {name: [] for name in bares}
    inferences: dict[str, list[float]] = {name: [] for name in bares}

    def turn(calls: list[Callable[[], None]], seconds: list[list[float]]) -> None:
        for call, times in zip(calls, seconds, strict=True):
            start = setting.clock()
            for _ in range(repeats):
                call()
            times.append((setting.clock() - start) / repeats)

    def others() -> None:
        first = len(steps[BARE]) % len(bares)
        for name in [*bares, *bares][first : first + len(bares)]:
            turn([bares[name].step, bares[name].infer], [steps[name], inferences[name]])
        print(".", end="", flush=True)

    for bare in bares.values():
        for _ in range(WARM_UP):
            bare.step()
            bare.infer()
    steps[THROUGH] = through_trainer(setting, rounds, repeats, others)
    print()
    rows = []
    for name in names:
        row: dict[str, Any] = {"model": setting.preset, "batch_size": setting.batch_size, "name": name}
        for what, times in (("step", steps), ("inference", inferences)):
            if name in times:
                row[f"{what}_seconds"] = quartiles(times[name])
                row[f"{what}_images_per_second"] = round(setting.batch_size / statistics.median(times[name]), 2)
                row[f"{what}_time_over_vitlit"] = quartiles(list(map(truediv, times[name], times[BARE])))
        rows.append({**row, "memory_gib": round(peaks[name], 3)})
        print(rows[-1], flush=True)
    return rows


def quartiles(values: list[float]) -> list[float]:
    return [round(value, 4) for value in statistics.quantiles(values, n=4, method="inclusive")]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--models", nargs="+", help="presets; by default S/16 B/16 L/16 on a GPU, S/16 on a CPU")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, help="by default 256, 128 for L/16, and 8 on a CPU")
    parser.add_argument("--compile", default="false", help="a mode of torch.compile, for all; default false")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, help="calls a turn; by default 20 on a GPU, 1 on a CPU")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    gpu = torch.cuda.is_available()
    names, versions = [BARE, THROUGH], {}
    for name in given.peers:
        try:
            import_module(PEERS[name])
        except ImportError as error:
            print(f"{name} is left out: {error}")
        else:
            names.append(name)
            versions[name] = version(name)
    rows: list[dict[str, Any]] = []
    for preset in given.models or (list(BATCHES) if gpu else ["S/16"]):
        setting = Setting(given, preset)
        made = compare(setting, names, given.rounds, given.repeats or (20 if gpu else 1))
        device = torch.cuda.get_device_name() if gpu else "one core of the CPU"
        if peak := peak_tflops(device, setting.precision):
            vit = ViT.from_preset(preset, image_size=given.image_size, num_classes=CLASSES)
            one = Batch.of([torch.zeros(1, 3, given.image_size, given.image_size), torch.zeros(1).long()])
            flop = flop_of_step(vit, Supervised(vit), one)
            made = [{**row, "mfu": round(flop * row["step_images_per_second"] / peak / 1e12, 4)} for row in made]
        rows += made
        about = {"device": device, "precision": setting.precision, "image_size": given.image_size}
        about |= {"compile": given.compile, "rounds": given.rounds, "peers": versions}
        write(given.out, (__doc__ or "").splitlines()[0], rows, **about)


if __name__ == "__main__":
    main()
