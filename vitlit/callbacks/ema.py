"""An exponential moving average of the weights, evaluated along with the trained weights."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vitlit.errors import UserError
from vitlit.objectives import Batch
from vitlit.run.fsdp import gather_full
from vitlit.stages.metrics import metrics, update
from vitlit.weights.adapt import set_numerics


class Average(AveragedModel):
    """torch's, whose update does not ask the device at every step whether it is the first."""

    multi_avg_fn: Any
    _members: list[list[Tensor]] | None = None  # of the average and of the model

    def update_parameters(self, model: nn.Module) -> None:
        if self._members is None:
            self._members = [[p.detach() for p in part.parameters()] for part in (self.module, model)]
            if not self.n_averaged:
                for average, current in zip(*self._members, strict=True):
                    average.copy_(current)
        self.multi_avg_fn(*self._members, self.n_averaged)
        for average, current in zip(self.module.buffers(), model.buffers(), strict=True):
            average.copy_(current)
        self.n_averaged += 1


class EMA(WeightAveraging):
    """After every step, average <- decay x average + (1 - decay) x weights, with Lightning's WeightAveraging.

    `val/*` and the checkpoints hold the average; `val/*_raw` measure the trained weights, which last.ckpt holds too.
    A decay that is not in [0, 1) and trained weights that are not float32 raise UserError.

    Args:
        decay: the share of the average that a step keeps; 0.9999 averages over about the last 10,000 steps.
    """

    _average_model: Any

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"EMA: decay {decay} is not at least 0 and below 1")
        self.decay = decay
        super().__init__()
        self._raw: nn.ModuleDict | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.precision in ("bf16-true", "16-true"):
            raise UserError(f"an EMA cannot average weights of trainer.precision {trainer.precision}; use bf16-mixed")
        if stage == "fit":
            average = get_ema_multi_avg_fn(self.decay)
            self._average_model = Average(pl_module, pl_module.device, multi_avg_fn=average)
            self._average_model.module.configure_model()  # sharded weights cannot be copied, only sharded again

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        # The copy was made before the module had its device and precision, and before weights set its numerics.
        self._average_model.to(pl_module.device, pl_module.dtype)
        set_numerics(self._average_model.module.vit, pl_module.vit.config.plain())
        steps = trainer.estimated_stepping_batches
        if 5 / (1 - self.decay) > steps:
            # A tenth of the training, rounded; fewer than 50 steps are too few for an average.
            remedy = "leave EMA out" if steps < 50 else f"{1 - float(f'{10 / steps:.1g}'):g} would fit"
            lags = f"an EMA with decay {self.decay:g} lags behind in a training of {steps:,.0f} steps; {remedy}"
            rank_zero_only(print)(f"vitlit: warning: {lags}", flush=True)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_validation_epoch_start(trainer, pl_module)  # swaps the two
        if self._average_model is not None and not trainer.sanity_checking:
            pl_module.compiling.compile(self._average_model.module.eval())
            self._average_model.module.vit.preprocess = pl_module.vit.preprocess  # of the data, for MaskedPatch
            self._raw = metrics(pl_module.objective.metrics()).to(pl_module.device)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        if self._raw is not None:
            with trainer.precision_plugin.forward_context():
                step = self._average_model.module.step(batch)
            update(self._raw, step, Batch.of(batch).labels)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raw: Any = self._raw or {}
        for name, metric in raw.items():
            pl_module.log(f"val/{name}_raw", metric.compute())
        self._raw = None
        super().on_validation_epoch_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["state_dict"] = average = gather_full(checkpoint["state_dict"], keep=trainer.is_global_zero)
        trained = checkpoint.get("current_model_state", {})
        for name, parameter in pl_module.named_parameters():
            frozen = not parameter.requires_grad and name in average and name in trained
            if frozen and torch.equal(average[name], trained[name].to(average[name])):  # a teacher moves
                average[name] = trained[name]  # torch.save writes one tensor once
