"""Parameter groups and learning-rate schedules."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from vitlit.errors import UserError

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]


def parameter_groups(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """Split trainable parameters into those that weight decay acts on and the rest.

    Kernels decay: the weights of linear layers and convolutions. Biases, norms, the class token and the position
    table do not (big_vision, `configs/vit_s16_i1k.py`).
    """
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for module in modules:
        for layer in module.modules():
            for name, parameter in layer.named_parameters(recurse=False):
                if parameter.requires_grad:
                    kernel = name == "weight" and isinstance(layer, nn.Linear | nn.Conv2d)
                    (decayed if kernel else rest).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from zero, then decay to zero at the last step.

    Args:
        warmup: optimiser steps over which the learning rate rises from 0.
        decay: the curve after it.
    """

    warmup: int = 0
    decay: Literal["cosine", "linear"] = "cosine"

    def factor(self, step: int, total: int) -> float:
        """The multiple of the peak learning rate that update `step` (from 0) of `total` uses."""
        if step < self.warmup:
            return step / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, total - self.warmup))
        return 1.0 - progress if self.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))

    def check(self, total: int) -> None:
        """Raise UserError where the warm-up is negative or would outlast the training."""
        if self.warmup < 0:
            raise UserError(f"model.schedule.warmup {self.warmup} is less than 0")
        if self.warmup >= total:
            raise UserError(
                f"model.schedule.warmup is {self.warmup} steps but training has only {total:.0f}; "
                "give a shorter one, such as 0, or more trainer.max_epochs or trainer.max_steps"
            )
