"""Fully sharded data parallelism (FSDP2): every device holds a shard of each weight, gradient and optimizer state."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import LBFGS, Adafactor, Optimizer

from vitlit.errors import UserError
from vitlit.optim import Muon


class FSDP2(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy for data alone, `trainer.strategy: fsdp2`; its checkpoints are one device's."""

    # Lightning's own ignore what a stage and its callbacks change in a checkpoint (LoRA's adapters, an EMA), and mix up
    # the parameters in an optimizer state of several groups.
    load_checkpoint = Strategy.load_checkpoint
    lightning_restore_optimizer = Strategy.lightning_restore_optimizer

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if isinstance(optimizer, Adafactor | LBFGS | Muon):
                raise UserError(f"{type(optimizer).__name__} needs full weights, which fsdp2 shards; use ddp")

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return gather_full(optimizer.state_dict(), keep=self.is_global_zero)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        sharded = self.lightning_module.state_dict()
        for part in ("state_dict", "current_model_state"):  # an EMA's checkpoint has both
            for name, tensor in checkpoint.get(part, {}).items():
                checkpoint[part][name] = to_shard(tensor, sharded.get(name))
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            # Torch numbers parameters in the order of the groups, and refuses groups of other sizes.
            parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
            shards = {
                number: {name: to_shard(value, parameters.get(number)) for name, value in values.items()}
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": shards})


StrategyRegistry.register("fsdp2", FSDP2, description="Fully sharded data parallelism with PyTorch's fully_shard")


def shard(stage: LightningModule, blocks: Iterable[nn.Module], methods: Iterable[str]) -> None:
    """Shard a stage, one group per block and one for the rest; `methods`, like forward, compute with the weights."""
    if stage.device_mesh is None or isinstance(stage, FSDPModule):
        return
    for part in [*blocks, stage]:
        # The stage too: an EMA expects weights to be in shards outside of a step.
        fully_shard(part, mesh=stage.device_mesh["data_parallel"], reshard_after_forward=True)
    for method in methods:
        register_fsdp_forward_method(stage, method)


def gather_full(state: Any, keep: bool) -> Any:
    """A state with full tensors on the CPU in place of shards, on the ranks that keep it. Every rank must call it."""
    if isinstance(state, dict):
        gathered = {name: gather_full(value, keep) for name, value in state.items()}
        return gathered if keep else {}
    if isinstance(state, DTensor):
        tensor = state.full_tensor()
        return tensor.cpu() if keep else None
    return state


def to_shard(value: Any, like: Any) -> Any:
    """This rank's shard of a full tensor if `like` is a sharded parameter of its shape, else the value as it is."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    full = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return torch.empty_like(like, dtype=value.dtype, requires_grad=False).copy_(full)  # own memory, not a view of value
