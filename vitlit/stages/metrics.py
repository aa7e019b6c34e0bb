"""What a stage is measured by."""

import math
import warnings
from typing import Any

from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MultilabelAveragePrecision
from torchmetrics.utilities import dim_zero_cat


class MeanAveragePrecision(MultilabelAveragePrecision):
    """The mean over classes of the average precision. torchmetrics' own counts a class without images as 0."""

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
    """Loss, and for classes top1 (micro), top1_macro and, above five classes, top5; for several labels an image, map.

    map is the mean of the classes' average precisions, of those that have an image.
    """
    # NaN stays NaN: by default it would be left out, and "disable" leaves out the weights (torchmetrics 1.9).
    found: dict[str, Metric] = {"loss": MeanMetric(nan_strategy=math.nan)}
    if multi_label:
        found["map"] = MeanAveragePrecision(classes)
    elif classes:
        found["top1"] = MulticlassAccuracy(classes, average="micro")
        found["top1_macro"] = MulticlassAccuracy(classes, average="macro")
        if classes > 5:
            found["top5"] = MulticlassAccuracy(classes, average="micro", top_k=5)
    return nn.ModuleDict(found)


def update(measures: nn.ModuleDict, loss: Tensor, logits: Tensor | None, labels: Tensor) -> None:
    """Count a batch into every metric."""
    for name, metric in measures.items():
        assert isinstance(metric, Metric)
        if name == "loss":
            metric.update(loss, len(labels))
        elif name == "map":
            metric.update(logits, labels.int())
        else:
            metric.update(logits, labels)
