"""How fast training is, and how much of its time it waits for data."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from vitlit.objectives import Batch
from vitlit.stages.stage import logs_now, step_ends


class Throughput(Callback):
    """Log train/images_per_second and train/data_wait, the share of time spent waiting for data, with each loss.

    The wait is the time between two batches, and before an epoch's first. On a GPU, where the host runs ahead, it is
    the time that the device idles between events in its own queue, including the copy of the batch to the device.
    Validation and saving count in neither. List it after callbacks that save checkpoints in `on_train_batch_start`.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._on_gpu = pl_module.device.type == "cuda"
        self._restart()  # a run that continues within an epoch has no on_train_epoch_start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._interrupted = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._interrupted = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._interrupted:
            self._restart()
        self._gaps.append((self._ended, self._now()))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._ended = self._now()
        self._images += len(Batch.of(batch).labels) * trainer.world_size
        if step_ends(trainer, batch_idx) and logs_now(trainer):
            if self._on_gpu:
                self._gaps[-1][1].synchronize()
            elapsed = time.perf_counter() - self._began
            waits = (ended.elapsed_time(begun) / 1000 if self._on_gpu else begun - ended for ended, begun in self._gaps)
            speed, wait = self._images / elapsed, min(1.0, sum(waits) / elapsed)
            self._begin_lap()
            # As tensors of the host: of a number Lightning makes one on the device, and reads it at every step.
            pl_module.log("train/images_per_second", torch.tensor(speed), prog_bar=True)
            pl_module.log("train/data_wait", torch.tensor(wait), prog_bar=True)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _restart(self) -> None:
        """Discard the counts, since something other than training took time."""
        self._begin_lap()
        self._ended, self._interrupted = self._now(), False

    def _begin_lap(self) -> None:
        self._began, self._images = time.perf_counter(), 0
        self._gaps: list[tuple[Any, Any]] = []  # from the end of a batch to the beginning of the next
