"""`vitlit benchmark data ROOT`: how fast this machine loads a folder, and whether a model has to wait for it."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, repeat
from math import ceil

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from vitlit.benchmark.model import automatic, now, seconds_of, training_step
from vitlit.data.dataset import REMOVE, Images, channels_last
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
Time how training images are read, decoded, cropped and copied to the device, how many a loader gives with all of this
machine's cores, and how many a ViT takes. Files that were read lately come from memory: the first epoch of a larger
set is as slow as its disk.
"""
SECONDS = 5.0  # the loader is timed for


def run(arguments: list[str]) -> int:
    parser = CommandParser("vitlit benchmark data", HELP)
    parser.add_argument("root", metavar="ROOT", help="as --data.root: a folder, or shards")
    parser.add_argument("--image_size", type=int, default=224, metavar="N", help="pixels; default 224")
    parser.add_argument("--batch_size", type=int, default=64, metavar="N", help="per device; default 64")
    parser.add_argument("--images", type=int, default=512, metavar="N", help="timed on one core; default 512")
    parser.add_argument("--model", default="B/16", metavar="PRESET", help="of the ViT, or none; default B/16")
    parser.add_argument("--holdout", default="0", metavar="SHARE", help="as --data.holdout, such as 10%%")
    parser.add_argument("--manifest", metavar="FILE", help="as --data.manifest")
    given = parser.parse_args(arguments)
    if min(given.image_size, given.batch_size, given.images) < 1:
        parser.error("--image_size, --batch_size and --images must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # First, so that mistakes are refused before anything is timed.
    vit = None if given.model == "none" else ViT.from_preset(given.model, image_size=given.image_size, num_classes=1000)
    index = Splits(given.root, parse_share(given.holdout), given.manifest)["train"]
    if len(index) < given.batch_size:
        raise UserError(f"{given.root} has {len(index)} training images; give a smaller --batch_size")

    preprocess = Preprocess((given.image_size, given.image_size))
    data = Images(index, train_transform(preprocess, "random_resized", (0.05, 1.0), 0.5), remedy=REMOVE)
    workers = count(torch.cuda.device_count())
    try:
        seconds, size = time_stages(data, given.images, given.batch_size, preprocess, device)
        loaded = time_loader(data, given.batch_size, workers, device.type == "cuda")
    except UserError as error:
        raise UserError(f"{error}; `vitlit data check {given.root}` lists all that cannot be read") from error
    total, slowest = sum(seconds.values()), max(seconds, key=seconds.__getitem__)
    print(f"{given.root}: {len(index):,} training images of {size / 2**10:,.1f} KiB, decoded by {DECODER}")
    print(f"\n{'one core':<12}  ms/image  share")
    for name, value in seconds.items():
        print(f"  {name:<12}{1000 * value:>6.2f}  {value / total:>5.0%}{'  slowest' if name == slowest else ''}")
    print(f"  {'all':<12}{1000 * total:>6.2f}  {1 / total:,.0f} images/s")
    print(f"\nloader       {loaded:,.0f} images/s, {workers} worker(s), all of a device's cores")
    if vit is not None:
        step = training_step(vit.to(device).train(), given.batch_size, automatic(device), device)
        needed = given.batch_size / seconds_of(step)
        print(f"ViT-{given.model:<8} {needed:,.0f} images/s, a training step on {device.type}")
        print(advice(needed, 1 / (total - seconds["transfer"]), loaded, workers, slowest))
    return 0


def time_stages(
    data: Images, images: int, batch_size: int, preprocess: Preprocess, device: torch.device
) -> tuple[dict[str, float], float]:
    """Seconds an image by stage, on one core, and the mean size of a file in bytes."""
    seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        start = now()
        yield
        seconds[stage] += (now() - start) / len(drawn)

    def transfer(batch: Tensor) -> None:
        preprocess.normalise(batch.to(device).permute(0, 3, 1, 2))

    threads, size, batch = torch.get_num_threads(), 0, []
    torch.set_num_threads(1)
    transfer(torch.zeros(1, *preprocess.image_size, 3, dtype=torch.uint8))  # a GPU's first call is slow
    index = data.index
    drawn = np.random.default_rng(0).permutation(len(index))[:images].tolist()
    for row in drawn:
        with timed("read"):
            content = index.read(row)
        with timed("decode"):
            decoded = decode_bytes(content, index.path(row))
        with timed("crop, resize"):
            batch.append(channels_last(data.transform(decoded)))
        if len(batch) == batch_size or row == drawn[-1]:
            with timed("transfer"):
                transfer(default_collate(batch))
            batch = []
        size += len(content)
    torch.set_num_threads(threads)
    return seconds, size / len(drawn)


def time_loader(data: Images, batch_size: int, workers: int, pin: bool) -> float:
    """Images a second, once the workers are busy."""
    stream = TrainStream(len(data.index), batch_size, 0, position=lambda: 0)
    batches = chain.from_iterable(repeat(loader(data, stream, batch_size, workers, pin=pin)))
    for _ in range(2 * workers + 1):  # prefetched before the clock starts
        next(batches)
    start, images = now(), 0
    while now() - start < SECONDS:
        images += len(next(batches)[0])
    return images / (now() - start)


def advice(needed: float, one: float, loaded: float, workers: int, slowest: str) -> str:
    """How many workers suffice, or the remedy where none do, by images/s: the model's, one worker's, all workers'."""
    if needed <= loaded:
        enough = min(workers, max(1, ceil(1.2 * needed / one)))  # a fifth more, for what was not timed
        return f"\nthe model is slower than the loader: --data.num_workers {enough} suffice"
    remedies = {
        "read": "copy the data to a faster disk, or pack it (`vitlit data shard`)",
        "decode": "make smaller copies (`vitlit data shard --short_side 400`), or give each device more cores",
        "crop, resize": "give each device more cores, or --data.image_size fewer pixels",
        "transfer": "larger batches, or fewer pixels",
    }
    if slowest == "decode" and DECODER == "Pillow":
        remedies["decode"] = f"install torchcodec, which decodes {PILLOW_SLOWER} times as fast"
    wait = 1 - loaded / needed
    return f"\nthe model would wait {wait:.0%} of its time, most of it for {slowest}: {remedies[slowest]}"
