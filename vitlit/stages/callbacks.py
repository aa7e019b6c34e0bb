"""Lightning's own callbacks beside a stage: which of them are refused, and what the others need."""

import re
from collections.abc import Iterable
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint

from vitlit.errors import UserError
from vitlit.stages.metrics import KNOWN, direction

BASES = ("Callback", "Checkpoint", "BaseFinetuning", "BasePredictionWriter", "ProgressBar")
# Callbacks that cannot work with a stage, and what to use instead.
REFUSED = {
    "BackboneFinetuning": "cannot unfreeze a stage; use model.freeze or model.last_blocks of Finetune",
    "BatchSizeFinder": "would change what the config says; give data.batch_size and data.micro_batch",
    "GradientAccumulationScheduler": "would change what the config says; give data.batch_size and data.micro_batch",
    "LearningRateFinder": "would change what the config says; give the optimizer's lr",
    "ModelPruning": "renames the parameters, so that no run could continue; use torch.nn.utils.prune after training",
}
# The metrics that vitlit logs and that have a best value.
JUDGED = {*KNOWN, "loss", "knn", "probe", "rank", "deviation", "images_per_second", "data_wait", "mfu", "memory_gib"}
RAW = "_raw"  # of the trained weights, beside an EMA


def best_mode(monitor: Any) -> str | None:
    """Which value of a metric is best, min or max; None of a metric that vitlit does not log."""
    split, _, name = str(monitor).partition("/")
    name = name.removesuffix(RAW)
    return direction(name) if split in ("train", "val", "test") and name in JUDGED else None


def refuse(name: str) -> None:
    """Raise UserError if a callback of this name cannot work with a stage."""
    if name in REFUSED:
        raise UserError(f"trainer.callbacks: {name} {REFUSED[name]}")
    if name in BASES:
        raise UserError(f"trainer.callbacks: {name} is a base class, which does nothing; name one derived from it")


def check_callbacks(callbacks: Iterable[Any]) -> None:
    """Refuse callbacks that cannot work, do nothing or watch a metric the wrong way, and keep `filename` one name."""
    for callback in callbacks:
        name = type(callback).__name__
        refuse(name)
        for base in type(callback).__mro__[1:]:
            if base.__name__ in REFUSED:
                refuse(base.__name__)
        if type(callback) is LambdaCallback and not vars(callback):
            raise UserError("trainer.callbacks: LambdaCallback without a function does nothing; derive from Callback")
        if not isinstance(callback, EarlyStopping | ModelCheckpoint):
            continue
        best = best_mode(callback.monitor)
        if best not in (None, callback.mode):
            words = "highest" if best == "max" else "lowest"
            raise UserError(
                f"{name}'s mode is {callback.mode}, but the {words} {callback.monitor} is best; give mode {best}"
            )
        if isinstance(callback, ModelCheckpoint) and callback.filename:
            name_files(callback, callback.filename)


def name_files(callback: ModelCheckpoint, filename: str) -> None:
    """Let no slash of a filename or of a metric's name make a folder: {val/top1} becomes val_top1=0.9."""
    fields = re.split(r"(\{[^}]*\})", filename)  # every second is one
    fields[::2] = [text.replace("/", "_") for text in fields[::2]]
    if callback.auto_insert_metric_name:
        callback.auto_insert_metric_name = False
        names = [re.split("[:}]", field[1:])[0].replace("/", "_") for field in fields[1::2]]
        fields[1::2] = [f"{name}={field}" for name, field in zip(names, fields[1::2], strict=True)]
    callback.filename = "".join(fields)
