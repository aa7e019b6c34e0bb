"""Lightning's own callbacks in a run: which of them are refused, and what the others need."""

import re
from collections.abc import Iterable
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from vitlit.errors import UserError

# Callbacks that cannot work with a stage, and what to use instead.
REFUSED = {
    "BackboneFinetuning": "cannot unfreeze a stage; use model.freeze or model.last_blocks of Finetune",
    "BatchSizeFinder": "would change what the config says; give data.batch_size and data.micro_batch",
    "GradientAccumulationScheduler": "would change what the config says; give data.batch_size and data.micro_batch",
    "LearningRateFinder": "would change what the config says; give the optimizer's lr",
    "ModelPruning": "renames the parameters, so that no run could continue; use torch.nn.utils.prune after training",
}
# Which value is best of the metrics that vitlit logs.
HIGHEST = "top1 top1_macro top5 map r2 knn probe rank deviation images_per_second mfu"
BEST = dict.fromkeys(HIGHEST.split(), "max") | dict.fromkeys(("loss", "mae", "data_wait", "memory_gib"), "min")
RAW = "_raw"  # ends the metrics of the trained weights, beside an EMA


def best_mode(monitor: Any) -> str | None:
    """Which value of a metric is best, min or max; None of a metric that vitlit does not log."""
    split, _, name = str(monitor).partition("/")
    name = name.removesuffix(RAW)
    return BEST.get(name) if split in ("train", "val", "test") else None


def check_callbacks(callbacks: Iterable[Any]) -> None:
    """Refuse callbacks that cannot work or watch a metric the wrong way, and keep `filename` one name."""
    for callback in callbacks:
        name, *bases = (kind.__name__ for kind in type(callback).__mro__)
        for refused in (each for each in (name, *bases) if each in REFUSED):
            raise UserError(f"trainer.callbacks: {refused} {REFUSED[refused]}")
        if isinstance(callback, EarlyStopping | ModelCheckpoint):
            best = best_mode(callback.monitor)
            if best not in (None, callback.mode):
                raise UserError(f"{name}'s mode for {callback.monitor} is {callback.mode}; give mode {best}")
        if isinstance(callback, ModelCheckpoint) and callback.filename:
            name_files(callback, callback.filename)


def name_files(callback: ModelCheckpoint, filename: str) -> None:
    """Let no slash of a filename or of a metric's name make a folder: {val/top1} becomes val_top1=0.9."""
    filename = re.sub(r"/(?![^{}]*\})", "_", filename)  # not in braces, where it is a metric's
    if callback.auto_insert_metric_name:
        callback.auto_insert_metric_name = False
        filename = re.sub(r"\{([^:}]*)", lambda field: field[1].replace("/", "_") + "=" + field[0], filename)
    callback.filename = filename
