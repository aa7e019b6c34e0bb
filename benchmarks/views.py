"""Loaders of two large and six small views an image (DINO's) compared: images per second on one core, all in.

    python benchmarks/views.py --photos FOLDER --out benchmarks/results/views.json --rounds 10

FOLDER is an image folder of JPEGs with ImageNet's sizes and qualities, FOLDER/{train,val}/CLASS/*; FOLDER/train is
loaded. It takes `pip install lightly stable-pretraining`, or what of these is to be compared; both also go into a
folder of their own (pip install --target), which PYTHONPATH then names. The process runs on one core with one thread,
without worker processes, and reads from the page cache. A batch is finished: decoded, cropped, its colours changed,
float32, normalised. With vitlit the last three are the device's work, here the CPU's. In a round every loader goes
through one epoch. They take turns of a few batches in random order. Time is the process's CPU time. Read the ratios.

lightly's is DINOTransform with its defaults, stable-pretraining's the transform of its benchmark of DINO
(benchmarks/imagenet100/dino-vit-tiny.py), on torchvision's ImageFolder. All have the probabilities of DINO's code and
the same strengths; stable-pretraining resizes bilinearly, the others bicubically.
The last row is vitlit's loader with the same crops and no colours.
"""

from collections import deque
from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from data_loading import BATCH, Epoch, Loader, begin, give_trainer, one_round, summary
from runs import write
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from vitlit.data.module import ImageFolderData
from vitlit.data.views import Views

GLOBAL, LOCAL = (0.4, 1.0), (0.05, 0.4)
VIEWS = [(3, 224, 224)] * 2 + [(3, 96, 96)] * 6
REFERENCES = ("lightly", "stable-pretraining")


def vitlit_loader(root: Path, colours: bool) -> Epoch:
    plain = [Views(1, 224, GLOBAL), Views(6, 96, LOCAL)]
    views: dict[str, Any] = {"views": "dino", "local_views": 6} if colours else {"views": plain, "crop_scale": GLOBAL}
    data = ImageFolderData(str(root), 224, BATCH, num_workers=0, **views)
    trainer = give_trainer(data)
    loader = data.train_dataloader()

    def epoch() -> Iterator[Any]:
        trainer.global_step += data.steps_per_epoch
        return (data.on_after_batch_transfer(batch, 0).views for batch in loader)

    return epoch


def lightly_loader(root: Path, _: bool) -> Epoch:
    transform = import_module("lightly.transforms").DINOTransform()
    loader = DataLoader(ImageFolder(str(root / "train"), transform), BATCH, shuffle=True, drop_last=True)
    return lambda: (views for views, _ in loader)


def stable_pretraining_loader(root: Path, _: bool) -> Epoch:
    peer, static = import_module("stable_pretraining.data.transforms"), import_module("stable_pretraining.data").static

    def view(size: int, scale: tuple[float, float], blur: float, solarise: float) -> Any:
        return peer.Compose(
            peer.RGB(),
            peer.RandomResizedCrop((size, size), scale=scale),
            peer.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8),
            peer.RandomGrayscale(p=0.2),
            peer.PILGaussianBlur(p=blur),
            *([peer.RandomSolarize(threshold=0.5, p=solarise)] if solarise else []),
            peer.RandomHorizontalFlip(p=0.5),
            peer.ToImage(**static.ImageNet),
        )

    local = [view(96, LOCAL, 0.5, 0.0) for _ in range(6)]
    transform = peer.MultiViewTransform([view(224, GLOBAL, 1.0, 0.0), view(224, GLOBAL, 0.1, 0.2), *local])
    photos = import_module("stable_pretraining.data").FromTorchDataset(
        ImageFolder(str(root / "train")), names=["image", "label"], transform=transform
    )
    loader = DataLoader(photos, BATCH, shuffle=True, drop_last=True)
    return lambda: ([view["image"] for view in batch["views"]] for batch in loader)


LOADERS = (
    Loader("vitlit", "vitlit", vitlit_loader),
    Loader("lightly", "lightly", lightly_loader),
    Loader("stable-pretraining", "stable_pretraining", stable_pretraining_loader),
)


def check(name: str, epoch: Epoch, batches: int) -> None:
    """The views of a loader's last batch are what is compared. It runs one epoch as a warm-up."""
    views = deque(islice(epoch(), batches), maxlen=1)[0]
    made = [tuple(view.shape) for view in views]
    assert made == [(BATCH, *shape) for shape in VIEWS], (name, made)
    assert all(view.dtype == torch.float32 and abs(view.mean()) < 2 for view in views), name


def main() -> None:
    given, loaders, missing, versions = begin(__doc__, 10, LOADERS)
    epochs = {loader.name: loader.make(given.photos, True) for loader in loaders}
    epochs["vitlit, crops alone"] = vitlit_loader(given.photos, False)
    batches = len(ImageFolder(str(given.photos / "train"))) // BATCH
    for name, epoch in epochs.items():
        check(name, epoch, batches)
    rounds = [one_round(epochs, batches) for _ in range(given.rounds)]
    references = [name for name in REFERENCES if name in epochs]
    rows = [{"name": name, **summary(name, rounds, batches * BATCH, references)} for name in epochs]
    print(*rows, sep="\n", flush=True)
    about = {"rounds": given.rounds, "batch": BATCH, "batches": batches, "missing": missing}
    write(given.out, (__doc__ or "").splitlines()[0], rows, versions=versions, **about)


if __name__ == "__main__":
    main()
