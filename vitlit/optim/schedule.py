"""Learning-rate schedules, by optimiser step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from vitlit.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from zero, a decay, and a linear cool-down to zero (big_vision, utils.py).

    Lengths are a number of steps, or text such as "5 epochs" or "10%" of the training. Update t, from 0, uses the
    learning rate of t: with a warm-up the first update has none.

    Args:
        warmup: the length over which the learning rate rises from 0.
        decay: the curve after it: cosine and linear fall to `final`; rsqrt is 1 / sqrt(1 + t / timescale), t steps
            after the warm-up; constant stays.
        cooldown: the length at the end over which the learning rate is brought to 0, for rsqrt and constant.
        timescale: steps, of rsqrt.
        final: what cosine and linear fall to, as a multiple of the peak: one step after the last, whose learning rate
            is above it by the curve's last step.
        lr_per: images of global batch that the optimizer's lr is for: the peak is lr x data.batch_size / lr_per. Unless
            given, the lr is the peak.

    Raises:
        UserError: a length is of no such form, or a number is out of range.
    """

    warmup: int | str = 0
    decay: Literal["cosine", "linear", "rsqrt", "constant"] = "cosine"
    cooldown: int | str = 0
    timescale: int = 10_000
    final: float = 0.0
    lr_per: int | None = None

    def __post_init__(self) -> None:
        for name in ("warmup", "cooldown"):
            length(f"model.schedule.{name}", getattr(self, name), 1, 1)
        if not 0 <= self.final <= 1:
            raise UserError(f"model.schedule.final {self.final} is not between 0 and 1")
        if self.timescale < 1:
            raise UserError(f"model.schedule.timescale {self.timescale} is less than 1")
        if self.timescale != Schedule.timescale and self.decay != "rsqrt":
            raise UserError(f"model.schedule.timescale is for rsqrt, not for {self.decay}; leave it out")
        if self.lr_per is not None and self.lr_per < 1:
            raise UserError(f"model.schedule.lr_per {self.lr_per} is less than 1")
        if self.final and self.decay not in ("cosine", "linear"):
            raise UserError(f"model.schedule.final is for cosine and linear; {self.decay} has cooldown")
        if self.decay in ("cosine", "linear") and length("model.schedule.cooldown", self.cooldown, 100, 1):
            raise UserError(f"model.schedule.cooldown is for rsqrt and constant; {self.decay} has final")

    def over(self, total: int, epoch: int = 0) -> Callable[[int], float]:
        """The multiple of the peak learning rate by update, in a training of `total` steps, `epoch` steps an epoch.

        Raises:
            UserError: warm-up and cool-down do not fit into the training.
        """
        warmup = length("model.schedule.warmup", self.warmup, total, epoch)
        cooldown = length("model.schedule.cooldown", self.cooldown, total, epoch)
        if warmup >= total:
            raise UserError(
                f"model.schedule.warmup is {warmup} steps but training has only {total}; "
                "give a shorter one, such as 0, or more trainer.max_epochs or trainer.max_steps"
            )
        if warmup + cooldown > total:
            raise UserError(
                f"model.schedule.warmup and cooldown are {warmup} and {cooldown} steps but training has only {total}"
            )

        def factor(step: int) -> float:
            if step < warmup:
                return step / warmup
            progress = min(1.0, (step - warmup) / (total - warmup))
            curve = {
                "cosine": self.final + (1 - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress)),
                "linear": self.final + (1 - self.final) * (1.0 - progress),
                "rsqrt": 1 / math.sqrt(1 + (step - warmup) / self.timescale),
                "constant": 1.0,
            }[self.decay]
            return curve * (min(1.0, max(0, total - step) / cooldown) if cooldown else 1.0)

        return factor


def length(name: str, value: int | str, total: int, epoch: int) -> int:
    """Steps of a length: a number, or text such as "5 epochs" or "10%" of the total.

    Raises:
        UserError: it is neither, it is negative, or the number of steps an epoch is not known.
    """
    text = str(value).strip()
    number, unit = (text[:-1], "%") if text.endswith("%") else (text.partition(" ")[0], text.partition(" ")[2].strip())
    try:
        amount = float(number)
    except ValueError:
        amount = -1.0
    if not 0 <= amount < math.inf or unit not in ("", "%", "epoch", "epochs") or (unit == "" and amount != int(amount)):
        raise UserError(f'{name} {value!r} is not a number of steps, nor text such as "5 epochs" or "10%"')
    if unit.startswith("epoch") and not epoch:
        raise UserError(f"{name} {value!r}: the steps of an epoch are not known here; give steps")
    return round(amount * {"": 1, "%": total / 100}.get(unit, epoch))
