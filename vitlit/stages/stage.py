"""What the two stages share: optimizer, training and evaluation steps, checkpoints."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.model.config import DROPOUTS
from vitlit.model.lora import merge, zero_adapters
from vitlit.objectives import Batch, Distillation, Objective, Step, Supervised
from vitlit.optim import Groups, OptimizerFactory, Schedule, build_optimizer
from vitlit.run.config import with_public_paths
from vitlit.seeds import seed_step
from vitlit.stages.fsdp import shard
from vitlit.stages.metrics import metrics, update
from vitlit.stages.record import check_class_paths, describe, path_of
from vitlit.weights import load
from vitlit.weights.adapt import set_numerics
from vitlit.weights.checkpoint import about, open_checkpoint


class Stage(LightningModule):
    """A ViT, an objective, an optimizer and a schedule: the base of `Pretrain` and `Finetune`.

    Args:
        vit: the headless ViT; the objective gives it a head if it needs one.
        objective: makes the objective from the ViT, such as partial(Supervised, num_classes=10).
        optimizer: makes the optimizer from parameter groups, such as partial(AdamW, lr=1e-3); its lr is the peak.
        schedule: the learning rate by optimiser step.
        groups: how learning rate and weight decay differ between parameters.
    """

    def __init__(
        self,
        vit: ViT,
        objective: Callable[[ViT], Objective],
        optimizer: OptimizerFactory,
        schedule: Schedule = Schedule(),
        groups: Groups = Groups(),
    ) -> None:
        super().__init__()
        record = {"vit": vit, "objective": objective, "optimizer": optimizer, "schedule": schedule, "groups": groups}
        # From these, Lightning and jsonargparse rebuild the stage: {class_path, init_args} become objects again.
        self.hparams.update(
            describe(record),
            _class_path=path_of(type(self)),
            _instantiator="lightning.pytorch.cli.instantiate_module",
        )
        self.vit = vit.train()
        self.objective = objective(vit)
        self.optimizer, self.schedule, self.groups = optimizer, schedule, groups
        self.measures = nn.ModuleDict({split: self.new_metrics() for split in ("val", "test")})
        self._logs: list[dict[str, Tensor]] = []  # of the current step's micro-batches
        self._checked = 0  # the id of the data that was compared with the network
        self._lr = self._progress = 0.0
        self._total_steps = 1

    @property
    def data(self) -> Any:
        """The trainer's data module, or None if it was given loaders."""
        trainer: Any = self.trainer
        return trainer.datamodule

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(images)

    def new_metrics(self) -> nn.ModuleDict:
        """The metrics of an evaluation, by name."""
        classes = self.vit.config.num_classes if self.objective.needs_labels else 0
        return metrics(classes, getattr(self.objective, "multi_label", False))

    @property
    def measured(self) -> list[str]:
        """The names under which validation metrics are logged."""
        return [f"val/{name}" for name, _ in self.measures["val"].named_children()]

    def step(self, batch: Any) -> Step:
        """Run the objective on a batch, in any form that `Batch.of` takes."""
        return self.objective(self.vit, Batch.of(batch), self._progress)

    def configure_model(self) -> None:
        shard(self, self.vit.blocks, methods=["step"])

    def configure_optimizers(self) -> Any:
        trainer: Any = self.trainer
        total = trainer.estimated_stepping_batches
        if math.isinf(total):
            raise UserError("training has no end; set trainer.max_epochs or trainer.max_steps")
        batches = trainer.num_training_batches
        steps = 0 if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)
        epoch = getattr(self.data, "steps_per_epoch", steps)
        schedule = Schedule(decay="constant") if trainer.fast_dev_run else self.schedule
        layers = self.vit.layers()
        layers["objective"] = {f"objective.{name}": p for name, p in self.objective.named_parameters()}
        optimizer = build_optimizer(self.optimizer, layers, self, self.groups, self.lr_scale())
        scheduler = LambdaLR(optimizer, schedule.over(int(total), epoch))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scale(self) -> float:
        """The factor of the optimizer's lr for the global batch size; UserError if `lr_per` is set without one."""
        if self.schedule.lr_per is None:
            return 1.0
        batch = getattr(self.data, "batch_size", None)
        if batch is None:
            raise UserError("model.schedule.lr_per needs a data module with a batch_size (ImageFolderData)")
        return float(batch) / self.schedule.lr_per

    # Training

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.check_data(self.data)

    def check_data(self, data: Any) -> None:
        """Prepare the objective with training data, once; UserError if they do not fit it or the network.

        `data` is a data module, or None if training is given loaders.
        """
        if self._checked == id(data):
            return
        objective, name = self.objective, type(self.objective).__name__
        classes, made_for = self.vit.config.num_classes, self.vit.config.image_size
        found = len(getattr(data, "classes", range(classes)))
        if objective.needs_labels and not found:
            raise no_classes(name)
        if objective.needs_labels and found != classes:
            raise UserError(f"num_classes is {classes}, but the data has {found} classes; leave it out")
        wanted = objective.views
        views = getattr(data, "num_views", wanted)
        if views > 1 == wanted:
            raise UserError(f"{name} learns from one view of an image, but the data has {views}; leave data.views out")
        if views < wanted:
            raise UserError(f"{name} needs at least {wanted} views of an image, the data has {views}; give data.views")
        for kind in getattr(data, "views", ()):
            try:
                self.vit.grid_of(*kind.pixels)
            except UserError as error:
                raise UserError(f"data.views: {error}") from error
        preprocess = getattr(data, "preprocess", None)
        if preprocess is not None and tuple(preprocess.image_size) != self.vit.config.sides:
            raise UserError(f"the ViT is made for images of {made_for}, but the data gives {preprocess.image_size}")
        mixing = getattr(data, "mixing", None)
        if mixing is not None and mixing.on and not isinstance(objective, Supervised):
            raise UserError(f"data.mixing mixes labels, which {name} does not learn from; leave it out")
        several = getattr(data, "multi_label", False)
        if isinstance(objective, Supervised) and several != objective.multi_label:
            how = "several labels" if several else "one label"
            raise UserError(f"the data has {how} an image; give the objective multi_label={several}")
        if isinstance(objective, Distillation):
            objective.set_teacher(load(objective.teacher))
        objective.prepare(data)
        self._checked = id(data)

    def on_train_start(self) -> None:
        self.train()  # not called by Lightning; Finetune's turns off a frozen encoder's dropout
        self._logs.clear()
        self._total_steps = int(self.trainer.estimated_stepping_batches)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        trainer: Any = self.trainer
        seed = getattr(self.data, "seed", 0)
        seed_step(seed, trainer.global_step, batch_idx % trainer.accumulate_grad_batches, self.global_rank)
        self._progress = trainer.global_step / self._total_steps
        # The head's. The scheduler steps before the batch ends, so it is read here.
        self._lr = max(group["lr"] for group in trainer.optimizers[0].param_groups)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        step = self.step(batch)
        self._logs.append({"loss": step.loss.detach(), **step.logs})
        return step.loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer: Any = self.trainer
        if not step_ends(trainer, batch_idx):
            return
        self.objective.after_step(self.vit, self._progress)
        logs = {name: torch.stack([micro[name] for micro in self._logs]).mean() for name in self._logs[0]}
        self._logs.clear()
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True  # mid-epoch, Lightning would end without a validation
        if logs_now(trainer):
            for name, value in logs.items():
                mean = trainer.strategy.reduce(value, reduce_op="mean")
                self.log(f"train/{name}", mean, prog_bar=name == "loss")
            self.log("train/lr", self._lr)

    # Evaluation. torchmetrics counts every image once, on any number of devices.

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor] | None:
        return self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor] | None:
        return self._evaluate("test", batch)

    def _evaluate(self, split: str, batch: Any) -> dict[str, Tensor] | None:
        step, labels = self.step(batch), Batch.of(batch).labels
        measures: Any = self.measures[split]
        update(measures, step.loss, step.logits, labels)
        for name, metric in measures.items():
            self.log(f"{split}/{name}", metric, prog_bar=name in ("top1", "map"), batch_size=len(labels))
        if step.logits is None or not isinstance(self.objective, Supervised):
            return None
        return {"probabilities": self.objective.probabilities(step.logits)}

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class probabilities (B, num_classes), float32."""
        if not isinstance(self.objective, Supervised):
            raise UserError(f"{type(self.objective).__name__} learns no classes to predict; finetune the weights first")
        return self.objective.probabilities(self.vit(Batch.of(batch).views[0]))

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        data = self.data
        checkpoint["devices"] = self.trainer.world_size
        checkpoint["vitlit"] = about(self.vit, getattr(data, "classes", []), getattr(data, "preprocess", None))
        averaging = self._averaging()
        if averaging is not None and "averaging_state" not in checkpoint:
            # A weights-only checkpoint skips callbacks, but must hold the averaged weights, which were validated.
            averaging.on_save_checkpoint(self.trainer, self, checkpoint)
            for name in ("current_model_state", "averaging_state"):
                checkpoint.pop(name, None)  # there are none before training
        checkpoint["state_dict"], adapters = merge(checkpoint["state_dict"])
        if adapters and "optimizer_states" in checkpoint:
            checkpoint["adapters"] = adapters

    def _averaging(self) -> WeightAveraging | None:
        """The callback that averages weights, if there is one."""
        trainer: Any = self.trainer
        return next((callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)), None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        set_numerics(self.vit, checkpoint["vitlit"]["vit"])
        zeros = {f"vit.{name}": tensor for name, tensor in zero_adapters(self.vit).items()}
        checkpoint["state_dict"] |= checkpoint.get("adapters") or zeros
        if self._trainer is None:
            return
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        if fitting and "averaging_state" in checkpoint and self._averaging() is None:
            raise UserError(
                "the checkpoint's run averages its weights (EMA), this one does not: give its trainer.callbacks, or "
                "start from the averaged weights (model.init_from)"
            )
        if not checkpoint["global_step"]:
            return
        # Lightning counts the micro-batches of a device; a step may now have another number of them.
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        before = progress["total"]["processed"] // checkpoint["global_step"]
        was = (checkpoint.get("devices", self.trainer.world_size), before)
        now = (self.trainer.world_size, self.trainer.accumulate_grad_batches)
        if fitting and was != now and any(getattr(self.vit.config, name) for name in DROPOUTS):
            rank_zero_only(print)(
                "vitlit: warning: steps of {} devices x {} micro-batches continue as {} x {}: the samples are the "
                "same, but dropout depends on this division".format(*was, *now),
                flush=True,
            )
        for counts in (progress["total"], progress["current"]):
            ready = counts["ready"]
            shift = ready // before * self.trainer.accumulate_grad_batches - ready
            counts.update({name: count + shift for name, count in counts.items()})

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Rebuild a stage from its checkpoint; `Stage` loads either. Nothing in the file is executed.

        UserError if it cannot be read, holds another stage, or names a class outside the trusted packages.
        """
        record = with_public_paths(open_checkpoint(Path(checkpoint_path)).get("hyper_parameters", {}))
        check_class_paths(record)
        # Lightning would expect the arguments of `cls`, whatever the record says.
        path = str(record.get("_class_path"))
        kind: Any = next((stage for stage in subclasses(Stage) if path_of(stage) == path), cls)
        if not issubclass(kind, cls):
            raise UserError(f"{checkpoint_path} holds a {path}, not a {cls.__name__}")
        bound: Any = super(Stage, kind)
        return bound.load_from_checkpoint(checkpoint_path, *args, **{**record, **kwargs, "weights_only": True})


def no_classes(name: str) -> UserError:
    """The error of an objective or a stage that needs classes, on data without."""
    remedy = "sort the images into class folders, or give data.manifest"
    return UserError(f"the data has no classes, which {name} needs; {remedy}")


def step_ends(trainer: Any, batch_idx: int) -> bool:
    """Whether a training batch is the last of its optimiser step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def logs_now(trainer: Any) -> bool:
    """Whether to log the optimiser step that just ended: every log_every_n_steps steps, and the last of an epoch."""
    every = trainer.log_every_n_steps
    return bool(every) and (trainer.global_step % every == 0 or trainer.is_last_batch)


def subclasses(stage: type[Stage]) -> Iterator[type[Stage]]:
    """A stage and all of its subclasses."""
    yield stage
    for derived in stage.__subclasses__():
        yield from subclasses(derived)
