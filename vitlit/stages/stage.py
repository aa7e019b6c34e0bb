"""What the two stages share: steps, metrics, optimiser, and what a checkpoint says of itself."""

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
from vitlit.model.lora import merge, without_adaptation
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

DROPOUTS = ("dropout", "attention_dropout", "drop_path")


class Stage(LightningModule):
    """A ViT, an objective, an optimizer and a schedule. `Pretrain` and `Finetune` are the two that are used.

    Args:
        vit: without a head; the objective gives it one.
        objective: makes the objective of the ViT.
        optimizer: makes the optimizer of parameter groups.
        schedule: of the learning rate, by optimiser step.
        groups: how learning rate and weight decay differ between parameters.
        arguments: the constructor arguments that a checkpoint records beside these.
    """

    def __init__(
        self,
        vit: ViT,
        objective: Callable[[ViT], Objective],
        optimizer: OptimizerFactory,
        schedule: Schedule,
        groups: Groups,
        arguments: dict[str, Any],
    ) -> None:
        super().__init__()
        record = {"vit": vit, "optimizer": optimizer, "schedule": schedule, "groups": groups, **arguments}
        # Lightning rebuilds the stage from these with jsonargparse: {class_path, init_args} become objects again.
        self.hparams.update(
            {name: describe(value) for name, value in record.items()},
            _class_path=path_of(type(self)),
            _instantiator="lightning.pytorch.cli.instantiate_module",
        )
        self.vit = vit.train()
        self.objective = objective(vit)
        self.optimizer, self.schedule, self.groups = optimizer, schedule, groups
        self.measures = nn.ModuleDict({split: self.new_metrics() for split in ("val", "test")})
        self._window: list[dict[str, Tensor]] = []  # the logs of a step's micro-batches
        self._checked = 0  # the id of the data that was compared with the network
        self._rate = self._progress = 0.0
        self._total = 1

    @property
    def data(self) -> Any:
        """The trainer's data module, None where it was given loaders."""
        trainer: Any = self.trainer
        return trainer.datamodule

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(images)

    def new_metrics(self) -> nn.ModuleDict:
        """What an evaluation measures, by name."""
        classes = self.vit.config.num_classes if self.objective.needs_labels else 0
        return metrics(classes, getattr(self.objective, "multi_label", False))

    @property
    def measured(self) -> list[str]:
        """The validation's metrics, by the names that they are logged with."""
        measures: Any = self.measures["val"]
        return [f"val/{name}" for name in measures]

    def step(self, batch: Any) -> Step:
        """What the objective computes from a batch of a data module, or of whatever `Batch.of` takes."""
        step: Step = self.objective(self.vit, Batch.of(batch), self._progress)
        return step

    def configure_model(self) -> None:
        shard(self, self.vit.blocks, methods=["step"])

    def configure_optimizers(self) -> Any:
        trainer: Any = self.trainer
        total = trainer.estimated_stepping_batches
        if math.isinf(total):
            raise UserError("training has no end; set trainer.max_epochs or trainer.max_steps")
        batches = trainer.num_training_batches
        given = 0 if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)
        epoch = getattr(self.data, "steps_per_epoch", given)
        schedule = Schedule(decay="constant") if trainer.fast_dev_run else self.schedule
        layers = self.vit.layers()
        layers["objective"] = {f"objective.{name}": p for name, p in self.objective.named_parameters()}
        optimizer = build_optimizer(self.optimizer, layers, self, self.groups, self.lr_scale())
        scheduler = LambdaLR(optimizer, schedule.over(int(total), epoch))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scale(self) -> float:
        """What the optimizer's learning rate is multiplied by for the global batch; UserError where that is unknown."""
        if self.schedule.lr_per is None:
            return 1.0
        batch = getattr(self.data, "batch_size", None)
        if batch is None:
            raise UserError("model.schedule.lr_per needs a data module that tells its batch_size (ImageFolderData)")
        return float(batch) / self.schedule.lr_per

    # Training

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.check_data(self.data)

    def check_data(self, data: Any) -> None:
        """Compare training data with the network and the objective, and prepare the objective; once for the same data.

        Args:
            data: a data module, or None if training is given loaders.

        Raises:
            UserError: they do not fit.
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
        views = getattr(data, "num_views", objective.views)
        if views > 1 == objective.views:
            raise UserError(f"{name} learns from one view of an image, but the data has {views}; leave data.views out")
        if views < objective.views:
            raise UserError(
                f"{name} needs at least {objective.views} views of an image, but the data has {views}; give data.views"
            )
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
        self.train()  # Lightning would not call it, and Finetune's turns a frozen encoder's dropout off
        self._window.clear()
        self._total = int(self.trainer.estimated_stepping_batches)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        trainer: Any = self.trainer
        seed = getattr(self.data, "seed", 0)
        seed_step(seed, trainer.global_step, batch_idx % trainer.accumulate_grad_batches, self.global_rank)
        self._progress = trainer.global_step / self._total
        # The highest, which is the head's; the scheduler moves on before the batch ends.
        self._rate = max(group["lr"] for group in trainer.optimizers[0].param_groups)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        step = self.step(batch)
        self._window.append({"loss": step.loss.detach(), **step.logs})
        return step.loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer: Any = self.trainer
        if not step_ends(trainer, batch_idx):
            return
        self.objective.after_step(self.vit, self._progress)
        logs = {name: torch.stack([micro[name] for micro in self._window]).mean() for name in self._window[0]}
        self._window.clear()
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True  # in the midst of an epoch Lightning would end without a validation
        if logs_now(trainer):
            for name, value in logs.items():
                mean = trainer.strategy.reduce(value, reduce_op="mean")
                self.log(f"train/{name}", mean, prog_bar=name == "loss")
            self.log("train/lr", self._rate)

    # Evaluation: every image counts once, on any number of devices, so the numbers come from torchmetrics alone.

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
            name = type(self.objective).__name__
            raise UserError(f"{name} learns no classes to predict; finetune the weights first")
        return self.objective.probabilities(self.vit(Batch.of(batch).views[0]))

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        data = self.data
        checkpoint["devices"] = self.trainer.world_size
        checkpoint["vitlit"] = about(self.vit, getattr(data, "classes", []), getattr(data, "preprocess", None))
        averaging = self._averaging()
        if averaging is not None and "averaging_state" not in checkpoint:
            # Lightning leaves callbacks out of a file of weights alone; it would not hold what was validated.
            averaging.on_save_checkpoint(self.trainer, self, checkpoint)
            for name in ("current_model_state", "averaging_state"):
                checkpoint.pop(name, None)  # there is neither before training
        checkpoint["state_dict"], adapters = merge(checkpoint["state_dict"])
        if adapters and "optimizer_states" in checkpoint:
            checkpoint["adapters"] = adapters

    def _averaging(self) -> WeightAveraging | None:
        """The callback that averages weights, where training has one."""
        callbacks = self.trainer.callbacks if self._trainer is not None else []  # type: ignore[attr-defined]
        return next((callback for callback in callbacks if isinstance(callback, WeightAveraging)), None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        set_numerics(self.vit, checkpoint["vitlit"]["vit"])
        adapters = checkpoint.get("adapters") or {
            f"vit.{name}": tensor for name, tensor in without_adaptation(self.vit).items()
        }
        checkpoint["state_dict"] |= adapters
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if fitting and "averaging_state" in checkpoint and self._averaging() is None:
            raise UserError(
                "the checkpoint's run averages its weights (EMA), this one does not: give its trainer.callbacks, or "
                "start from the averaged weights (model.init_from)"
            )
        # Lightning counts a device's micro-batches, of which a step may have another number in a continued run.
        if self._trainer is None or not checkpoint["global_step"]:
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        before = progress["total"]["processed"] // checkpoint["global_step"]
        was = (checkpoint.get("devices", self.trainer.world_size), before)
        now = (self.trainer.world_size, self.trainer.accumulate_grad_batches)
        if fitting and was != now and any(getattr(self.vit.config, name) for name in DROPOUTS):
            rank_zero_only(print)(
                f"vitlit: warning: {now[0]} devices x {now[1]} micro-batches go on where {was[0]} x {was[1]} were: the "
                "samples are the same, but dropout depends on how they are divided",
                flush=True,
            )
        for counts in (progress["total"], progress["current"]):
            ready = counts["ready"]
            whole = ready // before * self.trainer.accumulate_grad_batches
            counts.update({name: whole - (ready - count) for name, count in counts.items()})

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Rebuild a stage from its checkpoint; `Stage` finds out which it is. Nothing in the file is executed.

        Raises:
            UserError: the file cannot be read, holds another stage, or names a class outside the trusted packages.
        """
        record = with_public_paths(open_checkpoint(Path(checkpoint_path)).get("hyper_parameters", {}))
        check_class_paths(record)
        # Lightning would ask for the arguments of `cls`, whatever the record says.
        made_by = str(record.get("_class_path"))
        kind: Any = next((stage for stage in kinds(Stage) if path_of(stage) == made_by), cls)
        if not issubclass(kind, cls):
            raise UserError(f"{checkpoint_path} holds a {made_by}, not a {cls.__name__}")
        found: Any = super(Stage, kind)
        return found.load_from_checkpoint(checkpoint_path, *args, **{**record, **kwargs, "weights_only": True})


def no_classes(name: str) -> UserError:
    """The error of an objective or a stage that needs classes, on data without."""
    remedy = "sort the images into class folders, or give data.manifest"
    return UserError(f"the data has no classes, which {name} needs; {remedy}")


def step_ends(trainer: Any, batch_idx: int) -> bool:
    """Whether a training batch is the last of its optimiser step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def logs_now(trainer: Any) -> bool:
    """Whether the optimiser step that has just ended is logged: every log_every_n_steps, and an epoch's last."""
    every = trainer.log_every_n_steps
    return bool(every) and (trainer.global_step % every == 0 or trainer.is_last_batch)


def kinds(stage: type[Stage]) -> Iterator[type[Stage]]:
    """A stage and all that are derived from it."""
    yield stage
    for derived in stage.__subclasses__():
        yield from kinds(derived)
