"""The Trainer that loads the data: what is set on it, and what stands in for it where there is none."""

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from vitlit.errors import UserError
from vitlit.objectives import Batch


class Alone:
    """One process on the CPU, with those attributes of a Trainer that loaders need."""

    global_rank, world_size, num_devices = 0, 1, 1
    default_root_dir = "."
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    lightning_module = SimpleNamespace(dtype=torch.float32)


class Ready:
    """A loader that yields each batch as a Trainer would pass it to the model.

    Args:
        batches: as they are collated.
        data: whose hooks finish them.
    """

    def __init__(self, batches: DataLoader[Any], data: LightningDataModule) -> None:
        self.batches, self.data = batches, data

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            yield self.data.on_after_batch_transfer(self.data.on_before_batch_transfer(batch, 0), 0)


def set_accumulation(trainer: Any, micro_batches: int, steps: int) -> None:
    """Set how many batches the Trainer accumulates for an optimiser step.

    Args:
        trainer: before it trains.
        micro_batches: of a step.
        steps: of an epoch.

    Raises:
        UserError: a setting of the Trainer contradicts them.
    """
    if trainer.overfit_batches:  # Lightning would put its own sampler in
        raise UserError("trainer.overfit_batches reads images unseeded and unmixed; give limit_train_batches")
    if trainer.accumulate_grad_batches not in (1, micro_batches):
        raise UserError(
            "trainer.accumulate_grad_batches follows from data.batch_size and data.micro_batch; leave it out"
        )
    trainer.accumulate_grad_batches = micro_batches
    limit, whole = trainer.limit_train_batches, micro_batches * steps
    batches = min(limit, whole) if isinstance(limit, int) else int(limit * whole)
    if batches < 1:
        raise UserError(f"there is nothing to train with trainer.limit_train_batches {limit}; give more")
    interval = trainer.val_check_interval
    if isinstance(interval, int) and trainer.check_val_every_n_epoch and interval > batches:
        raise UserError(
            f"trainer.val_check_interval {interval} is more than the {batches} batches of an epoch; give less, "
            "or trainer.check_val_every_n_epoch"
        )
    if batches % micro_batches:
        raise UserError(f"trainer.limit_train_batches must be a multiple of the {micro_batches} of a step")
    # Lightning cannot know that the loader starts where the run is.
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
