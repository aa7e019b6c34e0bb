"""Lightning's Trainer with automatic precision, checkpoints written whole, and its settings checked."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _PRECISION_INPUT

from vitlit.callbacks import EMA
from vitlit.errors import UserError
from vitlit.run.checkpoints import Files
from vitlit.stages import Stage
from vitlit.stages.fsdp import FSDP2
from vitlit.weights.checkpoint import open_checkpoint

# Settings of the Trainer that a config must leave at their defaults, and why.
FIXED = {
    "accumulate_grad_batches": (1, "it follows from data.batch_size and data.micro_batch"),
    "barebones": (False, "best.ckpt and last.ckpt are always kept"),
    "default_root_dir": (None, "the run's folder is run.root and run.name"),
    "enable_checkpointing": (None, "best.ckpt and last.ckpt are always kept"),
    "overfit_batches": (0.0, "it would read images unseeded and unmixed; set limit_train_batches"),
    "max_time": (None, "it would end the run as if it were complete; set max_steps, or stop the run with SIGTERM"),
}


class Trainer(LightningTrainer):
    """Lightning's Trainer with precision `auto` by default, which writes checkpoints whole or not at all.

    Args:
        precision: auto is bf16-mixed on a GPU with bf16, 16-mixed on one without, and 32-true on a CPU.
    """

    def __init__(self, *, precision: Literal["auto"] | _PRECISION_INPUT = "auto", **kwargs: Any) -> None:
        for name in ("check_val_every_n_epoch", "val_check_interval"):  # Lightning would divide by 0
            if isinstance(kwargs.get(name), int | float) and not kwargs[name] > 0:
                raise UserError(f"trainer.{name} {kwargs[name]} is not above 0")
        if not (kwargs.get("gradient_clip_val") or 0) >= 0:
            raise UserError(f"trainer.gradient_clip_val {kwargs['gradient_clip_val']} is negative; 0 turns it off")
        accelerator = kwargs.get("accelerator", "auto")
        gpu = torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda")
        if precision == "auto":
            mixed = "bf16-mixed" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
            precision = mixed if gpu else "32-true"  # type: ignore[assignment]
        elif not gpu and str(precision) in ("16-true", "16-mixed", "16"):
            raise UserError(f"trainer.precision {precision} needs a GPU; on this machine use bf16-mixed or 32-true")
        try:
            super().__init__(precision=precision, **kwargs)  # type: ignore[arg-type]
        except MisconfigurationException as error:
            if "backend found" in str(error):
                raise UserError(f"trainer.accelerator {accelerator}: no GPU is found; use cpu or auto") from error
            raise
        except (ValueError, TypeError, RuntimeError, ImportError) as error:  # an unknown strategy, among others
            raise UserError(f"trainer: {error}") from error
        for callback in self.callbacks:  # type: ignore[attr-defined]
            name = type(callback).__name__
            if isinstance(callback, BatchSizeFinder | GradientAccumulationScheduler | LearningRateFinder):
                remedy = "give data.batch_size, data.micro_batch and the optimizer's lr"
                raise UserError(f"trainer.callbacks: {name} would change what the config says; {remedy}")
            averages = isinstance(callback, WeightAveraging | StochasticWeightAveraging)
            if isinstance(self.strategy, FSDP2) and averages and not isinstance(callback, EMA):
                raise UserError(f"trainer.strategy fsdp2 does not work with {name}; use vitlit.callbacks.EMA")
        if isinstance(self.strategy, FSDP2):
            if self.precision in ("16-mixed", "16-true"):
                remedy = "use bf16-mixed, or 32-true where the GPU has no bf16"
                raise UserError(f"trainer.strategy fsdp2 does not work with precision {self.precision}; {remedy}")
        elif isinstance(self.strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy):
            remedy = "give ddp, or fsdp2 where the model is too large for one device"
            raise UserError(f"trainer.strategy {type(self.strategy).__name__} is not supported; {remedy}")
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:  # Lightning's, which a kill may leave half written
            self.strategy.checkpoint_io = Files()


def check_monitors(trainer: LightningTrainer, stage: Stage) -> None:
    """Refuse a callback whose metric nothing logs: it would end the run after its first epoch."""
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    known = stage.measured
    if any(isinstance(callback, WeightAveraging) for callback in callbacks):
        known += [f"{name}_raw" for name in known]
    known += [f"train/{name}" for name in ("loss", "lr", "images_per_second", "data_wait")]
    makers = {type(part).__module__.partition(".")[0] for part in (stage.objective, *callbacks)}
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if not isinstance(callback, EarlyStopping | ModelCheckpoint) or monitor is None or monitor in known:
            continue
        # The user's own callbacks and objective may log metrics of their own.
        if makers <= {"vitlit", "lightning"} or get_close_matches(monitor, known, 1, 0.7):
            raise UserError(f"{type(callback).__name__}'s monitor {monitor} is not among {' '.join(known)}")


def check_trainer(config: Namespace) -> None:
    """Refuse Trainer settings that vitlit sets itself, and training without an end."""
    for key, (default, why) in FIXED.items():
        if config[key] != default:
            raise UserError(f"trainer.{key} cannot be set: {why}")
    ends = (config.max_epochs, config.max_steps)
    if not config.fast_dev_run and ends in ((None, -1), (-1, -1)):
        raise UserError("training has no end; set trainer.max_epochs or trainer.max_steps")
    if 0 in ends:
        raise UserError("there is nothing to train; set trainer.max_epochs or trainer.max_steps above 0")


def monitor(stage: Stage, given: str | None) -> str:
    """The metric of the best checkpoint: run.monitor, else accuracy, else the loss; UserError if nothing logs it."""
    name = given or next(name for name in ("val/top1", "val/map", "val/loss") if name in stage.measured)
    if name not in stage.measured:
        raise UserError(f"run.monitor {name} is not among {' '.join(stage.measured)}")
    return name


def check_length(trainer: LightningTrainer, stage: Stage, steps_per_epoch: int, start: Path | None) -> None:
    """Refuse a training that is too short for its schedule, or that the checkpoint `start` has finished."""
    limits = (trainer.max_steps, (trainer.max_epochs or -1) * steps_per_epoch)
    end = min(limit for limit in limits if limit > 0)
    stage.schedule.over(end, steps_per_epoch)
    if start is not None and (step := open_checkpoint(start)["global_step"]) >= end:
        more = "give more --trainer.max_epochs or --trainer.max_steps"
        raise UserError(f"{start} is at step {step}, and this training ends at step {end}; {more}")
