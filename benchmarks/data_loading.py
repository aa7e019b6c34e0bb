"""Data loaders compared: images per second on one core, and how far vitlit's pixels are from Pillow's.

    python benchmarks/data_loading.py --photos FOLDER --out benchmarks/results/data_loading.json --rounds 20

FOLDER is an image folder of JPEGs with ImageNet's sizes and qualities, FOLDER/{train,val}/CLASS/*; some 600 are enough.
All of them are used for both training and evaluation, from a copy in a temporary folder. The process runs on one core
with one thread, loads without worker processes, and reads from the page cache. In a round every loader goes through one
epoch of whole batches. The loaders take turns of a few batches in random order, so a disturbance affects all of them.
Time is the process's CPU time. Read the ratios, each from one round: seconds vary with the load of the machine.

Training is RandomResizedCrop(224, scale (0.08, 1)), bilinear, and a flip; evaluation is Resize(256), CenterCrop(224).
vitlit's loaders are those of ImageFolderData with a Trainer. torchvision's is its reference pipeline on PIL. timm's is
the workers' part of create_loader; like vitlit, timm normalises on the device. Other loaders are measured if they can
be imported: webdataset (a tar), datasets (Arrow), litdata (chunks), nvidia-dali (on the CPU).
"""

import argparse
import itertools
import os
import random
import shutil
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from runs import write
from timm.data.dataset_factory import create_dataset
from timm.data.loader import create_loader
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.dlpack import from_dlpack
from torchvision import datasets as vision
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.functional import pil_to_tensor, resized_crop

from vitlit.data.module import ImageFolderData
from vitlit.images.crops import RandomResizedCrop
from vitlit.images.decode import DECODER, decode

BATCH, TURN = 32, 3
SIZE, SHORT, SCALE, RATIO = 224, 256, (0.08, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
REFERENCES = ("torchvision", "timm")
Epoch = Callable[[], Iterator[Any]]  # starts an epoch of batches


class Loader(NamedTuple):
    """A loader to measure: its module, and a function of (photos, whether to train) that makes its epochs."""

    name: str
    module: str
    make: Callable[[Path, bool], Epoch]


def pil_transform(train: bool) -> v1.Compose:
    """torchvision's reference pipeline; its output is float32."""
    crop = [v1.RandomResizedCrop(SIZE, SCALE), v1.RandomHorizontalFlip()]
    crop = crop if train else [v1.Resize(SHORT), v1.CenterCrop(SIZE)]
    return v1.Compose([*crop, v1.ToTensor(), v1.Normalize(MEAN, STD)])


def image_folder_data(root: Path) -> ImageFolderData:
    return ImageFolderData(
        str(root), SIZE, BATCH, crop_scale=SCALE, crop_ratio=SIZE / SHORT, interpolation="bilinear", num_workers=0
    )


def give_trainer(data: ImageFolderData) -> Any:
    """What data asks of a Trainer on one device, the CPU, whose step is to be moved on."""
    if DECODER != "torchcodec":
        raise RuntimeError("torchcodec is missing; vitlit would be measured with its slower decoder")
    strategy, stage = SimpleNamespace(root_device=torch.device("cpu")), SimpleNamespace(dtype=torch.float32)
    trainer: Any = SimpleNamespace(world_size=1, global_rank=0, num_devices=1, global_step=0)
    trainer.strategy, trainer.lightning_module = strategy, stage
    data.trainer = trainer
    return trainer


def vitlit_loader(root: Path, train: bool) -> Epoch:
    data = image_folder_data(root)
    trainer = give_trainer(data)
    loader = data.train_dataloader() if train else data.val_dataloader()

    def epoch() -> Iterator[Any]:
        trainer.global_step += data.steps_per_epoch
        return iter(loader)

    return epoch


def torchvision_loader(root: Path, train: bool) -> Epoch:
    data = vision.ImageFolder(str(root / "train"), pil_transform(train))
    loader = DataLoader(data, BATCH, shuffle=train, drop_last=True)
    return lambda: iter(loader)


def timm_loader(root: Path, train: bool) -> Epoch:
    data = create_dataset("", root=str(root), split="train")
    given: dict[str, Any] = {"scale": SCALE, "color_jitter": None, "interpolation": "bilinear"}
    given |= {"crop_pct": SIZE / SHORT, "num_workers": 0, "persistent_workers": False, "device": torch.device("cpu")}
    # The loader inside the prefetcher; the prefetcher itself works on the device.
    loader = create_loader(data, SIZE, BATCH, is_training=train, use_prefetcher=True, **given).loader
    return lambda: iter(loader)


def photos_of(root: Path) -> list[tuple[str, int]]:
    return list(vision.ImageFolder(str(root / "train")).samples)


def webdataset_loader(root: Path, train: bool) -> Epoch:
    peer, tar = import_module("webdataset"), root.with_name("photos.tar")
    if not tar.exists():
        with peer.TarWriter(str(tar)) as writer:
            for row, (path, label) in enumerate(photos_of(root)):
                writer.write({"__key__": f"{row:06d}", "jpg": Path(path).read_bytes(), "cls": label})
    data = peer.WebDataset(str(tar), shardshuffle=False)
    data = (
        (data.shuffle(1000, initial=100) if train else data)
        .decode("pilrgb")
        .to_tuple("jpg", "cls")
        .map_tuple(pil_transform(train))
    )
    loader = peer.WebLoader(data, batch_size=BATCH, num_workers=0)
    return lambda: iter(loader)


def datasets_loader(root: Path, train: bool) -> Epoch:
    peer, table, transform = import_module("datasets"), root.with_name("arrow"), pil_transform(train)
    if not table.exists():
        paths, labels = zip(*photos_of(root), strict=True)
        features = peer.Features(image=peer.Image(), label=peer.Value("int64"))
        images = [{"bytes": Path(path).read_bytes(), "path": None} for path in paths]
        peer.Dataset.from_dict({"image": images, "label": labels}, features).save_to_disk(str(table))
    data = peer.load_from_disk(str(table))
    data.set_transform(lambda rows: {**rows, "image": [transform(image.convert("RGB")) for image in rows["image"]]})
    loader = DataLoader(data, BATCH, shuffle=train, drop_last=True)
    return lambda: (batch["image"] for batch in loader)


def litdata_loader(root: Path, train: bool) -> Epoch:
    peer, chunks = import_module("litdata"), root.with_name("chunks")
    if not chunks.exists():
        writer = import_module("litdata.streaming.writer").BinaryWriter(str(chunks), chunk_bytes="64MB")
        for row, (path, label) in enumerate(photos_of(root)):
            writer[row] = (peer.Jpeg(path=path, max_quality=None), label)
        writer.done()
        writer.merge(1)
    crop = [v2.RandomResizedCrop(SIZE, SCALE), v2.RandomHorizontalFlip()]
    crop = crop if train else [v2.Resize(SHORT), v2.CenterCrop(SIZE)]
    transform = v2.Compose([*crop, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    data = peer.StreamingDataset(str(chunks), shuffle=train, transform=lambda row: (transform(row[0]), row[1]))
    loader = peer.StreamingDataLoader(data, batch_size=BATCH, num_workers=0, drop_last=True)
    return lambda: iter(loader)


def dali_loader(root: Path, train: bool) -> Epoch:
    dali, fn = import_module("nvidia.dali"), import_module("nvidia.dali.fn")

    def photos() -> tuple[Any, Any]:
        files, labels = fn.readers.file(file_root=str(root / "train"), random_shuffle=train)
        if not train:
            return fn.crop(fn.resize(fn.decoders.image(files), resize_shorter=SHORT), crop=(SIZE, SIZE)), labels
        images = fn.decoders.image_random_crop(files, random_area=SCALE, random_aspect_ratio=RATIO)
        return fn.flip(fn.resize(images, size=(SIZE, SIZE)), horizontal=fn.random.coin_flip()), labels

    # If it worked ahead, it would work during the turns of others.
    now = {"exec_dynamic": False, "exec_async": False, "exec_pipelined": False}
    pipe = dali.pipeline_def(photos, batch_size=BATCH, num_threads=1, device_id=None, **now)()
    pipe.build()

    def epoch() -> Iterator[Any]:
        while True:
            yield [from_dlpack(output.as_tensor()) for output in pipe.run()]

    return epoch


LOADERS = (
    Loader("vitlit", "vitlit", vitlit_loader),
    Loader("torchvision", "torchvision", torchvision_loader),
    Loader("timm", "timm", timm_loader),
    Loader("webdataset", "webdataset", webdataset_loader),
    Loader("datasets", "datasets", datasets_loader),
    Loader("litdata", "litdata", litdata_loader),
    Loader("nvidia-dali", "nvidia.dali", dali_loader),
)


def begin(
    doc: str | None, rounds: int, loaders: tuple[Loader, ...]
) -> tuple[argparse.Namespace, list[Loader], dict[str, str], dict[str, str]]:
    """A benchmark's options, and what `importable` finds; the process is now on one core, with one thread."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="the image folder")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--rounds", type=int, default=rounds, help="at least 2")
    given = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found, missing, versions = importable(loaders)
    print(f"missing: {missing}", flush=True)
    return given, found, missing, versions


def importable(loaders: tuple[Loader, ...]) -> tuple[list[Loader], dict[str, str], dict[str, str]]:
    """(loaders that can be imported, errors of the others, versions)."""
    found, missing, versions = [], {}, {name: version(name) for name in ("torch", "torchcodec", "pillow")}
    for loader in loaders:
        try:
            versions[loader.name] = import_module(loader.module).__version__
            found.append(loader)
        except ImportError as error:
            missing[loader.name] = str(error)
    return found, missing, versions | {"python": python_version()}


def output(epoch: Epoch, batches: int) -> str:
    """The dtype and layout of a loader's images. It runs one epoch as a warm-up."""
    batch = deque(itertools.islice(epoch(), batches), maxlen=1)[0]
    images = batch if isinstance(batch, Tensor) else batch[0]
    layout = {(BATCH, 3, SIZE, SIZE): "NCHW", (BATCH, SIZE, SIZE, 3): "NHWC"}[tuple(images.shape)]
    return f"{str(images.dtype).removeprefix('torch.')} {layout}"


def one_round(epochs: dict[str, Epoch], batches: int) -> dict[str, float]:
    """CPU seconds that each loader takes for `batches` batches."""
    iterators = {name: epoch() for name, epoch in epochs.items()}
    spent = dict.fromkeys(epochs, 0.0)
    for done in range(0, batches, TURN):
        for name in random.sample(list(epochs), len(epochs)):
            start = time.process_time()
            for _ in range(min(TURN, batches - done)):
                next(iterators[name])
            spent[name] += time.process_time() - start
    return spent


def summary(
    name: str, rounds: list[dict[str, float]], images: int, references: Iterable[str] = REFERENCES
) -> dict[str, Any]:
    """Median speed of a loader, and its speed over the references': [quartile, median, quartile] of the rounds."""
    micros = statistics.median(spent[name] for spent in rounds) / images * 1e6
    row: dict[str, Any] = {"us_per_image": round(micros), "images_per_s": round(1e6 / micros, 1)}
    for reference in references:
        ratios = [spent[reference] / spent[name] for spent in rounds]
        row[f"x_{reference}"] = [round(cut, 3) for cut in statistics.quantiles(ratios, method="inclusive")]
    return row


def measure(phase: str, loaders: list[Loader], root: Path, batches: int, rounds: int) -> list[dict[str, Any]]:
    """One row per loader."""
    epochs = {loader.name: loader.make(root, phase == "train") for loader in loaders}
    outputs = {name: output(epoch, batches) for name, epoch in epochs.items()}
    spent = [one_round(epochs, batches) for _ in range(rounds)]
    rows = []
    for name, made in outputs.items():
        rows.append({"phase": phase, "name": name, "output": made, **summary(name, spent, batches * BATCH)})
        print(*rows[-1].values(), flush=True)
    return rows


def pillow(path: str) -> Image.Image:
    """An image as Pillow decodes it: upright, RGB, the high byte of 16 bits."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def pixels(data: ImageFolderData) -> dict[str, int]:
    """The largest differences from Pillow over all images, of 255: in evaluation, and in training with the same box."""
    crop = RandomResizedCrop((SIZE, SIZE), SCALE, InterpolationMode.BILINEAR)
    center = v1.Compose([v1.Resize(SHORT), v1.CenterCrop(SIZE)])
    most, side, index = {"train": 0, "eval": 0}, [SIZE, SIZE], data.split("train")
    for path in map(index.path, range(len(index))):
        image, peer = decode(path), pillow(path)
        box = crop.draw(*image.shape[-2:])
        pairs = {"train": (crop.cut(image, box), resized_crop(peer, *box, size=side))}
        pairs["eval"] = (data.preprocess.crop(image), center(peer))
        for phase, (ours, theirs) in pairs.items():
            most[phase] = max(most[phase], int((ours.int() - pil_to_tensor(theirs).int()).abs().max()))
    return {"images": len(index), **most}


def main() -> None:
    given, loaders, missing, versions = begin(__doc__, 20, LOADERS)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "photos"
        for split in ("train", "val"):
            shutil.copytree(given.photos / split, root / "train", dirs_exist_ok=True)
        (root / "val").symlink_to("train")
        data = image_folder_data(root)
        most, batches = pixels(data), data.steps_per_epoch
        print(f"pixels: {most}\nphase, name, output, us/image, images/s, x torchvision, x timm", flush=True)
        for phase in ("train", "eval"):
            rows += measure(phase, loaders, root, batches, given.rounds)
    about = {"rounds": given.rounds, "batch": BATCH, "batches": batches, "missing": missing, "pixels": most}
    write(given.out, (__doc__ or "").splitlines()[0], rows, versions=versions, **about)


if __name__ == "__main__":
    main()
