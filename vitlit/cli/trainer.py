"""Lightning's Trainer with automatic precision and whole checkpoints, its settings checked, its loggers harmless."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer, WeightAveraging
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _PRECISION_INPUT

from vitlit.benchmark.model import automatic
from vitlit.callbacks import EMA
from vitlit.errors import UserError
from vitlit.run.callbacks import best_mode, check_callbacks
from vitlit.run.checkpoints import Best, Files
from vitlit.run.folder import RunFolder
from vitlit.run.fsdp import FSDP2
from vitlit.run.interrupt import Interrupted
from vitlit.run.ranks import launched
from vitlit.stages import Stage
from vitlit.stages.metrics import direction
from vitlit.weights.checkpoint import open_checkpoint

# Settings of the Trainer that a config must leave at their defaults, and why.
FIXED = {
    "barebones": (False, "best.ckpt and last.ckpt are always kept"),
    "default_root_dir": (None, "the run's folder is run.root and run.name"),
    "enable_checkpointing": (None, "best.ckpt and last.ckpt are always kept"),
    "max_time": (None, "it would end the run as if it were complete; use run.time_limit"),
}


class Trainer(LightningTrainer):
    """Lightning's Trainer with precision `auto` by default, which writes checkpoints whole or not at all.

    Args:
        logger: by default and for true vitlit.loggers.Wandb, for false none; the run's metrics.csv is written besides.
        precision: auto is bf16-mixed on a GPU with bf16, 16-mixed on one without, and 32-true on a CPU.
    """

    def __init__(
        self,
        *,
        logger: list[Logger] | Logger | bool | None = None,
        precision: Literal["auto"] | _PRECISION_INPUT = "auto",
        **kwargs: Any,
    ) -> None:
        for name in ("check_val_every_n_epoch", "val_check_interval"):  # Lightning would divide by 0
            if isinstance(kwargs.get(name), int | float) and not kwargs[name] > 0:
                raise UserError(f"trainer.{name} {kwargs[name]} is not above 0")
        accelerator = kwargs.get("accelerator", "auto")
        gpu = torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda")
        if precision == "auto":
            precision = automatic(torch.device("cuda" if gpu else "cpu"))  # type: ignore[assignment]
        elif not gpu and str(precision) in ("16-true", "16-mixed", "16"):
            raise UserError(f"trainer.precision {precision} needs a GPU; on this machine use bf16-mixed or 32-true")
        try:
            super().__init__(logger=logger, precision=precision, **kwargs)  # type: ignore[arg-type]
        except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
            remedy = " Use trainer.accelerator cpu or auto." if "backend found" in str(error) else ""
            raise UserError(f"trainer: {error}{remedy}") from error
        callbacks: Any = self.callbacks  # type: ignore[attr-defined]
        check_callbacks(callbacks)
        skip_empty_hooks(callbacks)
        sharded = isinstance(self.strategy, FSDP2)
        for callback in callbacks:
            if sharded and isinstance(callback, WeightAveraging) and not isinstance(callback, EMA):
                raise UserError(f"fsdp2 does not work with {type(callback).__name__}; use vitlit.callbacks.EMA")
            if isinstance(callback, Timer) and callback.time_remaining() is not None:
                raise UserError("Timer's duration would end the run as if it were complete; use run.time_limit")
        if sharded and self.precision in ("16-mixed", "16-true"):
            raise UserError(f"trainer.strategy fsdp2 does not work with {self.precision}; use bf16-mixed or 32-true")
        if isinstance(self.strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy) and not sharded:
            raise UserError(f"trainer.strategy {type(self.strategy).__name__} is not supported; give ddp or fsdp2")
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:  # Lightning's, which a kill may leave half written
            self.strategy.checkpoint_io = Files()


STEP_HOOKS = [name for name in vars(Callback) if name.startswith(("on_train_batch_", "on_before_", "on_after_"))]


def skip_empty_hooks(callbacks: list[Any]) -> None:
    """Make None of a step's hooks that do nothing: Lightning calls what is callable, which costs more than most do."""
    for callback in callbacks:
        for hook in STEP_HOOKS:
            if getattr(getattr(callback, hook), "__func__", None) is getattr(Callback, hook):
                setattr(callback, hook, None)


def listed(given: Any) -> list[Any]:
    """trainer.callbacks, which may be none, one or a list, as a list."""
    return given if isinstance(given, list) else [] if given is None else [given]


# Callbacks that a run which is kept has no use for.
REPLACED = {
    "OnExceptionCheckpoint": "would save beside last.ckpt, which run.save_minutes saves; leave it out",
    "StochasticWeightAveraging": "averages after the last checkpoint, so that none holds it; use vitlit.callbacks.EMA",
}


def fill_modes(callbacks: Any, given: bool) -> None:
    """Refuse callbacks that are of no use, and fill in the mode of a monitored accuracy unless a mode was `given`."""
    for callback in listed(callbacks):
        name, options = callback.class_path.rpartition(".")[2], callback.get("init_args") or Namespace()
        if name in REPLACED:  # now, since some cannot be recorded
            raise UserError(f"trainer.callbacks: {name} {REPLACED[name]}")
        if name in ("EarlyStopping", "ModelCheckpoint") and not given:
            options.mode = best_mode(options.get("monitor")) or options.mode


def fill_folders(trainer: Namespace, folder: RunFolder) -> None:
    """Keep a further ModelCheckpoint out of the folder of the run's own checkpoints, by default in RUN/kept."""
    for callback in listed(trainer.callbacks):
        if callback.class_path.endswith(".ModelCheckpoint"):
            options = callback.init_args
            options.dirpath = options.get("dirpath") or str(folder.path / "kept")
            if Path(options.dirpath).resolve() == folder.last.parent.resolve():
                raise UserError(f"ModelCheckpoint: {options.dirpath} is for best.ckpt and last.ckpt; give another")


def measured(stage: Stage, callbacks: Iterable[Any], data: Any) -> dict[str, str]:
    """Which value of each validation metric is best: the objective's, those that callbacks measure, then the loss."""
    found = stage.measured
    loss = found.pop("val/loss")
    for callback in callbacks:
        found |= callback.measures(data) if hasattr(callback, "measures") else {}
    return {**found, "val/loss": loss}


def check_monitors(trainer: LightningTrainer, stage: Stage, data: Any) -> None:
    """Refuse a callback whose metric nothing logs: it would end the run after its first epoch."""
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    known = [*measured(stage, callbacks, data)]
    if any(isinstance(callback, EMA) for callback in callbacks):
        known += [f"{name}_raw" for name in known]
    of_training = ("loss", "lr", "rank", "deviation", "images_per_second", "data_wait", "memory_gib", "mfu")
    known += [f"train/{name}" for name in of_training]
    makers = {type(part).__module__.partition(".")[0] for part in (stage.objective, *callbacks)}
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if not isinstance(callback, EarlyStopping | ModelCheckpoint) or monitor is None or isinstance(callback, Best):
            continue
        if monitor in known:
            continue
        # The user's own callbacks and objective may log metrics of their own.
        if makers <= {"vitlit", "lightning"} or get_close_matches(monitor, known, 1, 0.7):
            raise UserError(f"{type(callback).__name__}'s monitor {monitor} is not among {' '.join(known)}")


def check_trainer(config: Namespace) -> None:
    """Refuse Trainer settings that vitlit sets itself, and training without an end."""
    for key, (default, why) in FIXED.items():
        if config[key] != default:
            raise UserError(f"trainer.{key} cannot be set: {why}")
    if (nodes := config.num_nodes) > 1 and not launched():
        raise UserError(f"trainer.num_nodes is {nodes}: start each node with torchrun or srun, or leave it out")
    ends = (config.max_epochs, config.max_steps)
    if not config.fast_dev_run and ends in ((None, -1), (-1, -1)):
        raise UserError("training has no end; set trainer.max_epochs or trainer.max_steps")
    if 0 in ends:
        raise UserError("there is nothing to train; set trainer.max_epochs or trainer.max_steps above 0")


def monitor(stage: Stage, given: str | None, callbacks: Iterable[Any], data: Any) -> tuple[str, str]:
    """The metric of the best checkpoint, run.monitor or the first that is known, and its best value: min or max."""
    known = measured(stage, callbacks, data)
    name = given or next(iter(known))
    if name == "val/loss" != given and not stage.objective.loss_ranks:
        return "step", "max"  # which Lightning knows besides what is logged
    own = type(stage.objective).__module__.partition(".")[0] != "vitlit"  # what it logs is known when it has validated
    if name not in known and not (own and name.startswith("val/")):
        probes = "; vitlit.callbacks.Probes measures it" if name in ("val/knn", "val/probe") else ""
        raise UserError(f"run.monitor {name} is not among {' '.join(known)}{probes}")
    return name, known.get(name, direction(name))


def check_length(trainer: LightningTrainer, stage: Stage, steps_per_epoch: int, start: Path | None) -> None:
    """Refuse a training that is too short for its schedule, or that the checkpoint `start` has finished."""
    limits = (trainer.max_steps, (trainer.max_epochs or -1) * steps_per_epoch)
    end = min(limit for limit in limits if limit > 0)
    stage.schedule.over(end, steps_per_epoch)
    if start is not None and (step := open_checkpoint(start)["global_step"]) >= end:
        raise UserError(f"{start} is at step {step}, training ends at {end}; give more trainer.max_epochs or max_steps")


METHODS = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint")
OURS = ("log_config", "log_classes", "log_mistakes", "log_image", "close")  # Wandb's further ones


def harmless(logger: Any) -> Any:
    """A logger whose first failure is a warning, after which it is left out: metrics.csv has the numbers."""
    failed: list[Exception] = []

    def guarded(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if failed:
            return None
        try:
            return method(*args, **kwargs)
        except (UserError, Interrupted):  # a mistake in its settings, or a signal
            raise
        except Exception as error:
            failed.append(error)
            name, why = type(logger).__name__, " ".join(f"{type(error).__name__}: {error}".split())
            print(f"vitlit: warning: {name} failed ({why}) and is left out from here", flush=True)

    for name in (*METHODS, *OURS):
        if hasattr(logger, name):
            setattr(logger, name, partial(guarded, getattr(logger, name)))
    return logger
