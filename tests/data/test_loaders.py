"""Loaders without a Trainer, which give what a Trainer gives its module; and stages that train on any loaders."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from vitlit.data import ImageFolderData
from vitlit.data.augment import TimmRandAugment
from vitlit.data.erasing import Erasing
from vitlit.data.mixing import Mixing
from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.objectives import Batch, Supervised
from vitlit.optim import Schedule
from vitlit.stages import Pretrain


class Recorder(LightningModule):
    """Keeps the batches that a Trainer gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.number = torch.nn.Parameter(torch.zeros(()))
        self.train_batches: list[Batch] = []
        self.val_batches: list[Batch] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.train_batches.append(batch)
        return self.number * batch.views[0].mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.val_batches.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(**options: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "accelerator": "cpu"}
    return Trainer(**{**quiet, "max_epochs": 2, **options})


def folder_data(root: Path, **options: Any) -> ImageFolderData:
    return ImageFolderData(str(root), **{"image_size": 16, "batch_size": 8, "num_workers": 0, "seed": 3, **options})


def assert_same(some: list[Batch], others: list[Batch]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert isinstance(one, Batch)
        assert all(map(torch.equal, (*one.views, one.labels, one.indices), (*other.views, other.labels, other.indices)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_workers": 1, "micro_batch": 4},
        {"augment": [TimmRandAugment()], "erasing": Erasing(0.5), "mixing": Mixing(0.8, 1.0), "repeats": 2},
    ],
)
def test_loaders_give_without_a_trainer_what_they_give_with_one(few: Path, options: dict[str, Any]) -> None:
    module = Recorder()
    trainer().fit(module, folder_data(few, **options))
    data = folder_data(few, **options)
    training, validation = data.train_dataloader(), data.val_dataloader()
    assert len(training) == len(module.train_batches) // 2
    assert_same([batch for _ in range(2) for batch in training], module.train_batches)
    assert_same([batch for _ in range(2) for batch in validation], module.val_batches)
    images = next(iter(validation)).views[0]
    assert images.dtype == torch.float32
    assert images.shape == (len(images), 3, 16, 16)


def test_a_setup_by_hand_changes_nothing(few: Path) -> None:
    data = folder_data(few)
    data.setup("fit")
    assert_same(list(data.train_dataloader()), list(folder_data(few).train_dataloader()))


def test_after_a_fit_the_loaders_are_those_without_a_trainer(few: Path, tmp_path: Path) -> None:
    data, module, training = folder_data(few), Recorder(), trainer(max_epochs=1)
    training.fit(module, data)
    assert_same(list(data.train_dataloader()), module.train_batches)
    assert_same(list(data.val_dataloader()), module.val_batches)
    training.save_checkpoint(tmp_path / "late.ckpt")
    saved = torch.load(tmp_path / "late.ckpt", weights_only=True)
    assert saved["ImageFolderData"]["step"] == saved["global_step"] == 5
    training.validate(module, data, verbose=False)
    assert_same(module.val_batches[len(module.val_batches) // 2 :], list(data.val_dataloader()))


def test_a_loader_without_a_trainer_refuses_a_batch_larger_than_the_data(few: Path) -> None:
    with pytest.raises(UserError, match="more than the 40 training images"):
        folder_data(few, batch_size=64).train_dataloader()


def stage() -> Pretrain:
    torch.manual_seed(0)
    vit = ViT(image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp_dim=32)
    sgd = partial(torch.optim.SGD, lr=0.1)
    return Pretrain(vit, partial(Supervised, num_classes=4), sgd, Schedule(decay="constant"))


def test_a_stage_trains_in_a_plain_trainer_on_plain_tensors() -> None:
    module = stage()
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    images, labels = torch.randn(24, 3, 16, 16), torch.arange(24) % 4
    loader = DataLoader(TensorDataset(images, labels), 8)
    plain = trainer(max_epochs=1)
    plain.fit(module, loader, loader)
    assert plain.global_step == 3
    assert 0 <= float(plain.callback_metrics["val/top1"]) <= 1
    assert any(not torch.equal(before[name], parameter) for name, parameter in module.named_parameters())


def test_a_stage_trains_alike_on_the_data_module_and_on_its_loaders(few: Path) -> None:
    whole, parts = stage(), stage()
    trainer().fit(whole, folder_data(few, seed=0))
    data = folder_data(few, seed=0)
    trainer().fit(parts, data.train_dataloader(), data.val_dataloader())
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, parts.get_parameter(name)), name
