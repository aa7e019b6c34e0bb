"""ImageNet-style folders as a LightningDataModule."""

import multiprocessing
import os
import signal
import warnings
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

from vitlit.data.folder import ImageFolder, Index, scan_photos, scan_split, scan_train
from vitlit.data.stream import EvalShard, TrainStream, split_batch
from vitlit.data.transforms import Interpolation, Preprocess, train_transform
from vitlit.errors import UserError


class ImageFolderData(LightningDataModule):
    """Images in class folders: ROOT/{train,val[,test]}/CLASS/*, or ROOT/CLASS/* with a holdout.

    A batch is (images, labels, indices): float (B, C, H, W) normalised on the device, int64 (B,), int64 (B,).

    Args:
        root: the folder.
        image_size: pixels, an int or (height, width).
        batch_size: images of one optimiser step, over all devices.
        micro_batch: the most images that a device takes at a time; gradients are accumulated accordingly.
        holdout: the share of the training images that is cut off for validation, such as 10% or 0.1, by class and
            always the same; then a val folder is left alone.
        crop_scale: the training crop's area as a share of the image's, drawn between these two.
        flip: the probability of a horizontal flip in training.
        crop_ratio: the share of the resized image's side that the central crop of evaluation keeps; 0.875 unless given
            here or by the weights started from.
        interpolation: of resizing, always antialiased; bicubic unless given here or by the weights started from.
        mean: by channel, of images scaled to [0, 1]; 0.5 unless given here or by the weights started from. One number
            makes the images grey.
        std: by channel, likewise.
        num_workers: processes that load images, on each device's behalf; by default one a core, shared among devices.
        prefetch: batches that a worker prepares ahead.
        pin_memory: whether batches are put into pinned memory; by default where there is a GPU.
        seed: of order and augmentation; the command line fills it with seed_everything.
    """

    def __init__(
        self,
        root: str,
        image_size: int | tuple[int, int] = 224,
        batch_size: int = 256,
        micro_batch: int | None = None,
        holdout: float | str = 0.0,
        crop_scale: tuple[float, float] = (0.05, 1.0),
        flip: float = 0.5,
        crop_ratio: float | None = None,
        interpolation: Interpolation | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        num_workers: int | None = None,
        prefetch: int = 2,
        pin_memory: bool | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"data.batch_size {batch_size} is less than 1")
        if num_workers is not None and num_workers < 0:
            raise UserError(f"data.num_workers {num_workers} is less than 0")
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise UserError(f"data.crop_scale {list(crop_scale)} is no range of shares between 0 and 1")
        if not 0 <= flip <= 1:
            raise UserError(f"data.flip {flip} is not a probability")
        if crop_ratio is not None and not 0 < crop_ratio <= 1:
            raise UserError(f"data.crop_ratio {crop_ratio} is not a share above 0 and up to 1")
        self.root = Path(root)
        size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        self.batch_size, self.micro_batch, self.holdout = batch_size, micro_batch, parse_share(holdout)
        self.num_workers, self.prefetch, self.pin_memory = num_workers, prefetch, pin_memory
        self.seed = seed or 0
        given = {
            "crop_ratio": crop_ratio,
            "interpolation": interpolation,
            "mean": mean and tuple(mean),
            "std": std and tuple(std),
        }
        given = {name: value for name, value in given.items() if value is not None}
        self.preprocess = Preprocess(size, **given)  # type: ignore[arg-type]
        self.augment = train_transform(size, crop_scale, flip, self.preprocess.interpolation)
        self.classes: list[str] = []  # those of the weights where they come first, else of the folder
        self.photos: list[Path] = []
        self._train: Index | None = None
        self._held: Index | None = None
        self._splits: dict[str, Index] = {}
        self._entered = 0  # the step that a continued run begins with

    def scan(self) -> None:
        """Find classes and training images, once.

        Raises:
            UserError: the folder is not laid out as it must be.
        """
        if self._train is None:
            classes, self._train, self._held = scan_train(self.root, self.holdout)
            if self.classes and self.classes != classes:
                raise UserError(f"{self.root} has the classes {brief(classes)}, the weights {brief(self.classes)}")
            self.classes = classes

    def split(self, name: str) -> Index:
        """The images of train, val, test or predict.

        Raises:
            UserError: there is no such split.
        """
        if name == "predict":
            if name not in self._splits:
                self._splits[name] = scan_photos(self.photos)
            return self._splits[name]
        if name == "train" or self.holdout or not self.classes:
            self.scan()
        if name == "train":
            assert self._train is not None
            return self._train
        if name == "val" and self._held is not None:
            return self._held
        if name not in self._splits:
            folder = self.root / name
            if not self.root.is_dir():
                raise UserError(f"data.root {self.root} is not a folder; give --data.root a folder of images")
            if not folder.is_dir():
                remedy = "; --data.holdout 10% holds out a part of the training images"
                remedy = remedy if name == "val" else "; `vitlit validate` evaluates on val"
                raise UserError(f"{self.root} has no folder {name}{remedy}")
            index = self._splits[name] = scan_split(folder, self.classes)
            present = set(index.labels.tolist())
            missing = [name for label, name in enumerate(self.classes) if label not in present]
            if missing:
                rank_zero_only(print)(f"{folder} has no image of {len(missing)} classes, {missing[0]!r} among them")
        return self._splits[name]

    def plan(self, world_size: int) -> tuple[int, int]:
        """(images of a device's micro-batch, micro-batches accumulated) for training on so many devices.

        Raises:
            UserError: the batch does not divide, or is larger than the training set.
        """
        micro, accumulate = split_batch(self.batch_size, self.micro_batch, world_size)
        if len(self.split("train")) < self.batch_size:
            raise UserError(
                f"data.batch_size {self.batch_size} is more than the {len(self.split('train'))} training images; "
                "give a smaller --data.batch_size"
            )
        return micro, accumulate

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in the training set."""
        return len(self.split("train")) // self.batch_size

    def check(self, stage: str, world_size: int) -> None:
        """Raise UserError for whatever can be known to be wrong with the data before a stage begins."""
        if stage == "fit":
            self.plan(world_size)
        name = {"fit": "val", "validate": "val"}.get(stage, stage)
        if len(self.split(name)) < world_size:
            raise UserError(
                f"the {name} split has {len(self.split(name))} images, fewer than the {world_size} devices; "
                "give --trainer.devices 1"
            )

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        self.check(TrainerFn(stage).value, self.trainer.world_size)  # Lightning's stage prints as TrainerFn.TESTING
        if stage == "fit":
            self._entered = 0
            _, accumulate = self.plan(self.trainer.world_size)
            if self.trainer.accumulate_grad_batches not in (1, accumulate):
                raise UserError(
                    "trainer.accumulate_grad_batches follows from data.batch_size and data.micro_batch; leave it out"
                )
            self.trainer.accumulate_grad_batches = accumulate
            limit = self.trainer.limit_train_batches
            batches = limit if isinstance(limit, int) else int(limit * accumulate * self.steps_per_epoch)
            if batches % accumulate:
                raise UserError(f"trainer.limit_train_batches must be a multiple of the {accumulate} of a step")
            # Lightning cannot know that the loader starts where the run is.
            warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")

    def train_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        assert trainer is not None
        micro, _ = self.plan(trainer.world_size)
        index = self.split("train")
        stream = TrainStream(
            len(index),
            self.batch_size,
            self.seed,
            # Lightning makes the first iterator, and workers begin, before it restores the global step.
            lambda: max(trainer.global_step, self._entered),
            trainer.global_rank,
            trainer.world_size,
        )
        return self._loader(ImageFolder(index, self.augment, self.seed), stream, micro)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._eval_loader("predict")

    def _eval_loader(self, split: str) -> DataLoader[Any]:
        assert self.trainer is not None
        index = self.split(split)
        shard = EvalShard(len(index), self.trainer.global_rank, self.trainer.world_size)
        share = -(-self.batch_size // self.trainer.world_size)
        return self._loader(
            ImageFolder(index, self.preprocess.crop), shard, min(share, self.micro_batch or share, len(shard))
        )

    def _loader(self, dataset: ImageFolder, sampler: Any, batch_size: int) -> DataLoader[Any]:
        assert self.trainer is not None
        workers = self.num_workers
        if workers is None:
            affinity = getattr(os, "sched_getaffinity", None)  # on Linux alone
            cores = len(affinity(0)) if affinity else os.cpu_count() or 1
            workers = max(1, cores // max(1, self.trainer.num_devices))
        if workers:
            Finalize(None, end_workers, exitpriority=10)
        gpu = self.trainer.strategy.root_device.type == "cuda"
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            pin_memory=gpu if self.pin_memory is None else self.pin_memory,
            prefetch_factor=self.prefetch if workers else None,
            persistent_workers=workers > 0,
            worker_init_fn=leave_signals,
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        images, labels, indices = batch
        assert self.trainer is not None
        dtype = self.trainer.lightning_module.dtype
        assert isinstance(dtype, torch.dtype)
        return self.preprocess.normalise(images, dtype), labels, indices

    def state_dict(self) -> dict[str, int]:
        assert self.trainer is not None
        return {"step": self.trainer.global_step, **self._stream_of()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        assert self.trainer is not None
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        for name, value in self._stream_of().items():
            if state_dict[name] != value:
                raise UserError(
                    f"the checkpoint's run had {name} {state_dict[name]}, this one has {value}: "
                    "it cannot be continued, only started from (model.init_from)"
                )
        self._entered = state_dict["step"]

    def _stream_of(self) -> dict[str, int]:
        """What the order of samples depends on, beside the step."""
        return {"images": len(self.split("train")), "batch_size": self.batch_size, "seed": self.seed}


def leave_signals(worker: int) -> None:
    """Let the main process alone act on signals: one to the process group must not end its data workers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_workers() -> None:
    """Kill data workers before Python's own exit, which would wait for ever for children that ignore SIGTERM."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def brief(names: list[str]) -> str:
    """Class names, the first few of them."""
    return f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''} ({len(names)})"


def parse_share(share: float | str) -> float:
    """0.1 of 10%, 0.1 or '0.1'; UserError where it is no share below 1."""
    text = str(share).strip()
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise UserError(f"data.holdout {share} is not a share such as 10% or 0.1")
    return value
