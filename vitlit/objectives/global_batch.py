"""Statistics of the global batch, the rows of every device, with right gradients where devices average theirs.

Every device must ask for the same, in the same order. Without torch.distributed the batch is the global one.
"""

from typing import Any

import torch
from torch import Tensor, distributed, nn


class DeviceMean(torch.autograd.Function):
    """The mean over devices, of a tensor and of its gradient: training's loss is the mean of the devices' losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total / device_count()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return DeviceMean.apply(*gradients)


def device_count() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def device_mean(x: Tensor) -> Tensor:
    """The mean over the devices of a tensor, which has the same shape on each."""
    mean: Tensor = DeviceMean.apply(x) if device_count() > 1 and not x.is_meta else x
    return mean


def gather(rows: Tensor) -> Tensor:
    """The rows of all devices, in their order: (B, D) -> (devices x B, D)."""
    if (devices := device_count()) == 1:
        return rows
    before = distributed.get_rank() * len(rows)
    return device_mean(nn.functional.pad(rows, (0, 0, before, (devices - 1) * len(rows) - before))) * devices


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation (1502.03167) of (rows, width) by the global batch. nn.SyncBatchNorm needs GPUs."""

    def forward(self, rows: Tensor) -> Tensor:
        x = rows.to(torch.promote_types(rows.dtype, torch.float32))
        mean, var = (buffer for buffer in (self.running_mean, self.running_var) if buffer is not None)
        if self.training:
            old, mean = (mean, var), device_mean(x.mean(0))
            var = device_mean((x - mean).square().mean(0))
            for buffer, new in zip(old, (mean, var), strict=True):
                buffer.lerp_(new.detach().to(buffer.dtype), self.momentum or 0)
        return ((x - mean) * (var + self.eps).rsqrt() * self.weight + self.bias).to(rows.dtype)
