"""`vitlit benchmark model`: how fast this machine trains a ViT, without a loader."""

import json
import math
import statistics
import time
import timeit
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from vitlit.benchmark.mfu import flop_of_step, peak_memory, peak_tflops
from vitlit.errors import CommandParser, check_range
from vitlit.model import ViT
from vitlit.objectives import Batch, Supervised

HELP = """\
Time a ViT on random images, without a loader: the forward pass, and a training step, which is forward, cross entropy,
backward and AdamW. Memory is the most that torch has held on a GPU, or this process on a CPU, its libraries included.
The largest batch that a GPU trains on is found, to a sixteenth, by trying, not compiled; on a CPU it is not searched.
"""
ROUNDS, SECONDS = 5, 0.5  # how often, and for how long each time, a pass is timed
CLASSES = 1000
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
MODES = ("false", "default", "reduce-overhead", "max-autotune")


def run(arguments: list[str]) -> int:
    parser = CommandParser("vitlit benchmark model", HELP)
    parser.add_argument("--preset", default="B/16", help="of the ViT; default B/16")
    parser.add_argument("--image_size", type=int, default=224, metavar="N", help="pixels; default 224")
    parser.add_argument("--batch_size", type=int, metavar="N", help="default 64, on a CPU 8")
    parser.add_argument("--precision", default="auto", choices=PRECISIONS, help="as --trainer.precision; default auto")
    parser.add_argument("--compile", default="false", choices=MODES, help="torch.compile's mode; default false")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = (8 if device.type == "cpu" else 64) if given.batch_size is None else given.batch_size
    check_range("vitlit benchmark model", 1, image_size=given.image_size, batch_size=size)
    vit = ViT.from_preset(given.preset, image_size=given.image_size, num_classes=CLASSES)
    precision = automatic(device) if given.precision == "auto" else given.precision
    found = {"preset": given.preset, "image_size": given.image_size, "compile": given.compile}
    found |= measure(vit, size, precision, given.compile, device)
    print(json.dumps(found, indent=2) if given.json else report(found))
    return 0


def automatic(device: torch.device) -> str:
    """The precision that a training takes by default."""
    if device.type == "cpu":
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def measure(vit: ViT, size: int, precision: str, compile: str, device: torch.device) -> dict[str, Any]:
    """What is found of a ViT and a batch of `size` images, as JSON values: seconds a batch, GiB, FLOP an image."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    found: dict[str, Any] = {"device": name, "precision": precision, "batch_size": size}
    found["parameters"] = sum(parameter.numel() for parameter in vit.parameters())
    one = Batch.of([torch.empty(1, 3, *vit.config.sides, device="meta"), torch.zeros(1).long()])
    found["step_flop"] = flop_of_step(vit, Supervised(vit), one)
    vit.to(device)
    if compile != "false":
        vit.compile(mode=compile)
    images = torch.randn(size, 3, *vit.config.sides, device=device)

    @torch.inference_mode()
    def forward() -> None:
        with autocast(precision, device):
            vit(images)

    for what, call in (("forward", forward), ("step", training_step(vit, size, precision, device))):
        vit.train(what == "step")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        found[f"{what}_seconds"] = seconds_of(call)
        found[f"{what}_memory_gib"] = peak_memory(device)
    peak = peak_tflops(name, precision)
    found["mfu"] = peak and found["step_flop"] * size / found["step_seconds"] / (peak * 1e12)
    found["largest_batch"] = None
    if device.type == "cuda":
        del images, forward, call
        found["largest_batch"] = largest(lambda size: fits(vit, size, precision, device), size)
    return found


def training_step(vit: ViT, size: int, precision: str, device: torch.device) -> Callable[[], None]:
    """A step on random images: forward, cross entropy, backward, AdamW."""
    images, gpu = torch.randn(size, 3, *vit.config.sides, device=device), device.type == "cuda"
    labels = torch.arange(size, device=device) % CLASSES
    optimizer = torch.optim.AdamW(vit.parameters(), lr=1e-4, fused=gpu)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "16-mixed")

    def step() -> None:
        with autocast(precision, device):
            loss = F.cross_entropy(vit(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def autocast(precision: str, device: torch.device) -> torch.autocast:
    half = torch.float16 if precision == "16-mixed" else torch.bfloat16
    return torch.autocast(device.type, half, enabled=precision != "32-true")


def now() -> float:
    """Seconds, once a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(call: Callable[[], None]) -> float:
    """Seconds a call, the median of several rounds, after three calls that are not timed."""
    clock = timeit.Timer(call, timer=now)
    clock.timeit(2)  # a compiler works, and CUDA graphs are recorded
    calls = math.ceil(SECONDS / clock.timeit(1))
    return statistics.median(clock.repeat(ROUNDS, calls)) / calls


def largest(fits: Callable[[int], bool], start: int) -> int:
    """The largest batch that fits, to a sixteenth, by doubling and bisection; 0 if none does."""
    low, high = 0, start
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fits(vit: ViT, size: int, precision: str, device: torch.device) -> bool:
    """Whether a GPU has the memory for a training step, which is not compiled."""
    try:
        with torch.compiler.set_stance("force_eager"):
            training_step(vit, size, precision, device)()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        vit.zero_grad()
        torch.cuda.empty_cache()


def report(found: dict[str, Any]) -> str:
    size, mfu, most = found["batch_size"], found["mfu"], found["largest_batch"]
    lines = [
        f"ViT-{found['preset']}, {found['parameters']:,} parameters, {found['image_size']} pixels, "
        f"{found['step_flop'] / 1e9:,.1f} GFLOP a training image",
        f"{found['device']}, {found['precision']}, batches of {size}, compile {found['compile']}\n",
        f"{'':<15}{'images/s':>10}{'ms/batch':>11}{'memory':>12}",
    ]
    for name, what in (("forward", "forward"), ("training step", "step")):
        seconds, memory = found[f"{what}_seconds"], found[f"{what}_memory_gib"]
        share = f"  {mfu:.1%} of the device's peak" if mfu and what == "step" else ""
        lines.append(f"{name:<15}{size / seconds:>10,.0f}{1000 * seconds:>11,.1f}{memory:>8.2f} GiB{share}")
    lines.append(f"{'largest batch':<15}" + (f"{most:>10,}" if most is not None else "  not searched on a CPU"))
    return "\n".join(lines)
