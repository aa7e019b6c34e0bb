"""The metrics of validation and test."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MultilabelAveragePrecision
from torchmetrics.utilities import dim_zero_cat

from vitlit.errors import UserError
from vitlit.objectives import Step


class MeanAveragePrecision(MultilabelAveragePrecision):
    """The mean over classes of the average precision. torchmetrics' own mean counts a class without images as 0."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes, average="none")

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(preds, target.long())

    def compute(self) -> Tensor:  # type: ignore[override]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No positive samples")
            precisions: Tensor = super().compute()
        targets: Any = self.target
        present = dim_zero_cat(targets).sum(0) > 0
        return precisions[present].mean() if present.any() else precisions.sum()


class R2(Metric):
    """The share of the labels' variance that numbers (B,) explain. torchmetrics' own sums lose it to rounding."""

    higher_is_better, full_state_update = True, False

    def __init__(self) -> None:
        super().__init__()
        for name in ("numbers", "labels"):
            self.add_state(name, [], "cat")

    def update(self, numbers: Tensor, labels: Tensor) -> None:
        for kept, new in zip((self.numbers, self.labels), (numbers, labels), strict=True):
            kept.append(new.detach().float())  # type: ignore[union-attr, operator]

    def compute(self) -> Tensor:
        states: Any = (self.numbers, self.labels)
        numbers, labels = (dim_zero_cat(state).cpu().double() for state in states)
        return (1 - (numbers - labels).square().sum() / (labels - labels.mean()).square().sum()).float()


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
    """Add a batch to every metric."""
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
