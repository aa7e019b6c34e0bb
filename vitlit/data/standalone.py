"""Loading without a Trainer: a stand-in for it, and a loader of finished batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from vitlit.objectives import Batch


class NoTrainer:
    """What loaders need of a Trainer, for one process on the CPU."""

    is_global_zero = True
    global_rank, local_rank, world_size, num_devices = 0, 0, 1, 1
    limit_train_batches, accumulate_grad_batches = 1.0, 1
    default_root_dir = "."
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    lightning_module = SimpleNamespace(dtype=torch.float32)


@dataclass
class BatchLoader:
    """Yields each batch as a Trainer would pass it to the model: after the hooks of `data`."""

    batches: DataLoader[Any]
    data: LightningDataModule

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            yield self.data.on_after_batch_transfer(self.data.on_before_batch_transfer(batch, 0), 0)
