"""Metrics that torchmetrics counts otherwise."""

import warnings
from typing import Any

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MultilabelAveragePrecision
from torchmetrics.utilities import dim_zero_cat


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
