"""Loading with and without a Trainer: the settings it needs, and a stand-in for it."""

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from vitlit.errors import UserError
from vitlit.objectives import Batch


class NoTrainer:
    """The attributes of a Trainer that loaders need, for one process on the CPU."""

    global_rank, world_size, num_devices = 0, 1, 1
    default_root_dir = "."
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    lightning_module = SimpleNamespace(dtype=torch.float32)


class BatchLoader:
    """A loader that yields each batch as a Trainer would pass it to the model: after the hooks of `data`."""

    def __init__(self, batches: DataLoader[Any], data: LightningDataModule) -> None:
        self.batches, self.data = batches, data

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            yield self.data.on_after_batch_transfer(self.data.on_before_batch_transfer(batch, 0), 0)


def set_accumulation(trainer: Any, micro_batches: int, steps: int) -> None:
    """Accumulate so many micro-batches in each of an epoch's steps, unless a setting of the Trainer contradicts."""
    if trainer.overfit_batches:  # Lightning would replace the sampler
        raise UserError("trainer.overfit_batches reads images unseeded and unmixed; give limit_train_batches")
    if trainer.accumulate_grad_batches not in (1, micro_batches):
        raise UserError("trainer.accumulate_grad_batches follows from data.batch_size and micro_batch; leave it out")
    trainer.accumulate_grad_batches = micro_batches
    limit, batches = trainer.limit_train_batches, micro_batches * steps
    batches = min(limit, batches) if isinstance(limit, int) else int(limit * batches)
    if batches < 1:
        raise UserError(f"there is nothing to train with trainer.limit_train_batches {limit}; give more")
    interval = trainer.val_check_interval
    if isinstance(interval, int) and trainer.check_val_every_n_epoch and interval > batches:
        raise UserError(
            f"trainer.val_check_interval {interval} is more than the {batches} batches of an epoch; give less, "
            "or trainer.check_val_every_n_epoch null"
        )
    if batches % micro_batches:
        raise UserError(f"trainer.limit_train_batches must be a multiple of a step's {micro_batches} micro-batches")
    # Lightning does not know that the loader starts at the run's position.
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
