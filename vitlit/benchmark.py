"""`vitlit benchmark data ROOT`: what this folder, on this machine, can feed a model with."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate

from vitlit.data.dataset import Images, channels_last
from vitlit.data.folder import parse_share
from vitlit.data.splits import Splits
from vitlit.data.stream import TrainStream
from vitlit.data.transforms import train_transform
from vitlit.data.workers import count, loader
from vitlit.errors import CommandParser, UserError
from vitlit.images.decode import DECODER, PILLOW_SLOWER, decode_bytes
from vitlit.images.preprocess import Preprocess
from vitlit.model import ViT

HELP = """\
Time how training images are read, decoded, cropped and copied to the device, which of it is slowest, how many a loader
gives with all of this machine's cores, and how many a ViT would take. Files that the system has read lately come
from memory: the first epoch of a larger set reads at the pace of its disk.
"""
LOADED = 5.0  # seconds that the loader is watched for
STEPS = 3  # of the model


def run(arguments: list[str]) -> int:
    """`vitlit benchmark data ROOT [options]`; returns the exit code."""
    if arguments[:1] != ["data"]:
        if not arguments or arguments[0] in ("-h", "--help"):
            print("vitlit benchmark data ROOT\n\n" + HELP + "\n`vitlit benchmark data --help` lists its options.")
            return 0
        raise UserError("usage: vitlit benchmark data ROOT; vitlit benchmark --help says more")
    parser = CommandParser("vitlit benchmark data", HELP)
    parser.add_argument("root", metavar="ROOT", help="as --data.root: a folder, or shards")
    parser.add_argument("--image_size", type=int, default=224, metavar="N", help="pixels; 224 unless given")
    parser.add_argument("--batch_size", type=int, default=64, metavar="N", help="of a device; 64 unless given")
    parser.add_argument("--images", type=int, default=512, metavar="N", help="to time the stages on; 512 unless given")
    parser.add_argument("--model", default="B/16", metavar="PRESET", help="the ViT; B/16 unless given, none for none")
    parser.add_argument("--holdout", default="0", metavar="SHARE", help="as --data.holdout, such as 10%%")
    parser.add_argument("--manifest", metavar="FILE", help="as --data.manifest")
    given = parser.parse_args(arguments[1:])
    if min(given.image_size, given.batch_size, given.images) < 1:
        raise UserError("vitlit benchmark data: --image_size, --batch_size and --images must be at least 1")
    report(given)
    return 0


def report(given: Any) -> None:
    """Time the stages, the loader and the model, and print what follows from them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Refused before anything is timed.
    vit = None if given.model == "none" else ViT.from_preset(given.model, image_size=given.image_size, num_classes=1000)
    index = Splits(given.root, parse_share(given.holdout), given.manifest)["train"]
    if len(index) < given.batch_size:
        raise UserError(f"{given.root} has {len(index)} training images; give a smaller --batch_size")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    preprocess = Preprocess((given.image_size, given.image_size))
    data = Images(index, train_transform(preprocess, "random_resized", (0.05, 1.0), 0.5))
    seconds, size = time_stages(data, given.images, given.batch_size, preprocess, device)
    torch.set_num_threads(threads)
    whole = sum(seconds.values())
    one = 1 / (whole - seconds["transfer"])  # workers do all but the transfer
    slowest = max(seconds, key=lambda name: seconds[name])
    print(f"{given.root}: {len(index):,} training images of {size / 2**10:,.1f} KiB, {DECODER} decodes")
    print(f"\n{'one core':<12}  ms/image  share")
    for name, value in seconds.items():
        print(f"  {name:<12}{1000 * value:>6.2f}  {value / whole:>5.0%}{'  slowest' if name == slowest else ''}")
    print(f"  {'all':<12}{1000 * whole:>6.2f}  {1 / whole:,.0f} images/s")

    workers = count(torch.cuda.device_count())
    speed = time_loader(data, given.batch_size, workers, device.type == "cuda")
    print(f"\nloader       {speed:,.0f} images/s with {workers} worker{'s'[: workers > 1]}, all of a device's cores")
    if vit is None:
        return
    needed = time_model(vit, given.batch_size, device)
    how = f"forward and backward on {device.type}, {given.batch_size} at a time"
    print(f"ViT-{given.model:<8} {needed:,.0f} images/s go {how}")
    print(advice(needed, one, speed, workers, slowest))


def time_stages(
    data: Images, images: int, batch_size: int, preprocess: Preprocess, device: torch.device
) -> tuple[dict[str, float], float]:
    """Seconds an image by stage, on one core, and the files' mean size in bytes."""

    def transfer(batch: Tensor) -> None:
        preprocess.normalise(batch.to(device).permute(0, 3, 1, 2))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    transfer(torch.zeros(1, *preprocess.image_size, 3, dtype=torch.uint8))  # what a GPU does once
    index = data.index
    drawn = np.random.default_rng(0).permutation(len(index))[:images].tolist()
    spent = dict.fromkeys(("read", "decode", "crop, resize", "transfer"), 0.0)
    total, batch = 0, []
    for image in drawn:
        times = [time.perf_counter()]
        content = index.read(image)
        times.append(time.perf_counter())
        decoded = decode_bytes(content, index.path(image))
        times.append(time.perf_counter())
        batch.append(channels_last(data.transform(decoded)))
        times.append(time.perf_counter())
        if len(batch) == batch_size or image == drawn[-1]:
            transfer(default_collate(batch))
            batch = []
        times.append(time.perf_counter())
        total += len(content)
        for name, start, end in zip(spent, times, times[1:], strict=False):
            spent[name] += (end - start) / len(drawn)
    return spent, total / len(drawn)


def time_loader(data: Images, batch_size: int, workers: int, pin: bool) -> float:
    """Images per second that a training's loader gives, once its workers are under way."""
    steps = len(data.index) // batch_size
    position = 0
    stream = TrainStream(len(data.index), batch_size, 0, lambda: position)
    batches = loader(data, stream, batch_size, workers, pin=pin)

    def endless() -> Iterator[Any]:
        nonlocal position
        while True:
            yield from batches
            position += steps

    found = endless()
    for _ in range(2 * workers + 1):  # what was prepared before the clock began
        next(found)
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < LOADED:
        images += len(next(found)[0])
    return images / (time.perf_counter() - start)


def time_model(vit: ViT, batch_size: int, device: torch.device) -> float:
    """Images per second of forward and backward, in bf16 where a GPU has it, without a loader."""
    vit = vit.to(device).train()
    images, labels = (
        torch.randn(batch_size, 3, *vit.config.sides, device=device),
        torch.arange(batch_size, device=device),
    )
    seconds = []
    for _ in range(1 + STEPS):
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext():
            loss = F.cross_entropy(vit(images), labels % 1000)
        loss.backward()
        vit.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - start)
    return batch_size / min(seconds[1:])


def advice(needed: float, one: float, speed: float, workers: int, slowest: str) -> str:
    """How many workers suffice, or what to do where none do.

    Args:
        needed: images per second that the model takes.
        one: images per second of one worker alone.
        speed: of the loader with all workers.
        workers: how many that are.
        slowest: the stage that takes longest.
    """
    if needed <= speed:
        enough = min(workers, max(1, int(-(-needed * 1.2 // one))))  # a fifth more, for what was not timed
        return f"\nthe model is slower than the loader: --data.num_workers {enough} suffice"
    remedies = {
        "read": "copy the data to a faster disk, or pack it (`vitlit data shard`)",
        "decode": "make smaller copies (`vitlit data shard --short_side 400`), or give each device more cores",
        "crop, resize": "give each device more cores, or --data.image_size fewer pixels",
        "transfer": "larger batches, or fewer pixels",
    }
    if slowest == "decode" and DECODER == "Pillow":
        remedies["decode"] = f"install torchcodec, which decodes {PILLOW_SLOWER} times as fast"
    return f"\nthe model would wait {1 - speed / needed:.0%} of its time, most of it for {slowest}: {remedies[slowest]}"
