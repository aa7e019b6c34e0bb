"""What features are worth while a ViT learns, and alarms that stop a training which has collapsed."""

from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from vitlit.callbacks import predictions
from vitlit.data.stream import eval_batch, spread
from vitlit.errors import UserError, check_range
from vitlit.evaluation.knn import nearest, normalised
from vitlit.evaluation.rank import deviation, effective_rank
from vitlit.objectives import Batch
from vitlit.objectives.global_batch import device_mean, gather
from vitlit.stages.stage import logs_now, on_device, step_ends

LEARNING_RATE = 1e-3  # of the linear layer
ROWS = 2048  # of a batch, for its rank
GRACE, SHARE = 100, 0.05  # steps, and the share of a training, in which features may shrink before they grow
LEAST = 0.08  # of the most space that features took: small healthy trainings keep 0.15, a hundredfold lr leaves 0.06


class Probes(Callback):
    """Measure the features of a ViT while it learns, and stop a training that has collapsed.

    Features are those of the weights that go on: a moving teacher's, and in validation an EMA's. train/rank is their
    effective rank (RankMe, 2210.02885) in a step's batch, at most its size and the ViT's width, and train/deviation how
    far they point apart (2011.10566, section 4.1), from 0 to about 1. Where images have one of several classes each,
    val/knn is the accuracy of `vitlit.evaluation.knn` with training images that look as in validation (with plain
    loaders, as their dataset gives them), and val/probe that of a linear layer, which learns from each batch with Adam.
    Neither counts images with a label of -1, which have no class.

    Args:
        bank: how many training images, spread over the folder, val/knn compares with; 0 leaves it out.
        every: val/knn is measured in the first of so many epochs, and in the last one.
        classes: how many there are; by default the data module's. 0 leaves val/knn and val/probe out.
        alarms: whether a collapse stops a training that learns without labels.

    Raises:
        UserError: an option is out of range, or the data has other classes. In training: a label is not one of the
            classes; or it has collapsed: what has, and what to try.
    """

    def __init__(self, bank: int = 10_000, every: int = 1, classes: int | None = None, alarms: bool = True) -> None:
        check_range("Probes", 0, bank=bank, classes=classes or 0)
        check_range("Probes", 1, every=every)
        self.bank, self.every, self.classes, self.alarms = bank, every, classes, alarms

    def measures(self, data: Any) -> dict[str, str]:
        """What validation on a data module will log, and which value of it is best, min or max."""
        names = ["val/knn", "val/probe"] if self.bank else ["val/probe"]
        return dict.fromkeys(names, "max") if self._count(data) else {}

    def _count(self, data: Any) -> int | None:
        """The number of classes if every image has one of at least two, else 0; None if unknown."""
        one_each = not (getattr(data, "multi_label", False) or getattr(data, "numbers", False))
        names = getattr(data, "classes", None)
        found = len(names) * one_each if isinstance(names, list | tuple) else self.classes
        if self.classes and self.classes != found:
            raise UserError(f"Probes' classes is {self.classes}, but the data has {found or 'none'}; leave it out")
        return 0 if found == 1 or self.classes == 0 else found

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._layer: Any = None  # of val/probe
        self._batches: list[tuple[Tensor, Tensor]] = []  # features and labels of the step's micro-batches
        self._numbers: dict[str, float] = {}  # the most space, and the latest val/knn and val/probe
        self._probes: dict[str, Any] = {}  # in a validation: features -> classes, and how often they are right
        if stage == "fit" and (count := self._count(trainer.datamodule)):
            device, width = trainer.strategy.root_device, pl_module.vit.width
            self._highest = torch.zeros((), device=device)  # label yet, read when losses are logged
            linear = nn.utils.skip_init(nn.Linear, width, count, device=device, dtype=torch.float32)  # draws nothing
            self._layer = nn.Sequential(nn.LayerNorm(width, elementwise_affine=False), linear)
            self._optimizer = torch.optim.Adam(map(nn.init.zeros_, linear.parameters()), LEARNING_RATE)

    def state_dict(self) -> dict[str, Any]:
        of_layer = [self._layer.state_dict(), self._optimizer.state_dict()] if self._layer else []
        return {"numbers": self._numbers, "layer": of_layer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._numbers = state_dict["numbers"]
        if self._layer:
            for part, state in zip((self._layer, self._optimizer), state_dict["layer"], strict=False):
                part.load_state_dict(state)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if "knn" in self._numbers:  # best.ckpt waits for it, and a continued epoch may not measure it
            trainer.callback_metrics["val/knn"] = torch.tensor(self._numbers["knn"])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.step_features is not None:
            self._batches.append((pl_module.step_features, Batch.of(batch).labels))
        if not self._batches or not step_ends(trainer, batch_idx):
            return
        parts, self._batches = self._batches, []
        if self._layer:
            self._learn(*map(torch.cat, zip(*parts, strict=True)))
        if logs_now(trainer) or "space" not in self._numbers:
            self._look(trainer, pl_module, gather(torch.cat([features for features, _ in parts]).float())[:ROWS])

    def _learn(self, features: Tensor, labels: Tensor) -> None:
        """A step of the linear layer, the same on all devices, on classes (B,), -1 for none, or shares of classes."""
        logits, numbers = self._layer(features.float()), labels.argmax(1) if labels.ndim > 1 else labels
        self._highest = torch.maximum(self._highest, numbers.max())
        targets = labels.float() if labels.ndim > 1 else labels.clamp(-1, logits.shape[1] - 1)
        loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
        loss = loss / device_mean((numbers >= 0).float().sum()).clamp(min=1e-3)  # where no device has a labelled image
        parts = [*self._layer.parameters()]
        for part, gradient in zip(parts, torch.autograd.grad(loss, parts), strict=True):
            part.grad = device_mean(gradient)
        self._optimizer.step()

    def _look(self, trainer: Any, pl_module: Any, features: Tensor) -> None:
        """Log how much space features (B, D) take; UserError if a label is out of range, or training has collapsed."""
        count = self._layer[1].out_features if self._layer else 0
        if self._layer and (highest := int(gather(self._highest.view(1, 1)).max())) >= count:
            raise UserError(f"a label is {highest}, but Probes was told of {count} classes, by its classes or the data")
        apart, about_mean = float(deviation(features)), float(effective_rank(features - features.mean(0)))
        if logs_now(trainer):
            pl_module.log_step("train/rank", effective_rank(features).cpu())
            pl_module.log_step("train/deviation", torch.tensor(apart))
        space = apart * about_mean
        most = self._numbers["space"] = max(space, self._numbers.get("space", space))
        settled = trainer.global_step >= max(GRACE, SHARE * trainer.estimated_stepping_batches)
        if not settled or not self.alarms or pl_module.objective.needs_labels:
            return
        logs = {name.removeprefix("train/"): float(value) for name, value in trainer.callback_metrics.items()}
        why = pl_module.objective.collapse(logs)  # of the step logged before: this one's are still to come
        if space < LEAST * most:
            why = "the features of all images are nearly the same; lower the learning rate, or warm it up for longer"
        if why:
            again = "and begin again (--run.overwrite true); Probes with alarms false would train on"
            raise UserError(f"the training has collapsed by step {trainer.global_step}: {why}, {again}")

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        # Not before: now an EMA has put its weights in place.
        if batch_idx or self._probes or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        last = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        if self.bank and self._count(trainer.datamodule) != 0 and (last or trainer.current_epoch % self.every == 0):
            bank = self._features(trainer, pl_module)
            if len(bank):
                known = normalised(bank[:, 2:]), bank[:, 1].long()
                self._probes["knn"] = lambda rows: nearest(*known, rows)[0], MeanMetric()
        if self._layer:
            self._probes["probe"] = lambda rows: self._layer(rows).argmax(1), MeanMetric()

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        if self._probes and (features := outputs["features"]) is None:
            with trainer.precision_plugin.forward_context():
                features = pl_module.features(Batch.of(batch).views[0])
        labels = Batch.of(batch).labels
        for classify, right in self._probes.values():
            right.to(pl_module.device).update(classify(features.float()) == labels, (labels >= 0).float())

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        for name, (_, right) in self._probes.items():
            if right.compute().isfinite():  # else no image has a class
                self._numbers[name] = float(right.compute())
                pl_module.log(f"val/{name}", right.compute(), prog_bar=True)
        self._probes = {}

    def _features(self, trainer: Any, pl_module: Any) -> Tensor:
        """The bank on every device: index, class and features of images that have one class, (N, 2 + D)."""
        rows = []
        with torch.random.fork_rng(devices=[]), trainer.precision_plugin.forward_context():
            torch.default_generator.manual_seed(0)  # of transforms that draw numbers
            for batch in training_images(trainer, 64 if trainer.fast_dev_run else self.bank):
                batch = on_device(trainer, batch)
                if batch.labels.ndim == 1 and not batch.labels.is_floating_point():
                    columns = batch.indices[:, None], batch.labels[:, None], pl_module.features(batch.views[0])
                    rows.append(torch.cat([column.float() for column in columns], 1).cpu())
        bank = predictions.gather(trainer, rows).to(pl_module.device)
        return bank[(bank[:, :2] >= 0).all(1)]


def training_images(trainer: Any, most: int) -> Any:
    """A loader of this rank's share of so many training images, as evaluation sees them if the data can tell how."""
    if hasattr(trainer.datamodule, "eval_loader"):
        return trainer.datamodule.eval_loader("train", most)
    given = trainer.train_dataloader
    share = spread(given, most, trainer.global_rank, trainer.world_size)
    if share is None:
        return ()
    size = eval_batch(share.count, trainer.world_size, min(given.batch_size or 64, share.count))
    return DataLoader(given.dataset, size, sampler=share, num_workers=given.num_workers, collate_fn=given.collate_fn)
