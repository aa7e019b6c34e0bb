"""How fast training is, how much of its time it waits for data, and what share of the device it takes."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from vitlit.benchmark.mfu import flop_of_step, peak_memory, peak_tflops, without_values
from vitlit.objectives import Batch, Objective
from vitlit.stages import Stage
from vitlit.stages.stage import logs_now, step_ends

WARM_UP = 3  # steps: a compiler works in the first, and CUDA graphs are recorded in those after it


class Throughput(Callback):
    """Log speed, waiting for data, the use of the device and its memory with each loss.

    train/images_per_second is that of all devices. train/data_wait is the share of time spent waiting for data; on a
    GPU, where the host runs ahead, the time that the device idles between batches, their copy to it included. train/mfu
    is the share of the devices' peak, where that is known, that the model's own matrix products take (2204.02311,
    appendix B). train/memory_gib is the most memory of this process so far: torch's on a GPU, else all. The first three
    steps, validation and saving do not count. List it after callbacks that save in `on_train_batch_start`.

    Args:
        peak_tflops: of one device, dense, in the precision of the training; by default that of NVIDIA's data sheet.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        self.peak_tflops = peak_tflops

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        device, self._peak, self._flop = trainer.strategy.root_device, self.peak_tflops, 0.0
        if stage == "fit" and self._peak is None and device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            self._peak = peak_tflops(name, trainer.precision)
            if self._peak is None:
                why = f"the peak of {name} in {trainer.precision} is not known; give --run.peak_tflops"
                rank_zero_only(print)(f"train/mfu is not logged: {why}", flush=True)
        # Before fsdp2 shards it: then it could not be copied.
        self._vit = without_values(pl_module.vit) if self._peak and isinstance(pl_module, Stage) else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._on_gpu, self._warm = pl_module.device.type == "cuda", trainer.global_step + WARM_UP
        self._restart()  # a run that continues within an epoch has no on_train_epoch_start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart()

    def on_validation_end(self, *_: Any) -> None:
        self._interrupted = True

    on_save_checkpoint: Any = on_validation_end

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._interrupted or trainer.global_step <= self._warm:
            self._restart()
        self._gaps.append((self._ended, self._now()))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._ended = self._now()
        self._images += len(Batch.of(batch).labels) * trainer.world_size
        if step_ends(trainer, batch_idx) and logs_now(trainer) and trainer.global_step > self._warm:
            if self._on_gpu:
                self._ended.synchronize()
            elapsed = time.perf_counter() - self._began
            waits = (ended.elapsed_time(begun) / 1000 if self._on_gpu else begun - ended for ended, begun in self._gaps)
            speed, wait = self._images / elapsed, min(1.0, sum(waits) / elapsed)
            logs = {"images_per_second": speed, "data_wait": wait, "memory_gib": peak_memory(pl_module.device)}
            if self._vit is not None:
                self._count(pl_module.objective, Batch.of(batch))
            if self._flop and self._peak:
                logs["mfu"] = self._flop * speed / (trainer.world_size * self._peak * 1e12)
            self._begin_lap()
            log = pl_module.log_step if isinstance(pl_module, Stage) else pl_module.log
            for name, value in logs.items():
                # As a tensor of the host: of a number Lightning's log makes one on the device, and reads it every step.
                log(f"train/{name}", torch.tensor(value), prog_bar=True)

    def _count(self, objective: Objective, batch: Batch) -> None:
        """Once: the FLOP of an image's step."""
        assert self._vit is not None
        try:
            self._flop = flop_of_step(self._vit, objective, batch) / len(batch.labels)
        except Exception as error:  # of an objective that reads values; training goes on
            name, why = type(objective).__name__, " ".join(str(error).split())[:200]
            rank_zero_only(print)(f"train/mfu is not logged: {name} needs more than shapes ({why})", flush=True)
        self._vit = None

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _restart(self) -> None:
        """Discard the counts, since something other than training took time."""
        self._ended, self._interrupted = self._now(), False
        if self._on_gpu:
            self._ended.synchronize()  # or what is still in the queue would count
        self._begin_lap()

    def _begin_lap(self) -> None:
        self._began, self._images = time.perf_counter(), 0
        self._gaps: list[tuple[Any, Any]] = []  # from the end of a batch to the beginning of the next
