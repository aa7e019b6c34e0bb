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
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric, Metric

from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.model.lora import merge, without_adaptation
from vitlit.objectives import Objective, Step
from vitlit.optim import Groups, OptimizerFactory, Schedule, build_optimizer
from vitlit.seeds import seed_step
from vitlit.stages.clock import Clock
from vitlit.stages.finite import GRADIENT, LOSS, Finite, all_finite, no_number
from vitlit.stages.fsdp import shard
from vitlit.stages.metrics import metrics, update
from vitlit.stages.record import check_class_paths, describe, path_of
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
        classes, several = self.vit.config.num_classes, self.objective.multi_label
        self.measures = nn.ModuleDict({split: metrics(classes, several) for split in ("val", "test")})
        self._window: list[dict[str, Tensor]] = []  # the logs of a step's micro-batches
        self._rate = 0.0
        self._losses: list[Tensor] = []  # the first and the last that this training logged
        self._finite = Finite(torch.device("cpu"))
        self.clock = Clock(torch.device("cpu"))

    @property
    def data(self) -> Any:
        """The trainer's data module, None where it was given loaders."""
        trainer: Any = self.trainer
        return trainer.datamodule

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(images)

    @property
    def measured(self) -> list[str]:
        """The validation's metrics, by the names that they are logged with."""
        measures: Any = self.measures["val"]
        return [f"val/{name}" for name in measures]

    def step(self, batch: Any) -> Step:
        """What the objective makes of a batch, by which a stage is trained and evaluated."""
        step: Step = self.objective(self.vit, batch)
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

    def on_fit_start(self) -> None:
        self.check(self.data)
        self.objective.prepare(self.data)
        self.objective.to(self.device)

    def check(self, data: Any) -> None:
        """Refuse data that does not fit the network or the objective, where they are built in Python."""
        classes, made_for = self.vit.config.num_classes, self.vit.config.image_size
        found = len(getattr(data, "classes", [])) or classes
        if classes and found != classes:
            raise UserError(f"the head has {classes} classes, but the data has {found}; give num_classes={found}")
        preprocess = getattr(data, "preprocess", None)
        if preprocess is not None and tuple(preprocess.image_size) != self.vit.config.sides:
            raise UserError(f"the ViT is made for images of {made_for}, but the data gives {preprocess.image_size}")
        mixing = getattr(data, "mixing", None)
        if mixing is not None and mixing.on and not self.objective.soft_targets:
            raise UserError(
                f"data.mixing makes soft targets, which {type(self.objective).__name__} does not learn from"
            )
        several = getattr(data, "multi_label", False)
        if several != self.objective.multi_label:
            how = "several labels" if several else "one label"
            raise UserError(f"the data has {how} an image; give the objective multi_label={several}")

    def on_train_start(self) -> None:
        self.train()  # Lightning would not call it, and Finetune's turns a frozen encoder's dropout off
        self._window.clear()
        self._losses.clear()
        self._finite = Finite(self.device)
        self.clock = Clock(self.device)

    def on_train_epoch_start(self) -> None:
        self.clock.restart()

    def on_train_end(self) -> None:
        losses = [float(loss) for loss in self._losses]
        if losses and losses[-1] > 1.5 * max(losses[0], 0.5):  # a small one is as large again by chance
            rose = f"train/loss rose from {losses[0]:,.4g} to {losses[-1]:,.4g}"
            remedy = "lower the learning rate (--model.optimizer.init_args.lr)"
            rank_zero_only(print)(f"vitlit: warning: {rose}; {remedy}", flush=True)

    def on_validation_epoch_end(self) -> None:
        measures = self.measures["val"]
        assert isinstance(measures, nn.ModuleDict)
        loss = measures["loss"]
        assert isinstance(loss, MeanMetric)
        if self.trainer.state.fn == TrainerFn.FITTING:
            if not self.trainer.sanity_checking:
                self._check_training()
            value = loss.compute().item()
            if not math.isfinite(value):
                raise no_number(self.trainer, f"the validation loss is {value} after step {self.trainer.global_step}")

    def on_validation_end(self) -> None:
        self.clock.restart()

    def _check_training(self) -> None:
        """Raise UserError where a loss or a gradient since the last time was no number."""
        found = self._finite.first_other()
        if found is None:
            return
        what, step = found
        samples = getattr(self.data, "samples", None)
        indices = list(dict.fromkeys(sample.index for sample in samples(step))) if samples else []
        listed = " ".join(map(str, indices[:8])) + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")
        images = f" (training images {listed})" if indices else ""
        raise no_number(self.trainer, f"the {what} of step {step}{images} is no finite number", step)

    def require_finite_weights(self) -> None:
        """Raise UserError where training has come to no number, before a checkpoint is made of it."""
        self._check_training()
        finite = all_finite(self.parameters())
        if not self.trainer.strategy.reduce_boolean_decision(finite, all=True):
            raise no_number(self.trainer, f"a weight is no finite number after step {self.trainer.global_step}")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.clock.begin_batch()
        seed = getattr(self.data, "seed", 0)
        seed_step(seed, self.trainer.global_step, len(self._window), self.global_rank)
        # The highest, which is the head's; the scheduler moves on before the batch ends.
        self._rate = max(group["lr"] for group in self.trainer.optimizers[0].param_groups)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        step = self.step(batch)
        loss = step.loss.detach()
        self._window.append({"loss": loss, **step.logs})
        self._finite.note(LOSS, self.trainer.global_step, loss)
        return step.loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        trainer: Any = self.trainer
        if trainer.precision != "16-mixed":  # whose scaler looks for gradients out of range itself, and skips the step
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            self._finite.note(GRADIENT, trainer.global_step, *gradients)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.clock.end_batch(len(batch[0]) * self.trainer.world_size)
        if len(self._window) < self.trainer.accumulate_grad_batches:
            return
        logs = {name: torch.stack([micro[name] for micro in self._window]).mean() for name in self._window[0]}
        self._window.clear()
        trainer: Any = self.trainer
        step = trainer.global_step
        if step == trainer.max_steps:
            trainer.should_stop = True  # in the midst of an epoch Lightning would end without a validation
        every = trainer.log_every_n_steps
        if not every or (step % every and not trainer.is_last_batch):
            return
        logs = {name: trainer.strategy.reduce(value, reduce_op="mean") for name, value in logs.items()}
        self._losses[1:] = [logs["loss"]]
        self._check_training()
        speed, waited = self.clock.lap()
        for name, value in logs.items():
            self.log(f"train/{name}", value, prog_bar=name == "loss")
        self.log("train/lr", self._rate)
        self.log("train/images_per_second", speed, prog_bar=True)
        self.log("train/data_wait", waited, prog_bar=True)

    # Evaluation: every image counts once, on any number of devices, so the numbers come from torchmetrics alone.

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor] | None:
        return self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor] | None:
        return self._evaluate("test", batch)

    def _evaluate(self, split: str, batch: Any) -> dict[str, Tensor] | None:
        step = self.step(batch)
        measures = self.measures[split]
        assert isinstance(measures, nn.ModuleDict)
        update(measures, step.loss, step.logits, batch[1], len(batch[0]))
        for name, metric in measures.items():
            assert isinstance(metric, Metric)
            self.log(f"{split}/{name}", metric, prog_bar=name in ("top1", "map"), batch_size=len(batch[0]))
        return None if step.logits is None else {"probabilities": self.objective.probabilities(step.logits)}

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class probabilities (B, num_classes), float32."""
        return self.objective.probabilities(self.vit(batch[0]))

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
        record = open_checkpoint(Path(checkpoint_path)).get("hyper_parameters", {})
        check_class_paths(record)
        # Lightning would ask for the arguments of `cls`, whatever the record says.
        made_by = str(record.get("_class_path"))
        kind: Any = next((stage for stage in kinds(Stage) if path_of(stage) == made_by), cls)
        if not issubclass(kind, cls):
            raise UserError(f"{checkpoint_path} holds a {made_by}, not a {cls.__name__}")
        found: Any = super(Stage, kind)
        return found.load_from_checkpoint(checkpoint_path, *args, **{**kwargs, "weights_only": True})


def kinds(stage: type[Stage]) -> Iterator[type[Stage]]:
    """A stage and all that are derived from it."""
    yield stage
    for derived in stage.__subclasses__():
        yield from kinds(derived)
