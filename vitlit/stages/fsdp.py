"""Fully sharded data parallelism (FSDP2): every device holds a share of each weight, its gradient and its state."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import LBFGS, Adafactor, Optimizer

from vitlit.errors import UserError


class FSDP2(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy over data alone, `trainer.strategy: fsdp2`, with the checkpoints of one device.

    Lightning's own load would pass over what a stage and its callbacks make of a checkpoint (LoRA's adapters, an EMA),
    and give an optimizer state of several parameter groups to other parameters than those it is of.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if isinstance(optimizer, Adafactor | LBFGS):
                raise UserError(
                    f"trainer.strategy fsdp2 does not work with {type(optimizer).__name__}, which needs a weight as a "
                    "whole; use AdamW, LAMB or SGD, or trainer.strategy ddp"
                )

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return whole(optimizer.state_dict(), keep=self.is_global_zero)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        sharded = self.lightning_module.state_dict()
        for part in ("state_dict", "current_model_state"):  # an EMA's checkpoint has both
            for name, tensor in checkpoint.get(part, {}).items():
                checkpoint[part][name] = shared(tensor, sharded.get(name))
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            # Torch numbers parameters in the order of the groups.
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            of = dict(zip(numbers, parameters, strict=False))  # torch itself refuses groups of other sizes
            shares = {
                number: {name: shared(value, of.get(number)) for name, value in values.items()}
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": shares})


StrategyRegistry.register("fsdp2", FSDP2, description="Fully sharded data parallelism with PyTorch's fully_shard")


def shard(module: LightningModule, parts: Iterable[nn.Module], methods: Iterable[str]) -> None:
    """Shard a module's weights over the devices, one group a part and one for the rest. A second call does nothing.

    Args:
        module: the whole, on every rank with the same weights.
        parts: whose weights are gathered and let go one after another.
        methods: of the module, beside forward, that compute with the weights.
    """
    if module.device_mesh is None or isinstance(module, FSDPModule):
        return
    mesh = module.device_mesh["data_parallel"]
    for part in [*parts, module]:
        # The whole, too: weights are in shards outside of a step, as an EMA takes for granted.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    for method in methods:
        register_fsdp_forward_method(module, method)


def whole(state: dict[str, Any], keep: bool) -> dict[str, Any]:
    """A state with its shards put together, on the CPU, for the rank that keeps it; {} for the others.

    Every rank must call it.
    """

    def join(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: join(item) for name, item in value.items()}
        if isinstance(value, DTensor):
            tensor = value.full_tensor()
            return tensor.cpu() if keep else None
        return value

    joined: dict[str, Any] = join(state)
    return joined if keep else {}


def shared(value: Any, like: Any) -> Any:
    """This rank's share of a whole tensor, where a parameter of that shape is sharded; else the value as it is."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    share = torch.empty_like(like, dtype=value.dtype, requires_grad=False)  # of its own, not a view of the whole
    return share.copy_(distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None))
