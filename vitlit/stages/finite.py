"""Whether training still comes to numbers, and since which step it does not; a GPU is not waited for at every step."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitlit.errors import UserError

LOSS, GRADIENT = range(2)
NEVER = 2**63 - 1


class Finite:
    """The first steps of which the loss or the gradient was not finite.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((2,), NEVER, device=device)

    def note(self, kind: int, step: int, *values: Tensor) -> None:
        """Note whether the loss (LOSS) or the gradients (GRADIENT) of a step are finite."""
        if values:
            first = torch.where(finite(values), NEVER, step)
            self._first[kind] = torch.minimum(self._first[kind], first)

    def first_other(self) -> tuple[str, int] | None:
        """("loss" or "gradient", its first step that was not finite on any rank), None where all were."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._first, torch.distributed.ReduceOp.MIN)
        steps = self._first.tolist()
        step = min(steps)
        return None if step == NEVER else (("loss", "gradient")[steps.index(step)], step)


def finite(values: Iterable[Tensor]) -> Tensor:
    """Whether all elements of all tensors are finite, a scalar on their device; of a sharded tensor, its own part."""
    parts: list[Tensor] = [getattr(value, "_local_tensor", value) for value in values]
    # A norm is finite where all elements are, but for one so large that training is over just the same.
    norms: Any = torch._foreach_norm([part.float() if part.dtype == torch.float16 else part for part in parts])
    return torch.stack([norm.float() for norm in norms]).isfinite().all()


def all_finite(values: Iterable[Tensor]) -> bool:
    """Whether all elements of all tensors are finite."""
    return bool(finite([value.detach() for value in values]).item())


def no_number(trainer: Any, what: str, step: int | None = None) -> UserError:
    """The error of a training that has come to no number, which names the checkpoint that is good and the images."""
    run = Path(trainer.default_root_dir)
    last = run / "checkpoints" / "last.ckpt"
    good = f"; the last good checkpoint is {last}" if last.is_file() else ""
    shown = step is not None and (run / "config.yaml").is_file()
    show = f"; vitlit data show {run} --step {step} lists the images" if shown else ""
    return UserError(
        f"{what}{show}; lower the learning rate, clip gradients (trainer.gradient_clip_val) or use more precision, and "
        f"begin again (--run.overwrite true){good}"
    )
