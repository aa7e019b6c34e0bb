"""Image folders and shards as a LightningDataModule."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from vitlit.data.bad_images import BadImages
from vitlit.data.dataset import Images
from vitlit.data.erasing import Erasing, erase
from vitlit.data.folder import parse_share
from vitlit.data.index import Index
from vitlit.data.mixing import Mixing, soft_targets
from vitlit.data.splits import Splits
from vitlit.data.stream import EvalShare, Sample, TrainStream, eval_batch, global_batch, paired_rows, split_batch
from vitlit.data.trainer import Alone, Ready, set_accumulation
from vitlit.data.transforms import CropName, check_augment, check_scale, train_transform
from vitlit.data.views import Views
from vitlit.data.workers import count, loader
from vitlit.errors import UserError
from vitlit.images.decode import DECODER, PILLOW_SLOWER
from vitlit.images.preprocess import Interpolation, Preprocess
from vitlit.objectives import Batch


class ImageFolderData(LightningDataModule):
    """Images in class folders, ROOT/{train,val[,test]}/CLASS/* or ROOT/CLASS/* with a holdout, or in shards.

    Images in no class folder, ROOT/{train,val}/* or ROOT/* with a holdout, are data without labels.

    A batch is a `vitlit.objectives.Batch`, normalised on the device. Its labels are float (B, classes) shares where
    images have several classes or training mixes them, and -1 where there are none. Without a Trainer the loaders are
    those of one device, and their batches come ready, float32 on the CPU; each iteration over that of training is the
    next epoch.

    Args:
        root: the folder, or the URL of shards.
        manifest: a CSV file with the columns path, label and, unless a holdout is cut, split, in place of class
            folders; paths are relative to root. Several labels are separated by |.
        image_size: pixels, an int or (height, width).
        batch_size: images of one optimiser step, over all devices.
        micro_batch: the most images that a device takes at a time; gradients are accumulated accordingly.
        holdout: the share of the training images that is cut off for validation, such as 10% or 0.1, by class and
            always the same; then a val folder is left alone.
        crop: of training: random_resized is torchvision's, inception TensorFlow's, simple DeiT III's (resize, mirrored
            border), pad CIFAR's (black border), center that of evaluation.
        crop_scale: the area of a random_resized or inception crop as a share of the image's, drawn between these two.
        flip: the probability of a horizontal flip in training.
        augment: further transforms of training images by class_path, of vitlit.data.augment or
            torchvision.transforms.v2.
        views: further views of each training image, for objectives that compare several: a list of count, size and
            scale. The first view is the one that image_size, crop and crop_scale describe.
        erasing: of a part of training images, after normalisation; of the first view alone.
        mixing: mixup and cutmix of training images; not with further views.
        repeats: how often an epoch has each image, augmented anew and in the same batch; it has so many fewer images.
        balanced: draw every class equally often; else every image once.
        on_bad_image: what an image that cannot be read does: error stops; skip trains on another of its class, leaves a
            photo out of predictions, and lists path and reason in the run's bad_images.csv, or beside the
            predictions. Evaluation stops either way, since its numbers would be of other images, and so does a disk
            or server that fails.
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
        manifest: str | None = None,
        crop: CropName = "random_resized",
        crop_scale: tuple[float, float] = (0.05, 1.0),
        flip: float = 0.5,
        augment: Sequence[v2.Transform] | None = None,
        views: Sequence[Views] | None = None,
        erasing: Erasing = Erasing(),
        mixing: Mixing = Mixing(),
        repeats: int = 1,
        balanced: bool = False,
        on_bad_image: Literal["error", "skip"] = "error",
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
        least = {"batch_size": (batch_size, 1), "micro_batch": (micro_batch, 1), "repeats": (repeats, 1)}
        least |= {"num_workers": (num_workers, 0), "prefetch": (prefetch, 1), "seed": (seed, 0)}
        for name, (value, lowest) in least.items():
            if value is not None and value < lowest:
                raise UserError(f"data.{name} {value} is less than {lowest}")
            if value is not None and value >= 2**63:
                raise UserError(f"data.{name} {value} is more than 64 bits hold")
        check_scale("data.crop_scale", crop_scale)
        if not 0 <= flip <= 1:
            raise UserError(f"data.flip {flip} is not a probability")
        if crop_ratio is not None and not 0.1 <= crop_ratio <= 1:  # images are resized to image_size / crop_ratio
            raise UserError(f"data.crop_ratio {crop_ratio} is not a share of 0.1 to 1")
        if views and mixing.on:
            raise UserError(
                "data.mixing works on one view of an image, but data.views adds more; leave one of them out"
            )
        self.splits = Splits(root, parse_share(holdout), manifest)
        size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        self.batch_size, self.micro_batch = batch_size, micro_batch
        self.num_workers, self.prefetch, self.pin_memory = num_workers, prefetch, pin_memory
        self.seed = seed or 0
        given: dict[str, Any] = {"crop_ratio": crop_ratio, "interpolation": interpolation}
        given |= {"mean": mean and tuple(mean), "std": std and tuple(std)}
        self.preprocess = Preprocess(size, **{name: value for name, value in given.items() if value is not None})
        augment = tuple(augment or ())
        self.augment = train_transform(self.preprocess, crop, crop_scale, flip, augment)
        self.views = tuple(views or ())
        self._further = [crop for kind in self.views for crop in kind.transforms(self.preprocess, flip, augment)]
        self.on_bad_image = on_bad_image
        self.erasing, self.mixing, self.repeats, self.balanced = erasing, mixing, repeats, balanced
        self.bad_photos: Path | None = None  # the list of those that prediction skips; in the trainer's root by default
        self._entered = 0  # the step that a continued run begins with
        self._checked: set[tuple[str, int]] = set()  # (stage, devices) that `check` has passed
        self._ended = False  # the trainer is still attached, but has ended

    def split(self, name: str) -> Index:
        """The images of train, val, test or predict.

        Raises:
            UserError: there is no such split, or its layout is wrong.
        """
        return self.splits[name]

    @property
    def classes(self) -> list[str]:
        """Names in the order of their numbers; empty before they are known."""
        return self.splits.classes

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several classes."""
        return self.splits.multi_label

    @property
    def class_counts(self) -> list[int]:
        """Training images of each class."""
        return self.splits.class_counts

    @property
    def num_views(self) -> int:
        """Views of a training image."""
        return 1 + len(self._further)

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
        if self.mixing.on and micro % 2:
            raise UserError(
                f"data.mixing mixes pairs, but a device takes {micro} images at a time; give an even "
                "--data.micro_batch or --data.batch_size"
            )
        if self.balanced and (self.multi_label or not self.classes):
            has = "several" if self.multi_label else "none"
            raise UserError(f"data.balanced needs one label an image, but the data has {has}; leave it out")
        paired_rows(self.batch_size, self.repeats)
        return micro, accumulate

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in the training set."""
        return len(self.split("train")) // self.batch_size

    def samples(self, step: int) -> list[Sample]:
        """The global batch of an optimiser step, in order."""
        return global_batch(self._stream(lambda: step))

    def check(self, stage: str, world_size: int) -> None:
        """Refuse data that does not fit a stage; once for the same stage.

        Args:
            stage: fit, validate, test or predict.
            world_size: the number of devices.

        Raises:
            UserError: the data is too small, does not divide, or has no such split.
        """
        if (stage, world_size) in self._checked:
            return
        if stage == "fit":
            self.plan(world_size)
            for size in dict.fromkeys([self.preprocess.image_size, *(kind.pixels for kind in self.views)]):
                check_augment(self.augment.augment, size)
        name = {"fit": "val", "validate": "val"}.get(stage, stage)
        if not len(self.split(name)):
            raise UserError(f"the {name} split has no image; hold out more, or none (--data.holdout)")
        if len(self.split(name)) < world_size:
            raise UserError(
                f"the {name} split has {len(self.split(name))} images, fewer than the {world_size} devices; "
                "give --trainer.devices 1"
            )
        self._checked.add((stage, world_size))

    def setup(self, stage: str) -> None:
        self._ended = False
        self.check(TrainerFn(stage).value, self._place.world_size)  # Lightning's stage prints as TrainerFn.TESTING
        if DECODER == "Pillow":
            rank_zero_only(print)(
                f"torchcodec is missing, so Pillow decodes: the same pixels in {PILLOW_SLOWER} times the time"
            )
        if stage == "fit" and self.trainer is not None:
            self._entered = 0
            set_accumulation(self.trainer, self.plan(self.trainer.world_size)[1], self.steps_per_epoch)

    def teardown(self, stage: str) -> None:
        self._ended = True

    @property
    def _place(self) -> Any:
        """The trainer while it runs, which says where this process stands; else one of the same attributes."""
        return Alone if self.trainer is None or self._ended else self.trainer

    def train_dataloader(self) -> DataLoader[Any] | Ready:
        place, index = self._place, self.split("train")
        micro, _ = self.plan(place.world_size)
        epochs = itertools.count(0, self.steps_per_epoch)

        def position() -> int:
            # Lightning makes the first iterator, and workers begin, before it restores the global step.
            return next(epochs) if place is Alone else max(place.global_step, self._entered)

        stream = self._stream(position, place.global_rank, place.world_size)
        images = Images(index, self.augment, self.seed, self._bad_images(index), self._further)
        return self._loader(images, stream, micro)

    def _stream(self, position: Callable[[], int], rank: int = 0, world_size: int = 1) -> TrainStream:
        index = self.split("train")
        labels = index.labels if self.balanced else None
        return TrainStream(len(index), self.batch_size, self.seed, position, rank, world_size, self.repeats, labels)

    def val_dataloader(self) -> DataLoader[Any] | Ready:
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Any] | Ready:
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Any] | Ready:
        return self._eval_loader("predict")

    def _eval_loader(self, split: str) -> DataLoader[Any] | Ready:
        place, index = self._place, self.split(split)
        share = EvalShare(len(index), place.global_rank, place.world_size)
        most = -(-self.batch_size // place.world_size)
        batch = eval_batch(len(index), place.world_size, min(most, self.micro_batch or most, len(index)))
        photos = split == "predict"
        bad = self._bad_images(index, "photos") if photos else None
        images = Images(index, self.preprocess.crop, bad=bad, photos=photos)
        return self._loader(images, share, batch)

    def _bad_images(self, index: Index, kind: str = "images") -> BadImages | None:
        if self.on_bad_image == "error":
            return None
        file = self.bad_photos if kind == "photos" else None
        return BadImages(file or Path(self._place.default_root_dir) / f"bad_{kind}.csv", len(index))

    def _loader(self, dataset: Images, sampler: Any, batch_size: int) -> DataLoader[Any] | Ready:
        place = self._place
        workers = count(place.num_devices) if self.num_workers is None else self.num_workers
        pin = place.strategy.root_device.type == "cuda" if self.pin_memory is None else self.pin_memory
        batches = loader(dataset, sampler, batch_size, workers, self.prefetch, pin)
        return Ready(batches, self) if place is Alone else batches

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels, indices, *training = batch
        if training:  # the first sample's position is kept on the host: to read it on the device would wait
            training[0] = int(training[0][0])
        return [images, labels, indices, *training]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        images, labels, indices, *training = batch
        dtype = self._place.lightning_module.dtype
        views = [self.preprocess.normalise(view.permute(0, 3, 1, 2), dtype) for view in (images, *training[1:])]
        if training:
            views[0], labels = self._regularise(views[0], labels, training[0])
        return Batch(views, labels, indices)

    def _regularise(self, images: Tensor, labels: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Erase and mix training images, from a position of the stream on, by what is drawn for their step and rows."""
        step, first = divmod(position, self.batch_size)
        rows = range(first, first + len(images))
        if self.erasing.prob:
            images = erase(images, self.erasing, self.seed, step, rows)
        if self.mixing.on:
            images, labels = self.mixing(images, soft_targets(labels, len(self.classes)), self.seed, step)
        return images, labels

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {"step": self.trainer.global_step, **self._stream_of()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self.trainer is not None
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        before = {"repeats": 1, "balanced": False, **state_dict}  # as it was before there were such
        for name, value in self._stream_of().items():
            had = before.get(name, value)
            if had == value:
                continue
            same = "restore the data" if name in ("images", "names") else f"give --data.{name} {had}"
            what = "images of other names or labels" if name == "names" else f"{name} {had}, this one has {value}"
            raise UserError(
                f"the checkpoint's run had {what}: {same} to continue it, or begin another from its weights with "
                "--model.init_from RUN --run.name NEW"
            )
        self._entered = state_dict["step"]

    def _stream_of(self) -> dict[str, Any]:
        """What the order of samples depends on, beside the step, and which images they are."""
        index = self.split("train")
        given = {"images": len(index), "batch_size": self.batch_size, "seed": self.seed}
        return {**given, "repeats": self.repeats, "balanced": self.balanced, "names": index.digest()}
