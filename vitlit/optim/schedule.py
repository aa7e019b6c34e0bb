"""Schedules of learning rate and weight decay, by optimiser step."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vitlit.errors import UserError, check_range, check_types


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, a decay, and a linear cool-down to zero (big_vision, utils.py).

    A length is a number of steps, or text such as "5 epochs" or "10%" of the training. With a warm-up the first update
    has a learning rate of `start`. What is out of range raises UserError.

    Args:
        warmup: length of the rise from `start` to the peak.
        decay: the curve after the warm-up: cosine and linear fall to `final`; rsqrt is 1 / sqrt(1 + t / timescale), t
            steps after the warm-up; constant stays at the peak.
        cooldown: length of the fall to 0 at the end, for rsqrt and constant.
        timescale: steps, for rsqrt.
        final: where cosine and linear end, one step after the last, as a multiple of the peak.
        lr_per: the global batch that lr is meant for: the peak is lr x data.batch_size / lr_per, by default lr.
        start: where the warm-up begins, as a multiple of the peak.
        interval: how often the rate changes. epoch is facebookresearch/deit's (`main.py`): epochs 0 and 1 have the
            first rate, epoch n that of n - 1, and the decay counts from the beginning, not from the warm-up's end.
        weight_decay_end: where the optimizer's weight decay ends, one step after the last, by a cosine over the whole
            training (2104.14294, section 3.2). By default it does not change.
    """

    warmup: int | str = 0
    decay: Literal["cosine", "linear", "rsqrt", "constant"] = "cosine"
    cooldown: int | str = 0
    timescale: int = 10_000
    final: float = 0.0
    lr_per: int | None = None
    start: float = 0.0
    interval: Literal["step", "epoch"] = "step"
    weight_decay_end: float | None = None

    def __post_init__(self) -> None:
        check_types(type(self), vars(self), "model.schedule.")
        for name in ("warmup", "cooldown"):
            length(f"model.schedule.{name}", getattr(self, name), 1, 1)
        check_range("model.schedule", 0, 1, start=self.start, final=self.final)
        check_range("model.schedule", 0, weight_decay_end=self.weight_decay_end or 0)
        check_range("model.schedule", 1, timescale=self.timescale, lr_per=1 if self.lr_per is None else self.lr_per)
        if self.start and not length("model.schedule.warmup", self.warmup, 100, 1):
            raise UserError("model.schedule.start is for a warm-up; give model.schedule.warmup, or leave it out")
        if self.timescale != Schedule.timescale and self.decay != "rsqrt":
            raise UserError(f"model.schedule.timescale is for rsqrt, not for {self.decay}; leave it out")
        if self.final and self.decay not in ("cosine", "linear"):
            raise UserError(f"model.schedule.final is for cosine and linear; {self.decay} has cooldown")
        if self.decay in ("cosine", "linear") and length("model.schedule.cooldown", self.cooldown, 100, 1):
            raise UserError(f"model.schedule.cooldown is for rsqrt and constant; for {self.decay}, give final")

    def weight_decays(self, optimizer: Optimizer) -> list[float]:
        """The weight decays of an optimizer's groups, with which `set_weight_decay` begins; empty if none changes."""
        if self.weight_decay_end is None:
            return []
        if not optimizer.defaults.get("weight_decay"):
            raise UserError("model.schedule.weight_decay_end: the optimizer has no weight_decay to begin with; give it")
        return [group["weight_decay"] for group in optimizer.param_groups]

    def set_weight_decay(self, optimizer: Optimizer, begun: list[float], progress: float) -> None:
        """Set the weight decay of every group for a share of the training, progress in [0, 1)."""
        if self.weight_decay_end is not None:
            ratio = self.weight_decay_end / optimizer.defaults["weight_decay"]
            factor = ratio + (1 - ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
            for group, decay in zip(optimizer.param_groups, begun, strict=True):
                group["weight_decay"] = decay * factor

    def over(self, total: int, epoch: int = 0) -> Callable[[int], float]:
        """The learning rate by step, as a multiple of the peak, for `total` steps with `epoch` in each epoch."""
        by_epoch = self.interval == "epoch"
        if by_epoch and not epoch:
            raise UserError("model.schedule.interval epoch: the steps of an epoch are not known here; give step")
        warmup = length("model.schedule.warmup", self.warmup, total, epoch)
        cooldown = length("model.schedule.cooldown", self.cooldown, total, epoch)
        if warmup >= total:
            remedy = "give less, or more trainer.max_epochs or trainer.max_steps"
            raise UserError(f"model.schedule.warmup is {warmup} steps but training has only {total}; {remedy}")
        if warmup + cooldown > total:
            raise UserError(f"model.schedule.warmup and cooldown are {warmup} and {cooldown} of only {total} steps")

        def factor(step: int) -> float:
            if by_epoch:
                step = max(0, step // epoch - 1) * epoch
            if step < warmup:
                return self.start + (1 - self.start) * (step / warmup)
            since = step if by_epoch else step - warmup
            progress = min(1.0, since / (total if by_epoch else total - warmup))
            curve = {
                "cosine": self.final + (1 - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress)),
                "linear": self.final + (1 - self.final) * (1.0 - progress),
                "rsqrt": 1 / math.sqrt(1 + since / self.timescale),
                "constant": 1.0,
            }[self.decay]
            return curve * (min(1.0, max(0, total - step) / cooldown) if cooldown else 1.0)

        return factor


def follow_schedule(scheduler: Any) -> None:
    """Give the optimizer the rates of this schedule at its step, if that is known without the steps before."""
    if isinstance(scheduler, LambdaLR):
        rates = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        for group, peak, factor in rates:
            group["lr"] = peak * factor(scheduler.last_epoch)


def length(name: str, value: int | str, total: int, epoch: int) -> int:
    """A length in steps, given the steps of the training and of an epoch (0 if unknown)."""
    match = re.fullmatch(r"(\d*\.?\d+(?:e\+?\d\d?)?)\s*(%|epochs?|)", str(value).strip())
    if not match or (not match[2] and float(match[1]) % 1):
        raise UserError(f'{name} {value!r} is not a number of steps, nor text such as "5 epochs" or "10%"')
    amount, unit = float(match[1]), match[2]
    if unit.startswith("epoch") and not epoch:
        raise UserError(f"{name} {value!r}: the steps of an epoch are not known here; give steps")
    return round(amount * {"": 1, "%": total / 100}.get(unit, epoch))
