"""Small stages, their data and their trainer, and what a run of them leaves."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from vitlit.callbacks import NonFinite, Throughput
from vitlit.data import ImageFolderData
from vitlit.model import ViT
from vitlit.objectives import Supervised
from vitlit.optim import Schedule
from vitlit.stages import Finetune, Pretrain, Stage

TINY: dict[str, Any] = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 2, "heads": 2, "mlp_dim": 32}


class Memory(Logger):
    """Keeps what is logged: name -> (step, value) pairs."""

    name = version = "memory"

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, list[tuple[int | None, float]]] = {}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.rows.setdefault(name, []).append((step, value))


def perturbed(module: nn.Module) -> None:
    """Move every parameter: a zero head would hide mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def pretrain(num_classes: int = 4, dropout: float = 0.0, schedule: Schedule = Schedule(), **optimizer: Any) -> Pretrain:
    stage = Pretrain(
        ViT(**TINY, dropout=dropout),
        partial(Supervised, num_classes=num_classes),
        partial(torch.optim.AdamW, **{"lr": 1e-3, "weight_decay": 0.1, **optimizer}),
        schedule,
    )
    perturbed(stage)
    return stage


def finetune(init_from: Path | None = None, **options: Any) -> Finetune:
    vit = None if init_from else ViT(**TINY)
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    source = str(init_from) if init_from else None
    return Finetune(**{"vit": vit, "init_from": source, "num_classes": 4, "optimizer": sgd, **options})


def data(root: Path, **options: Any) -> ImageFolderData:
    return ImageFolderData(str(root), **{"image_size": 16, "batch_size": 8, "num_workers": 0, **options})


def trainer(**options: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    small = {"accelerator": "cpu", "logger": False, "max_epochs": 1, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    watching = [*options.pop("callbacks", []), NonFinite(), Throughput()]
    return Trainer(**{**quiet, **small, **options}, callbacks=watching)


def fit(stage: Stage, root: Path, data_options: dict[str, Any] | None = None, **options: Any) -> Trainer:
    runner = trainer(**options)
    runner.fit(stage, data(root, **(data_options or {})))
    return runner


def saved(stage: Stage, root: Path, path: Path) -> Path:
    fit(stage, root, max_steps=2).save_checkpoint(path)
    return path


def state_of(stage: Stage) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in stage.state_dict().items()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)
