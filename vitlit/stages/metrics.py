"""The metrics of validation and test."""

import math
import warnings
from typing import Any

from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MultilabelAveragePrecision
from torchmetrics.utilities import dim_zero_cat


class MeanAveragePrecision(MultilabelAveragePrecision):
    """The mean over classes of the average precision. torchmetrics' own mean counts a class without images as 0."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes, average="none")

    def compute(self) -> Tensor:  # type: ignore[override]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No positive samples")
            precisions: Tensor = super().compute()
        targets: Any = self.target
        present = dim_zero_cat(targets).sum(0) > 0
        return precisions[present].mean() if present.any() else precisions.sum()


def metrics(classes: int, multi_label: bool) -> nn.ModuleDict:
    """loss, and top1 (micro), top1_macro and, above five classes, top5; or map for several labels per image.

    map is the mean of the average precision over the classes that have images. Without classes there is only loss.
    """
    # NaN stays NaN: torchmetrics 1.9 drops it by default, and drops the weights with "disable".
    chosen: dict[str, Metric] = {"loss": MeanMetric(nan_strategy=math.nan)}
    if multi_label:
        chosen["map"] = MeanAveragePrecision(classes)
    elif classes:
        chosen["top1"] = MulticlassAccuracy(classes, average="micro")
        chosen["top1_macro"] = MulticlassAccuracy(classes, average="macro")
        if classes > 5:
            chosen["top5"] = MulticlassAccuracy(classes, average="micro", top_k=5)
    return nn.ModuleDict(chosen)


def update(measures: nn.ModuleDict, loss: Tensor, logits: Tensor | None, labels: Tensor) -> None:
    """Add a batch to every metric."""
    for name, metric in measures.items():
        assert isinstance(metric, Metric)
        if name == "loss":
            metric.update(loss, len(labels))
        else:
            metric.update(logits, labels.long())
