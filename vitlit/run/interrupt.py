"""Stopping a run cleanly: on a signal, or at its time limit."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from vitlit.data.workers import STOP_SIGNALS
from vitlit.run.checkpoints import Last

TIME_LIMIT = signal.SIGALRM  # stands for run.time_limit among the signal numbers
SAVE = 1  # less than any of them: asks for a checkpoint only
OUTSIDE = (signal.SIGTERM, signal.SIGUSR1)  # handled outside of training too, where Python handles Ctrl-C
AGAIN = 75  # the exit code of a run to be continued: EX_TEMPFAIL of sysexits.h


class Interrupted(Exception):
    """A signal or the time limit ended the run; in training all ranks `agreed`, and saved a checkpoint first."""

    def __init__(self, number: int, step: int | None = None) -> None:
        name = "run.time_limit" if number == TIME_LIMIT else signal.Signals(number).name
        super().__init__(f"stopped by {name} " + ("outside of training" if step is None else f"after step {step}"))
        self.agreed = step is not None
        self.code = AGAIN if number in (TIME_LIMIT, signal.SIGUSR1) else 128 + number


@contextmanager
def signals_handled(training: bool) -> Iterator[None]:
    """Let a signal before or after training, and one that `vitlit.cli` held back, end the process as in training."""
    before = {number: signal.signal(number, _end) for number in OUTSIDE if training}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OUTSIDE)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: Any) -> None:
    raise Interrupted(number)


class Interrupt(Callback):
    """On SIGTERM, SIGINT, SIGUSR1 or at the time limit, finish the step, save last.ckpt and end training on every rank.

    If the step ends an epoch, the epoch is validated first. A second SIGINT stops at once. Lightning's handling, which
    this replaces, saves nothing, exits 0, and hangs if only one rank gets a signal.
    """

    def __init__(self, last: Last, until: float | None, save_minutes: float) -> None:
        self.last, self.save_seconds = last, 60 * save_minutes
        self.until = until  # time.monotonic() at which training stops
        self.received = 0
        self._handlers: dict[int, Any] = {}  # those that these replace
        self._exchanged: tuple[Tensor, torch.cuda.Event | None] = torch.zeros(1), None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # A later hook is too late to set handlers: between Lightning's registration and the next hook lies a barrier,
        # where Lightning's handler of SIGTERM hangs if not every rank gets the signal.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        # It would wait for the GPU at every step.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        for number in STOP_SIGNALS:
            self._handlers[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop = trainer.fit_loop
        if loop.restarted_on_epoch_end:  # with max_steps, Lightning would count that epoch again
            loop.epoch_progress.increment_completed()
            loop.reset_restart_stage()
            loop.epoch_loop.restarting = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches:
            return
        wanted = self._agreed(trainer, self._wanted())
        # At an epoch's first batch, the checkpoint of the previous epoch is up to date.
        if batch_idx and (wanted or self.last.due(trainer.global_step)):
            self._save(trainer)
        if wanted > SAVE:
            raise Interrupted(wanted, trainer.global_step)

    def _wanted(self) -> int:
        """What this rank wants: the number of a signal, TIME_LIMIT, SAVE or 0."""
        if self.received:
            return self.received
        now = time.monotonic()
        if self.until is not None and now >= self.until:
            return TIME_LIMIT
        return SAVE if now - self.last.saved_at >= self.save_seconds else 0

    def _agreed(self, trainer: Trainer, wanted: int) -> int:
        """The highest number that any rank wanted; with several ranks, at the step before."""
        if trainer.world_size == 1:
            return wanted
        flag = torch.tensor([wanted], dtype=torch.int32).to(trainer.strategy.root_device, non_blocking=True)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        # Copied now, it has arrived by the next step; copied then, it would wait for all that the GPU has queued.
        host = flag.to("cpu", non_blocking=True)
        copied = torch.cuda.current_stream().record_event() if flag.is_cuda else None
        (agreed, arrived), self._exchanged = self._exchanged, (host, copied)
        if arrived is not None:
            arrived.synchronize()
        return int(agreed.item())

    def _save(self, trainer: Trainer) -> None:
        progress = trainer.fit_loop.epoch_loop.batch_progress
        counts, was_last = (progress.total, progress.current), progress.is_last_batch
        for count in counts:
            count.ready -= 1  # the continued run begins this batch again
        progress.is_last_batch = False
        self.last.save(trainer)
        for count in counts:
            count.ready += 1
        progress.is_last_batch = was_last

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        launcher = trainer.strategy.launcher
        if launcher is not None and not getattr(exception, "agreed", False):
            launcher.kill(signal.SIGKILL)  # the other ranks would wait for this process forever

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def requeue() -> None:
    """Requeue the SLURM job that this process belongs to, unless it is interactive."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
        print(f"SLURM job {job} is requeued", flush=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", None) or str(error)
        print(f"vitlit: warning: scontrol did not requeue job {job} ({why.strip()}); submit it again", flush=True)
