"""Stops training when numbers overflow, before they reach a checkpoint."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.optim import Optimizer

from vitlit.errors import UserError
from vitlit.stages.stage import logs_now, step_ends

NEVER = 2**63 - 1
MOST = 1000  # losses that are kept


class NonFinite(Callback):
    """Stop when a loss, a gradient or a weight is not finite, and warn after training if the loss rose.

    The UserError names the step, its images and the last good checkpoint. Losses and the gradients' norms stay on the
    device until losses are logged, a checkpoint is written or there are a thousand, so no other step waits for the GPU.
    With trainer.precision 16-mixed gradients are not tested: the scaler does, and skips such a step.
    """

    def __init__(self) -> None:
        self._losses: list[tuple[int, Tensor]] = []  # by step, since they were read
        self._found: list[tuple[int, Tensor]] = []  # in gradients

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses.clear()
        self._found.clear()
        self._one = torch.ones((), device=pl_module.device)
        self._first_loss: Tensor | None = None  # that this training logged

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if trainer.precision != "16-mixed":
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self._found.append((trainer.global_step, nonfinite(gradients, self._one)))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._first_loss is None:
            self._first_loss = trainer.callback_metrics.get("train/loss")
        ended = step_ends(trainer, batch_idx)
        self._losses.append((trainer.global_step - ended, outputs["loss"]))
        if len(self._losses) == MOST or (ended and logs_now(trainer)):
            self._check(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit":
            return
        if not trainer.sanity_checking:
            self._check(trainer)
        loss = pl_module.measures["val"]["loss"].compute().item()
        if not math.isfinite(loss):
            raise nonfinite_error(trainer, f"the validation loss is {loss} after step {trainer.global_step}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check(trainer)
        wrong = bool(nonfinite([p.detach() for p in pl_module.parameters()], torch.ones((), device=pl_module.device)))
        if trainer.strategy.reduce_boolean_decision(wrong, all=False):
            raise nonfinite_error(trainer, f"a weight is not finite after step {trainer.global_step}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._first_loss is None:
            return
        first, last = float(self._first_loss), float(trainer.callback_metrics["train/loss"])
        if last > 1.5 * max(first, 0.5):  # a small loss may double by chance
            rose = f"train/loss rose from {first:,.4g} to {last:,.4g}; lower the learning rate"
            rank_zero_only(print)(f"vitlit: warning: {rose}", flush=True)

    def _check(self, trainer: Trainer) -> None:
        """Raise UserError if a loss or a gradient was not finite on any rank."""
        steps = [first_step(self._losses, lambda loss: not math.isfinite(loss)), first_step(self._found, bool)]
        if trainer.world_size > 1:
            of_all = torch.tensor(steps, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(of_all, torch.distributed.ReduceOp.MIN)
            steps = of_all.tolist()
        if (step := min(steps)) == NEVER:
            return
        samples = getattr(trainer.datamodule, "samples", None)  # type: ignore[attr-defined]
        indices = list(dict.fromkeys(sample.index for sample in samples(step))) if samples else []
        listed = " ".join(map(str, indices[:8])) + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")
        images = f" (training images {listed})" if indices else ""
        what = ("loss", "gradient")[steps.index(step)]
        raise nonfinite_error(trainer, f"the {what} of step {step}{images} is not finite", step)


def first_step(values: list[tuple[int, Tensor]], wrong: Callable[[float], bool]) -> int:
    """The first step whose value is wrong, or NEVER; the list is emptied."""
    if not values:
        return NEVER
    steps, tensors = zip(*values, strict=True)
    values.clear()
    numbers = torch.stack(tensors).tolist()
    return next((step for step, number in zip(steps, numbers, strict=True) if wrong(number)), NEVER)


def nonfinite(values: list[Tensor], one: Tensor) -> Tensor:
    """1 if an element is not finite, else 0, on their device: by the gradient scaler's kernel, which divides by one."""
    # Of a plain tensor, to look for what it lacks would take as long as the rest.
    parts: list[Tensor] = [each if type(each) is Tensor else getattr(each, "_local_tensor", each) for each in values]
    found = torch.zeros_like(one)
    for dtype in {part.dtype for part in parts}:
        of_type = [part for part in parts if part.dtype == dtype]
        torch._amp_foreach_non_finite_check_and_unscale_(of_type, found, one)
    return found


def nonfinite_error(trainer: Trainer, what: str, step: int | None = None) -> UserError:
    """The error for numbers that are not finite, with the remedy and the last good checkpoint."""
    run = Path(trainer.default_root_dir)
    last = run / "checkpoints" / "last.ckpt"
    good = f"; the last good checkpoint is {last}" if last.is_file() else ""
    shown = step is not None and (run / "config.yaml").is_file()
    show = f"; vitlit data show {run} --step {step} lists the images" if shown else ""
    remedy = "lower the learning rate, give trainer.gradient_clip_val or more precision, and begin again"
    return UserError(f"{what}{show}; {remedy} (--run.overwrite true){good}")
