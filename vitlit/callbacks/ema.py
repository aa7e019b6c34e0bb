"""An exponential moving average of the weights, evaluated beside the weights that are trained."""

import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics import Metric

from vitlit.errors import UserError
from vitlit.objectives import Batch
from vitlit.stages import Stage
from vitlit.stages.fsdp import gather_full
from vitlit.stages.metrics import update
from vitlit.weights.adapt import set_numerics


class EMA(WeightAveraging):
    """Keep average <- decay x average + (1 - decay) x weights after every step, by Lightning's own averaging.

    `val/*` and the checkpoints are those of the average; `val/*_raw` are of the trained weights, which last.ckpt holds,
    too.

    Args:
        decay: the share of the average that a step keeps; 0.9999 averages over the last ten thousand steps or so.

    Raises:
        UserError: the decay is not between 0 and 1, or the weights that are trained are not float32.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"an EMA's decay {decay} is not at least 0 and below 1")
        self.decay = decay
        super().__init__()
        self._raw: nn.ModuleDict | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.precision in ("bf16-true", "16-true"):
            raise UserError(
                f"an EMA cannot average weights of trainer.precision {trainer.precision}, which are too coarse for its "
                "steps; use bf16-mixed"
            )
        if stage == "fit":
            average = get_ema_multi_avg_fn(self.decay)
            self._average_model = AveragedModel(pl_module, pl_module.device, multi_avg_fn=average)
            copy: Any = self._average_model.module
            copy.configure_model()  # what is sharded cannot be copied, so the copy is sharded by itself

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._average_model is not None
        assert isinstance(pl_module, Stage)
        # It was copied before the module had its device and precision, and before weights told their numerics.
        assert isinstance(pl_module.dtype, torch.dtype)
        self._average_model.to(pl_module.device, pl_module.dtype)
        copy: Any = self._average_model.module
        set_numerics(copy.vit, pl_module.vit.config.plain())
        steps = trainer.estimated_stepping_batches
        if 5 / (1 - self.decay) > steps:
            # A tenth of the training, rounded; one of less than 50 steps has no time for an average.
            remedy = "leave EMA out" if steps < 50 else f"{1 - float(f'{10 / steps:.1g}'):g} would fit"
            rank_zero_only(print)(
                f"vitlit: warning: an EMA with decay {self.decay:g} averages over {1 / (1 - self.decay):,.0f} steps, "
                f"much of a training of {steps:,.0f}, so that it lags behind; {remedy}",
                flush=True,
            )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The checkpoint was not created with WeightAveraging")
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if self._average_model is not None and "averaging_state" not in checkpoint:
            rank_zero_only(print)(
                "the checkpoint has no average of weights (EMA); it begins with its weights", flush=True
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_start(trainer, pl_module)  # the two change places
        if self._average_model is not None and not trainer.sanity_checking:
            assert isinstance(pl_module, Stage)
            self._average_model.module.eval()
            self._raw = pl_module.new_metrics().to(pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._raw is not None and self._average_model is not None:
            raw: Any = self._average_model.module
            with trainer.precision_plugin.forward_context():
                step = raw.step(batch)
            update(self._raw, step.loss, step.logits, Batch.of(batch).labels)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, metric in (self._raw or {}).items():
            assert isinstance(metric, Metric)
            pl_module.log(f"val/{name}_raw", metric.compute())
        self._raw = None
        super().on_validation_epoch_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["state_dict"] = gather_full(checkpoint["state_dict"], keep=trainer.is_global_zero)
