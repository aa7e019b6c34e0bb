"""The metrics of validation and test."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from vitlit.errors import UserError
from vitlit.evaluation.metrics import R2, MeanAveragePrecision
from vitlit.objectives import Step

# Metrics that an objective may name, made for a number of outputs.
KNOWN: dict[str, Callable[[int], Metric]] = {
    "top1": lambda classes: MulticlassAccuracy(classes, average="micro"),
    "top1_macro": lambda classes: MulticlassAccuracy(classes, average="macro"),
    "top5": lambda classes: MulticlassAccuracy(classes, average="micro", top_k=5),
    "map": MeanAveragePrecision,
    "mae": lambda outputs: MeanAbsoluteError(),
    "r2": lambda outputs: R2(),
}


def metrics(wanted: Mapping[str, Any]) -> nn.ModuleDict:
    """loss, and what `Objective.metrics` asks for: a metric, or for a name in KNOWN the number of outputs."""
    # NaN stays NaN: torchmetrics 1.9 drops it by default, and drops the weights with "disable".
    chosen: dict[str, Metric] = {"loss": MeanMetric(nan_strategy=math.nan)}
    for name, what in wanted.items():
        if not isinstance(what, Metric) and name not in KNOWN:
            raise UserError(f"the metric {name} is none of {' '.join(KNOWN)}; give a torchmetrics.Metric of that name")
        chosen[name] = what.clone() if isinstance(what, Metric) else KNOWN[name](what)
    return nn.ModuleDict(chosen)


def update(measures: nn.ModuleDict, step: Step, labels: Tensor) -> None:
    for name, metric in measures.items():
        assert isinstance(metric, Metric)
        if name == "loss":
            metric.update(step.loss, len(labels))
        else:
            metric.update(step.logits, labels if step.targets is None else step.targets)


def direction(name: str, metric: Any = None) -> str:
    """Which value of a metric or a log is best, min or max: what the metric says, else by the name."""
    higher = getattr(metric, "higher_is_better", None)
    by_name = not name.endswith(("loss", "error", "mae", "mse"))
    return "max" if (by_name if higher is None else higher) else "min"
