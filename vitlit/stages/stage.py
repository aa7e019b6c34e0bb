"""What the two stages share: optimizer, training and evaluation steps, checkpoints."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from vitlit.errors import UserError, check_types
from vitlit.inspection import attended
from vitlit.model import ViT
from vitlit.objectives import Batch, Objective, Step
from vitlit.optim import Groups, OptimizerFactory, Schedule, build_optimizer, follow_schedule
from vitlit.run.callbacks import check_callbacks
from vitlit.run.config import check_class_paths
from vitlit.run.fsdp import shard
from vitlit.seeds import first_draw, global_seed, seed_step
from vitlit.stages.compiling import Compile, Compiling
from vitlit.stages.matching import check_accumulation, check_batch, check_match
from vitlit.stages.metrics import direction, metrics, update
from vitlit.stages.record import describe, path_of, subclasses
from vitlit.stages.starting import restore, save, start, starting_vit
from vitlit.weights import LoadReport, Weights, load, preprocess, read
from vitlit.weights.checkpoint import open_checkpoint

# What Lightning calls changes from step to step: torch.compile(stage) compiles what it calls in turn.
not_compiled = partial(torch.compiler.disable, recursive=False)


class Stage(LightningModule):
    """A ViT, an objective, an optimizer and a schedule: the base of `Pretrain` and `Finetune`.

    Args:
        vit: the headless ViT; the objective gives it a head if it needs one. None is that of init_from.
        objective: makes the objective from the ViT, such as partial(Supervised, num_classes=10).
        optimizer: makes the optimizer from parameter groups, such as partial(AdamW, lr=1e-3); its lr is the peak.
        schedule: the learning rate by optimiser step.
        groups: how learning rate and weight decay differ between parameters.
        compile: auto (over a minute of work on a GPU), false, default, reduce-overhead, max-autotune (docs/speed.md).
        init_from: weights to start from, like Finetune's: those of the encoder, and of a teacher that follows it.
    """

    trainer: Any  # Lightning's type knows no datamodule

    def __init__(
        self,
        vit: ViT | None,
        objective: Callable[[ViT], Objective],
        optimizer: OptimizerFactory,
        schedule: Schedule = Schedule(),
        groups: Groups = Groups(),
        compile: Compile = "auto",
        init_from: str | None = None,
    ) -> None:
        super().__init__()
        vit = starting_vit(vit, init_from)
        record = {"vit": vit, "objective": objective, "optimizer": optimizer, "schedule": schedule, "groups": groups}
        # From these, Lightning and jsonargparse rebuild the stage: {class_path, init_args} become objects again.
        self.hparams.update(
            describe(record),
            _class_path=path_of(type(self)),
            _instantiator="lightning.pytorch.cli.instantiate_module",
        )
        check_types(Stage.__init__, locals(), "model.")
        self.vit = vit.train()
        self.objective = objective(vit)
        self.optimizer, self.schedule, self.groups = optimizer, schedule, groups
        self.measures = nn.ModuleDict({split: metrics(self.objective.metrics()) for split in ("val", "test")})
        self.compiling = Compiling(compile)
        self.teachers: list[ViT] = []  # a list hides them from checkpoints
        self._logs: list[dict[str, Tensor]] = []  # of the current step's micro-batches
        self.init_from = init_from  # until training has started from it
        self.weights: Weights | None = None  # of init_from, once they have been read
        self._checked = 0  # the id of the data that was compared with the network
        self._total_steps = 1
        # Of the current step: to set attributes of a module takes ten times as long.
        self._now = SimpleNamespace(progress=0.0, first_draw=0, lr=0.0, seed=0)

    @property
    def data(self) -> Any:
        """The trainer's data module, or None if it was given loaders."""
        return self.trainer.datamodule

    @property
    def classes(self) -> list[str]:
        """The data's class names, unless the ViT has a head that is for something else."""
        names: list[str] = getattr(self.data, "classes", [])
        return names if self.objective.needs_labels or not self.vit.config.num_classes else []

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(images)

    @property
    def measured(self) -> dict[str, str]:
        """Which value of each validation metric is best, min or max: first the objective's, the loss at the end."""
        best = {f"val/{name}": direction(name, metric) for name, metric in self.measures["val"].named_children()}
        return {**{name: way for name, way in best.items() if name != "val/loss"}, "val/loss": "min"}

    @not_compiled
    def step(self, batch: Any) -> Step:
        """Run the objective on a batch, in any form that `Batch.of` takes."""
        return self.compiling.step(self, Batch.of(batch), self._now.progress)

    @not_compiled
    def features(self, images: Tensor) -> Tensor:
        """Pooled features (B, D) of images by the weights that go on: a teacher's, where the objective moves one."""
        vit = getattr(self.objective, "teacher_vit", self.vit)
        with torch.compiler.set_stance("force_eager"):  # the batch may have another shape than the training's
            return vit.pool(vit.features(images, pooled=True))

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The objective's pictures of a batch, else what the weights that go on attend to in its images."""
        with torch.compiler.set_stance("force_eager"):
            own = self.objective.pictures(self.vit, batch)
            return own or attended(getattr(self.objective, "teacher_vit", self.vit), batch.views[0])

    def configure_model(self) -> None:
        shard(self, self.vit.blocks, methods=["step", "features", "pictures"])

    def configure_optimizers(self) -> Any:
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total):
            raise UserError("training has no end; set trainer.max_epochs or trainer.max_steps")
        batches = self.trainer.num_training_batches
        steps = 0 if math.isinf(batches) else math.ceil(batches / self.trainer.accumulate_grad_batches)
        epoch = getattr(self.data, "steps_per_epoch", steps)
        schedule = Schedule(decay="constant") if self.trainer.fast_dev_run else self.schedule
        layers = self.vit.layers()
        layers["objective"] = {f"objective.{name}": p for name, p in self.objective.named_parameters()}
        optimizer = build_optimizer(self.optimizer, layers, self, self.groups, self.lr_scale())
        self._decays = self.schedule.weight_decays(optimizer)
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

    def configure_callbacks(self) -> list[Any]:
        """None; here, before their own setup, the Trainer's are checked."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            check_callbacks(self.trainer.callbacks)
        return []

    def setup(self, stage: str) -> None:
        if stage != "fit":
            self.lead(self.data)
            return
        self.compiling.check(self.trainer)
        begins = self.init_from is not None and self.trainer.ckpt_path is None
        if begins:
            self.weights = self.weights or read(str(self.init_from))
        self.check_data(self.data)
        check_accumulation(self.objective, self.trainer.accumulate_grad_batches)
        if begins and self.weights is not None:
            rank_zero_only(print)(f"weights of {self.init_from}: {self.start(self.weights)}")
            self.hparams["vit"] = describe(self.vit)  # with the settings that came with the weights
            self.objective.begin(self.vit)
            self.init_from = self.weights = None  # a second fit continues

    def start(self, weights: Weights) -> LoadReport:
        return start(self.vit, weights)

    def lead(self, data: Any) -> None:
        """Give data the weights' preprocessing and classes; UserError if it was given others. Other data is left."""
        if not hasattr(data, "follow"):
            return
        if self.weights is None:
            data.follow(self.vit)
        else:
            self.vit.preprocess = preprocess(self.weights.preprocess, self.vit)
            # The rest is a guess; and a new run may be of images of another range.
            new = {"range"} if self.init_from else set[str]()
            fixed = self.weights.preprocess.keys() - new if "preprocess" in self.weights.stated else ()
            told = self.weights.origins.get("preprocess")
            data.follow(self.vit, f"{self.weights.path} ({told})" if told else self.weights.path, fixed)

    def check_data(self, data: Any) -> None:
        """Prepare data (None for loaders) and objective for each other, once; UserError if they do not fit the ViT."""
        if self._checked == id(data):
            return
        self.lead(data)
        objective = self.objective
        check_match(objective, self.vit, data)
        if objective.teacher is not None:
            self.teachers = [load(objective.teacher)]
            objective.set_teacher(self.teachers[0])
        objective.prepare(data)
        self._checked = id(data)

    def on_train_start(self) -> None:
        self.train()  # not called by Lightning; Finetune's turns off a frozen encoder's dropout
        for teacher in self.teachers:
            teacher.to(self.device)
        self.vit.temperature = 1.0  # training makes other logits of those it was fitted on
        self.zero_grad()
        self._logs.clear()
        self._row: dict[str, float] = {}  # of the step that is to be logged
        self._total_steps = int(self.trainer.estimated_stepping_batches)
        seed = getattr(self.data, "seed", None)
        self._now.seed = global_seed() if seed is None else seed
        for config in self.trainer.lr_scheduler_configs:  # a checkpoint restores the rate of a shorter training
            follow_schedule(config.scheduler)
        self.vit.preprocess = getattr(self.data, "preprocess", self.vit.preprocess)
        self.vit.classes = self.classes

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.compiling.begin(self, batch)
        trainer = self.trainer
        now, step, optimizer = self._now, trainer.global_step, trainer.optimizers[0]
        where = (batch_idx % trainer.accumulate_grad_batches, trainer.global_rank)
        seed_step(now.seed, step, *where, self.device)
        now.first_draw = 0 if isinstance(batch, Batch) else first_draw(now.seed, step, *where)  # it has draws
        now.progress = step / self._total_steps
        # The head's. The scheduler steps before the batch ends, so it is read here.
        now.lr = max(group["lr"] for group in optimizer.param_groups)
        self.schedule.set_weight_decay(optimizer, self._decays, now.progress)

    @not_compiled
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = Batch.of(batch, self._now.first_draw)
        check_batch(self.objective, len(batch.views), len(batch.indices) * self.trainer.world_size)
        step = self.step(batch)
        self._logs.append({name: value.detach() for name, value in {"loss": step.loss, **step.logs}.items()})
        self.step_features = step.features  # Lightning would copy what is returned besides the loss
        return step.loss

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, *args, **kwargs)
        optimizer.zero_grad()  # Lightning would keep the gradients until the next forward has filled the memory
        # Not as the batch ends: callbacks that save a checkpoint then come first.
        self.objective.after_step(self.vit, self._now.progress)

    def optimizer_zero_grad(self, *_: Any) -> None:
        """Nothing: `optimizer_step`, which computes gradients once, has done it after the last."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not step_ends(self.trainer, batch_idx):
            return
        logs = self._logs
        self._logs = []
        if self.trainer.global_step == self.trainer.max_steps:
            self.trainer.should_stop = True  # mid-epoch, Lightning would end without a validation
        if logs_now(self.trainer):
            for name in logs[0]:
                mean = torch.stack([micro[name] for micro in logs]).mean()
                mean = self.trainer.strategy.reduce(mean, reduce_op="mean").cpu()
                self.log_step(f"train/{name}", mean, prog_bar=name == "loss")
            self.log_step("train/lr", torch.tensor(self._now.lr))
            row, self._row = self._row, {}
            for logger in self.trainer.loggers:
                logger.log_metrics({**row, "epoch": self.trainer.current_epoch}, self.trainer.global_step - 1)
                logger.save()

    def log_step(self, name: str, value: Tensor, prog_bar: bool = False) -> None:
        """Log a number of the optimiser step that just ended, from a callback's `on_train_batch_end`.

        `log` would have Lightning gather and read all that was ever logged in an epoch at each of its steps.
        """
        self._row[name] = float(value)
        self.trainer.callback_metrics[name] = self.trainer.logged_metrics[name] = value
        if prog_bar:
            self.trainer.progress_bar_metrics[name] = self._row[name]

    def on_train_end(self) -> None:
        Compiling(self.compiling.mode).compile(self)

    # Evaluation. torchmetrics counts every image once, on any number of devices.

    @not_compiled
    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return self._measure("test" if self.trainer.testing else "val", batch, self.step(batch))

    test_step = validation_step

    @torch.compiler.disable
    def _measure(self, split: str, batch: Any, step: Step) -> dict[str, Any]:
        labels = Batch.of(batch).labels
        measures: Any = self.measures[split]
        update(measures, step, labels)
        first = next(iter(self.measured)).removeprefix("val/")
        for name, value in {**step.logs, **measures}.items():
            of_rank = name not in measures  # torchmetrics gather by themselves
            self.log(f"{split}/{name}", value, prog_bar=name == first, batch_size=len(labels), sync_dist=of_rank)
        predicted = None
        if step.logits is not None and step.logits.ndim > 1:
            predicted = self.objective.predictions(step.logits)
        return {"probabilities": predicted, "features": step.features}

    @not_compiled
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """What the objective predicts: class probabilities (B, num_classes) or numbers (B,), float32."""
        predicted = self.objective.predictions(self.vit(Batch.of(batch).views[0]) / self.vit.temperature)
        if predicted is None:
            raise UserError(f"{type(self.objective).__name__} learns nothing to predict; finetune the weights first")
        return predicted

    # Checkpoints

    on_save_checkpoint, on_load_checkpoint = save, restore

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Rebuild a stage from its checkpoint; `Stage` loads either. Nothing in the file is executed.

        UserError if it cannot be read, holds another stage, or names a class outside the trusted packages.
        """
        record = open_checkpoint(Path(checkpoint_path)).get("hyper_parameters", {})
        check_class_paths(record)
        # Lightning would expect the arguments of `cls`, whatever the record says.
        path = str(record.get("_class_path"))
        kind: Any = next((stage for stage in subclasses(Stage) if path_of(stage) == path), cls)
        if not issubclass(kind, cls):
            raise UserError(f"{checkpoint_path} holds a {path}, not a {cls.__name__}")
        bound: Any = super(Stage, kind)
        return bound.load_from_checkpoint(checkpoint_path, *args, **{**record, **kwargs, "weights_only": True})


def on_device(trainer: Any, batch: Any) -> Batch:
    """A batch of a loader that is not the Trainer's, as a stage is given it."""
    return Batch.of(trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch)))


def step_ends(trainer: Any, batch_idx: int) -> bool:
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def logs_now(trainer: Any) -> bool:
    """Whether to log the optimiser step that just ended: one in log_every_n_steps, and the last of an epoch or run."""
    step, every = trainer.global_step, trainer.log_every_n_steps
    return bool(every) and (step % every == 0 or trainer.is_last_batch or step == trainer.max_steps)
