"""What a stage is measured by."""

import math

from torch import nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MultilabelAveragePrecision


def metrics(classes: int, multi_label: bool) -> nn.ModuleDict:
    """Loss, and for classes top1 (micro), top1_macro and, above five classes, top5; for several labels an image, map.

    map is the mean over classes of the average precision.
    """
    # NaN stays NaN: by default it would be left out, and "disable" leaves out the weights (torchmetrics 1.9).
    found: dict[str, Metric] = {"loss": MeanMetric(nan_strategy=math.nan)}
    if multi_label:
        found["map"] = MultilabelAveragePrecision(classes, average="macro")
    elif classes:
        found["top1"] = MulticlassAccuracy(classes, average="micro")
        found["top1_macro"] = MulticlassAccuracy(classes, average="macro")
        if classes > 5:
            found["top5"] = MulticlassAccuracy(classes, average="micro", top_k=5)
    return nn.ModuleDict(found)


def update(measures: nn.ModuleDict, loss: object, logits: object, labels: object, size: int) -> None:
    """Count a batch of `size` images into every metric."""
    for name, metric in measures.items():
        assert isinstance(metric, Metric)
        if name == "loss":
            metric.update(loss, size)
        elif name == "map":
            metric.update(logits, labels.int())  # type: ignore[attr-defined]
        else:
            metric.update(logits, labels)
