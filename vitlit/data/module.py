"""Image folders and shards as a LightningDataModule."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from vitlit.data import workers
from vitlit.data.bad_images import BadImages
from vitlit.data.dataset import Images, ImagesOnDevice
from vitlit.data.decoded import Cache, Decoded, decode_once
from vitlit.data.erasing import Erasing, erase
from vitlit.data.folder import parse_share
from vitlit.data.index import Index
from vitlit.data.mixing import Mixing, soft_targets
from vitlit.data.splits import Splits
from vitlit.data.standalone import BatchLoader, NoTrainer
from vitlit.data.stream import EvalShare, Sample, TrainStream, eval_batch, paired_rows, set_accumulation, split_batch
from vitlit.data.transforms import PIXELS, CropName, check_augment, check_scale, matched, train_transform
from vitlit.data.views import Photometric, Preset, Views, all_views, change_colours, check_raw
from vitlit.errors import UserError, check_range, check_types
from vitlit.images.decode import DECODER, PILLOW_SLOWER
from vitlit.images.preprocess import Interpolation, Preprocess
from vitlit.model import ViT
from vitlit.objectives import Batch
from vitlit.seeds import global_seed, row_draws

Loader = DataLoader[Any] | BatchLoader


class ImageFolderData(LightningDataModule):
    """Images in class folders, ROOT/{train,val[,test]}/CLASS/* or ROOT/CLASS/* with a holdout, or in shards.

    Images outside of class folders, ROOT/{train,val}/* or ROOT/* with a holdout, are data without labels. A batch is a
    `vitlit.objectives.Batch`, normalised on the device. Its labels are float (B, classes) if images have several
    classes or training mixes them, and -1 without labels. Without a Trainer the loaders serve one device and yield
    finished batches, float32 on the CPU; each iteration over the training loader is the next epoch.

    Args:
        root: the folder, the URL of shards, or hf:OWNER/NAME, a data set of Hugging Face.
        manifest: a CSV file instead of class folders: path (from root), label (several by |) and, if no holdout, split.
        labels: whether a manifest's labels are classes, or numbers to regress; by default numbers if any is a fraction.
            The command line fills it from the objective.
        image_size: pixels, an int or (height, width).
        batch_size: images of one optimiser step, over all devices.
        micro_batch: the most images a device takes at a time; gradients are accumulated accordingly.
        holdout: share of the training images, 10% or 0.1, that replaces val: by class, the same in every run.
        crop: in training: random_resized (torchvision's), inception (TensorFlow's), simple (DeiT III's), pad (CIFAR's),
            resmall (big_vision's for transfer: evaluation's resize, cropped anywhere) or center (evaluation's).
        crop_scale: the range of the area of a random_resized or inception crop, as a share of the image's.
        flip: the probability of a horizontal flip in training.
        augment: further transforms of training images, from vitlit.data.augment or torchvision.transforms.v2; one or
            several.
        photometric: colour jitter, grey, blur and solarise of training images, on the device; of the first view only.
        views: further views of a training image: a list of count, size, scale and what is photometric; image_size and
            crop are the first's. Or all views of a method, whose crop_scale may be given.
        local_views: how many small views a method has; by default dino and dinov2 8, lejepa 6.
        erasing: random erasing of training images, after normalisation; of the first view only.
        mixing: mixup and cutmix of training images; not with further views.
        repeats: how often an image comes in a batch, augmented anew; an epoch keeps its length, so has fewer images.
        balanced: draw every class equally often, instead of every image once.
        on_bad_image: error stops at an image that cannot be read; skip trains on another of the same class, leaves a
            photo out of predictions, and lists path and reason in the run's bad_images.csv, or next to the predictions.
            Evaluation always stops, and so does a disk or server that fails.
        crop_ratio: the share of a side that evaluation's central crop keeps; 0.875 unless given here or by the weights.
        squash: evaluation resizes to the model's aspect whatever the image's; by default as the weights, else false.
        interpolation: for resizing, always antialiased; bicubic unless given here or by the starting weights.
        mean: by channel, of images in [0, 1]; 0.5 unless given here or by the weights. One number: grey images.
        std: by channel, likewise.
        ground: the colour under transparency, a CSS name or '#rrggbb'; white unless given here or by the weights.
        range: the values of black and white, for images of 1 to 16 channels, of 8, 16 or 32 bits, as they are; needs
            mean and std, a number for each channel. Without it, or the weights', every image is RGB of 8 bits.
        num_workers: processes that load images for each device; by default the cores are shared among the devices.
        prefetch: batches that a worker prepares ahead.
        cache: keep decoded images, if they fit: in memory, once for all processes of a machine, or on the device, which
            then makes the batches without workers, but cannot run `augment`.
        pin_memory: whether batches are put into pinned memory; by default if there is a GPU.
        seed: for order and augmentation; by default what seed_everything was given, or 0.

    Raises:
        UserError: a value is out of range, or views are to be mixed.
    """

    def __init__(
        self,
        root: str,
        image_size: int | tuple[int, int] = 224,
        batch_size: int = 256,
        micro_batch: int | None = None,
        holdout: float | str = 0.0,
        manifest: str | None = None,
        labels: Literal["classes", "numbers"] | None = None,
        crop: CropName = "random_resized",
        crop_scale: tuple[float, float] = (0.05, 1.0),
        flip: float = 0.5,
        augment: v2.Transform | Sequence[v2.Transform] | None = None,
        photometric: Photometric = Photometric(),
        views: Sequence[Views] | Preset | None = None,
        local_views: int | None = None,
        erasing: Erasing = Erasing(),
        mixing: Mixing = Mixing(),
        repeats: int = 1,
        balanced: bool = False,
        on_bad_image: Literal["error", "skip"] = "error",
        crop_ratio: float | None = None,
        squash: bool | None = None,
        interpolation: Interpolation | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        ground: str | None = None,
        range: tuple[float, float] | None = None,
        num_workers: int | None = None,
        prefetch: int = 2,
        cache: Cache = "none",
        pin_memory: bool | None = None,
        seed: int | None = None,
    ) -> None:
        views = views if isinstance(views, str) else [Views(**v) if isinstance(v, dict) else v for v in views or ()]
        # `augment` may be any callable.
        check_types(ImageFolderData.__init__, {n: value for n, value in locals().items() if n != "augment"}, "data.")
        super().__init__()
        check_range("data", 1, batch_size=batch_size, micro_batch=micro_batch, repeats=repeats, prefetch=prefetch)
        check_range("data", 0, num_workers=num_workers, local_views=local_views)
        check_range("data", 0, 2**63 - 1, seed=seed)
        check_scale("data.crop_scale", crop_scale)
        if views and mixing.on:
            raise UserError("data.mixing works on one view of an image, but data.views adds more; leave one out")
        self.splits = Splits(root, parse_share(holdout), manifest, labels)
        given: dict[str, Any] = {"crop_ratio": crop_ratio, "squash": squash, "interpolation": interpolation}
        given |= {"mean": mean and tuple(mean), "std": std and tuple(std), "ground": ground}
        given["range"] = range and (float(range[0]), float(range[1]))
        self._given = {name: value for name, value in given.items() if value is not None}
        self._train_options = crop, flip, (augment,) if callable(augment) else tuple(augment or ())
        self._view_options = Views(1, image_size, crop_scale, **vars(photometric)), views, local_views
        self.on_bad_image, self.cache = on_bad_image, cache
        self._use(Preprocess(self._view_options[0].pixels, **self._given))
        self.batch_size, self.micro_batch, self._seed = batch_size, micro_batch, seed
        self.num_workers, self.prefetch, self.pin_memory = num_workers, prefetch, pin_memory
        self.erasing, self.mixing, self.repeats, self.balanced = erasing, mixing, repeats, balanced
        self.bad_photos: Path | None = None  # lists photos that prediction skips; bad_photos.csv of the trainer's root
        self._trainer_done = False  # Lightning leaves it attached

    def _use(self, preprocess: Preprocess, patch: int = 1) -> None:
        self.preprocess = preprocess
        self._kept: dict[str, Decoded] = {}  # decoded over another ground, perhaps
        first, *self.views = self.kinds = all_views(*self._view_options, patch)
        crop, flip, augment = self._train_options
        self.transform = train_transform(preprocess, crop, first.scale, flip, augment)
        self._further = [kind.transform(preprocess, flip, augment) for kind in self.views]
        check_raw(preprocess, self._given, self.kinds, self.cache)

    def follow(self, vit: ViT, source: object = "the ViT", fixed: Iterable[str] = PIXELS) -> None:
        """Take what a ViT's weights were made with: mean, std, interpolation, crop ratio, and the classes of its head.

        Raises:
            UserError: other classes, or another value of what is `fixed`, was given. `source` is where the weights are.
        """
        self._use(matched(self._given, self.preprocess.image_size, vit, source, fixed), vit.patch_size)
        self.splits.expect(vit.classes)

    def split(self, name: str) -> Index:
        """The images of train, val, test or predict; UserError if there is no such split, or its layout is wrong."""
        return self.splits[name]

    @property
    def classes(self) -> list[str]:
        """Names in the order of their numbers; empty before they are known."""
        return self.splits.classes

    @property
    def multi_label(self) -> bool:
        return self.splits.multi_label

    @property
    def numbers(self) -> bool:
        """Whether labels are numbers, not classes."""
        return self.splits.numbers

    @property
    def seed(self) -> int:
        return global_seed() if self._seed is None else self._seed

    @property
    def class_counts(self) -> list[int]:
        """Training images of each class."""
        return self.splits.class_counts

    @property
    def num_views(self) -> int:
        return len(self.kinds)

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in the training set."""
        return len(self.split("train")) // self.batch_size

    @property
    def epoch(self) -> str:
        """The steps of an epoch under the Trainer, with what it leaves out, in words."""
        steps, limit = self.steps_per_epoch, self._active_trainer.limit_train_batches
        most = limit // self._active_trainer.accumulate_grad_batches if isinstance(limit, int) else int(limit * steps)
        if most < steps:
            return f"{most:,} steps an epoch, of the {steps:,} that the images fill, by trainer.limit_train_batches"
        left = 0 if self.balanced else len(self.split("train")) - steps * self.batch_size // self.repeats
        return f"{steps:,} steps an epoch" + (f", each time without {left:,} other images" if left else "")

    def plan(self, world_size: int) -> tuple[int, int]:
        """(images of a device's micro-batch, micro-batches accumulated); UserError if the batch does not allow it."""
        micro, accumulate = split_batch(self.batch_size, self.micro_batch, world_size)
        images = len(self.split("train"))
        if images < self.batch_size:
            raise UserError(f"data.batch_size {self.batch_size} is more than the {images} training images; give less")
        if self.mixing.on and micro % 2:
            odd = f"a device takes {micro} images at a time"
            raise UserError(f"data.mixing mixes pairs, but {odd}; give an even --data.micro_batch or --data.batch_size")
        if self.balanced and (self.multi_label or not self.classes):
            has = "several" if self.multi_label else "none"
            raise UserError(f"data.balanced needs one label an image, but the data has {has}; leave it out")
        paired_rows(self.batch_size, self.repeats)
        return micro, accumulate

    def samples(self, step: int) -> list[Sample]:
        """The global batch of an optimiser step, in order."""
        return list(islice(self._stream(lambda: step), self.batch_size))

    def check(self, stage: str, world_size: int) -> None:
        """Refuse data that does not fit a stage (fit, validate, test or predict) or a split on so many devices."""
        if stage == "fit":
            self.plan(world_size)
            if self.cache == "device" and self.transform.augment:
                raise UserError("data.cache device makes batches without data.augment; give memory, or leave it out")
            for size in {self.preprocess.image_size, *(kind.pixels for kind in self.views)}:
                check_augment(self.transform.augment, self.preprocess, size)
        name = "val" if stage in ("fit", "validate") else stage
        if len(self.split(name)) < world_size:
            has = f"needs an image for each device, but has {len(self.split(name))} for {world_size}"
            raise UserError(f"the {name} split {has}; raise --data.holdout, or lower --trainer.devices")

    def setup(self, stage: str) -> None:
        self._trainer_done = False
        vit = getattr(self._active_trainer.lightning_module, "vit", None)
        self.splits.expect(getattr(vit, "classes", []))  # a folder to evaluate on may lack the training images
        if stage == "fit" or self.trainer is None:  # a Trainer may evaluate on other loaders than these
            # TrainerFn turns Lightning's stage, which prints as TrainerFn.TESTING, into its name.
            self.check(TrainerFn(stage).value, self._active_trainer.world_size)
        if DECODER == "Pillow":
            rank_zero_only(print)(f"torchcodec is missing, so Pillow decodes, in {PILLOW_SLOWER} times the time")
        if stage == "fit" and self.trainer is not None:
            set_accumulation(self.trainer, self.plan(self.trainer.world_size)[1], self.steps_per_epoch)

    def teardown(self, stage: str) -> None:
        self._trainer_done = True
        self._kept.clear()

    @property
    def _active_trainer(self) -> Any:
        return NoTrainer if self.trainer is None or self._trainer_done else self.trainer

    def train_dataloader(self) -> Loader:
        trainer, index = self._active_trainer, self.split("train")
        micro, _ = self.plan(trainer.world_size)
        starts = count(0, self.steps_per_epoch)  # of epochs
        position = partial(next, starts) if trainer is NoTrainer else lambda: int(trainer.global_step)
        stream = self._stream(position, trainer.global_rank, trainer.world_size)
        keyed, bad = any(kind.on for kind in self.kinds), self._bad_images(index)
        images = Images(index, self.transform, self.seed, bad, self._further, keyed, self.preprocess)
        return self._loader(images, stream, micro, "train")

    def _stream(self, position: Callable[[], int], rank: int = 0, world_size: int = 1) -> TrainStream:
        index = self.split("train")
        labels = index.labels if self.balanced else None
        return TrainStream(len(index), self.batch_size, self.seed, position, rank, world_size, self.repeats, labels)

    def val_dataloader(self) -> Loader:
        return self.eval_loader("val")

    def test_dataloader(self) -> Loader:
        return self.eval_loader("test")

    def predict_dataloader(self) -> Loader:
        return self.eval_loader("predict")

    def eval_loader(self, split: str, most: int | None = None) -> Loader:
        """A split's images as evaluation sees them, all or so many; of train, an unreadable one has the index -1."""
        trainer, index, photos = self._active_trainer, self.split(split), split == "predict"
        self.check(split, trainer.world_size)
        share = EvalShare(len(index), trainer.global_rank, trainer.world_size, most)
        size = min(-(-self.batch_size // trainer.world_size), self.micro_batch or self.batch_size, share.count)
        bad = self._bad_images(index, photos) if photos or split == "train" else None
        images = Images(index, self.preprocess.crop, bad=bad, preprocess=self.preprocess)
        return self._loader(images, share, eval_batch(share.count, trainer.world_size, size), split)

    def _bad_images(self, index: Index, photos: bool = False) -> BadImages | None:
        if self.on_bad_image == "error":
            return None
        file = Path(self._active_trainer.default_root_dir) / ("bad_photos.csv" if photos else "bad_images.csv")
        return BadImages((self.bad_photos if photos else None) or file, len(index))

    def _loader(self, images: Any, sampler: Any, batch_size: int, split: str) -> Loader:
        trainer = self._active_trainer
        processes = workers.count(trainer.num_devices) if self.num_workers is None else self.num_workers
        pin = trainer.strategy.root_device.type == "cuda" if self.pin_memory is None else self.pin_memory
        if self.cache != "none" and (trainer is NoTrainer or trainer.state.fn == TrainerFn.FITTING):  # else read once
            kept = self._kept.get(split) or decode_once(images, processes, self.cache, trainer)
            images.kept = self._kept[split] = kept
            if self.cache == "device":
                images, processes, pin = ImagesOnDevice(images, images.kept), 0, False
        batches = workers.loader(images, sampler, batch_size, processes, self.prefetch, pin)
        batches.to = trainer.strategy.root_device
        return BatchLoader(batches, self) if trainer is NoTrainer else batches

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        images, labels, indices, *training = batch
        dtype = self._active_trainer.lightning_module.dtype
        views = [view.permute(0, 3, 1, 2) for view in (images, *training[1 : self.num_views])]
        views = change_colours(views, self.kinds, *training[self.num_views :])
        views = [self.preprocess.normalise(view, dtype) for view in views]
        if not training:
            return Batch(views, labels, indices, indices)
        step, row = divmod(training[0], self.batch_size)
        rows = range(row, row + len(indices))
        if self.erasing.prob:
            views[0] = erase(views[0], self.erasing, self.seed, step, rows)
        if self.mixing.on:
            views[0], labels = self.mixing(views[0], soft_targets(labels, len(self.classes)), self.seed, step)
        return Batch(views, labels, indices, row_draws(self.seed, step, rows, indices.device))

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {"step": self.trainer.global_step, **self._order_settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self.trainer is not None
        if self.trainer.state.fn == TrainerFn.FITTING:
            TrainStream.check(state_dict, self._order_settings())

    def _order_settings(self) -> dict[str, Any]:
        """What the order of samples depends on besides the step, and which images they are."""
        index = self.split("train")
        settings = {"images": len(index), "batch_size": self.batch_size, "seed": self.seed}
        return {**settings, "repeats": self.repeats, "balanced": self.balanced, "names": index.digest()}
