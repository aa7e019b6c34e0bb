"""torch.compile in a stage: whether, how, and which part.

One graph of a block serves all but the last, if that computes the class token alone. A block of S/16 compiles in a
twelfth of the time of the whole step, and steps as fast (inductor on one CPU core: 6 s and 75 s; 2.56 s and 2.60 s).
For CUDA graphs, the whole step is compiled.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only

from vitlit.errors import UserError, without_compiler
from vitlit.model import ViT
from vitlit.model.block import Block
from vitlit.objectives import Batch, Step

Compile = bool | str
MODES = ("auto", False, "default", "reduce-overhead", "max-autotune")
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


class Compiling:
    """How a stage is compiled while it trains: in place, so that the names in its state dict stay."""

    def __init__(self, mode: Compile) -> None:
        if mode not in MODES:
            raise UserError(f"model.compile is {mode}; give auto, false, default, reduce-overhead or max-autotune")
        self.mode = mode
        self._chosen: Compile | None = None  # by the first batch
        self._shapes: dict[bool, list[torch.Size]] = {}

    def check(self, trainer: Any) -> None:
        """Before training: UserError if this machine or this training cannot be compiled as asked."""
        sharded = isinstance(trainer.strategy, ModelParallelStrategy)
        if self.mode in CUDA_GRAPHS and (sharded or trainer.accumulate_grad_batches > 1):
            raise UserError(f"model.compile {self.mode} excludes fsdp2 and micro-batches; give model.compile default")
        if self.mode not in ("auto", False) and (lacking := without_compiler(trainer.strategy.root_device.type)):
            raise UserError(f"model.compile {self.mode}: {lacking}, or give model.compile false")

    def begin(self, stage: Any, batch: Any) -> None:
        """Before the first batch: choose, and compile."""
        if self._chosen is not None:
            return
        self._chosen = self.mode
        if self.mode == "auto":
            self._chosen = stage.device.type == "cuda" and worthwhile(stage.trainer, stage.vit, Batch.of(batch))
            if self._chosen and (lacking := without_compiler(stage.device.type)):
                rank_zero_only(print)(f"vitlit: warning: model.compile auto compiles nothing: {lacking}", flush=True)
                self._chosen = False
        if self._chosen:
            rank_zero_only(print)(f"model.compile {self._chosen}: the first step compiles", flush=True)
            torch.compiler.reset()  # or graphs of earlier stages would count against torch's limit
            # A graph a block, of training and of evaluation, where blocks differ in their stochastic depth.
            torch._dynamo.config.recompile_limit = max(8, 2 * len(stage.vit.blocks))
        self.compile(stage)

    def compile(self, stage: Any) -> None:
        """Compile what was chosen in a stage: its own, or the copy of an EMA."""
        before, stage.compiling = stage.compiling, self
        if not (self._chosen or before._chosen):
            return
        # Otherwise inductor may time kernels that round differently, and take the fastest.
        options = torch._inductor.list_mode_options(str(self._chosen or "default"))
        options["deterministic"] = torch.are_deterministic_algorithms_enabled()
        for part in (part for root in (stage, *stage.teachers) for part in root.modules()):
            part._compiled_call_impl = None
            if self._chosen and (part is stage.objective if self._chosen in CUDA_GRAPHS else isinstance(part, Block)):
                part.compile(dynamic=False, options=options)

    def step(self, stage: Any, batch: Batch, progress: Any) -> Step:
        """The objective's step. Compiled is the first shape of batch, not an evaluation's smaller last."""
        shapes = [part.shape for part in (*batch.views, batch.labels)] if self._chosen else []
        other = bool(self._chosen) and self._shapes.setdefault(stage.training, shapes) != shapes
        if other or self._chosen not in CUDA_GRAPHS:
            with torch.compiler.set_stance("force_eager") if other else nullcontext():
                return Step(*stage.objective(stage.vit, batch, progress))
        torch.compiler.cudagraph_mark_step_begin()
        # A float would become part of the graph, and a copy from the host would wait for the device.
        step = stage.objective(stage.vit, batch, torch.full((), progress, device=batch.labels.device))
        # The next step's results will be in the same memory.
        own: Any = [part.clone() if isinstance(part, torch.Tensor) else part for part in step]
        return Step(*own)._replace(logs={name: log.clone() for name, log in step.logs.items()})


def worthwhile(trainer: Any, vit: ViT, batch: Batch) -> Compile:
    """How to compile a training on a GPU: False for less than a minute, CUDA graphs where launching takes longest."""
    tokens = sum(len(view) * (vit.prefix + math.prod(vit.grid_of(*view.shape[-2:]))) for view in batch.views)
    # 6 FLOP for a parameter and token (2001.08361, section 2.1), of 100 TFLOP/s
    computing = 6 * sum(parameter.numel() for parameter in vit.parameters()) * tokens / 1e14
    launching = len(vit.blocks) * 60 * 1e-5  # 60 kernels a block and step, each in 10 microseconds
    micro = trainer.accumulate_grad_batches
    if int(trainer.estimated_stepping_batches) * micro * max(computing, launching) < 60:
        return False
    alone = micro == trainer.world_size == 1 and not isinstance(trainer.strategy, ModelParallelStrategy)
    return "reduce-overhead" if alone and launching > computing else "default"
