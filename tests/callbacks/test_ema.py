"""The moving average of the weights: its numbers, its validation and checkpoints, and continued runs."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

import vitlit
from vitlit.callbacks import EMA
from vitlit.data import ImageFolderData
from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.objectives import Supervised
from vitlit.optim import Schedule
from vitlit.stages import Finetune, Pretrain
from vitlit.weights import save_weights

DECAY = 0.8


class Watch(Callback):
    """Keeps the trained weights after every step; saves at step `stop` and ends there."""

    def __init__(self, stop: int | None = None, path: Path | None = None) -> None:
        self.stop, self.path = stop, path
        self.steps: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.steps.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.path is not None and self.stop == trainer.global_step:
            trainer.save_checkpoint(self.path)
            trainer.save_checkpoint(self.path.with_suffix(".best"), weights_only=True)
            raise KeyboardInterrupt


def fit(
    root: Path, *callbacks: Callback, ckpt_path: Path | None = None, before: Path | None = None, epochs: int = 2
) -> tuple[Pretrain, Trainer]:
    torch.manual_seed(0 if before is None else 1)
    vit = ViT(image_size=16, patch_size=8, width=16, depth=2, heads=2, mlp_dim=32, dropout=0.2)
    stage = Pretrain(vit, partial(Supervised, num_classes=4), partial(torch.optim.AdamW, lr=5e-3), Schedule(2))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", max_epochs=epochs, logger=False, callbacks=list(callbacks), **quiet)  # type: ignore
    data = ImageFolderData(str(root), image_size=16, batch_size=8, num_workers=0)
    try:
        trainer.fit(stage, data, ckpt_path=ckpt_path, weights_only=True)
    except (KeyboardInterrupt, SystemExit):
        assert any(isinstance(callback, Watch) and callback.stop for callback in callbacks)
    return stage, trainer


def averaged(steps: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The average by its definition; it starts at the weights after the first step."""
    average = dict(steps[0])
    for weights in steps[1:]:
        average = {name: DECAY * average[name] + (1 - DECAY) * weights[name] for name in average}
    return average


def test_the_network_ends_as_the_average_of_its_steps(few: Path) -> None:
    watch = Watch()
    stage, _ = fit(few, EMA(DECAY), watch)
    assert len(watch.steps) == 10
    for name, expected in averaged(watch.steps).items():
        torch.testing.assert_close(stage.get_parameter(name).detach(), expected)
    assert not torch.equal(stage.vit.patch_embed.proj.weight, watch.steps[-1]["vit.patch_embed.proj.weight"])


def test_both_are_validated(few: Path) -> None:
    watch = Watch()
    stage, trainer = fit(few, EMA(DECAY), watch)
    logged = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    assert logged.keys() == {f"val/{name}{raw}" for name in ("loss", "top1", "top1_macro") for raw in ("", "_raw")}

    def measured() -> dict[str, float]:
        options: Any = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        runner = Trainer(accelerator="cpu", logger=False, **options)
        data = ImageFolderData(str(few), image_size=16, batch_size=8, num_workers=0)
        return dict(runner.validate(stage, data, verbose=False)[0])

    of_average = measured()
    assert {name: logged[name] for name in of_average} == pytest.approx(of_average, abs=1e-6)
    with torch.no_grad():
        for name, tensor in watch.steps[-1].items():
            stage.get_parameter(name).copy_(tensor)
    of_raw = measured()
    assert {name: logged[f"{name}_raw"] for name in of_raw} == pytest.approx(of_raw, abs=1e-6)
    assert of_raw["val/loss"] != of_average["val/loss"]


@pytest.mark.parametrize("suffix", [".ckpt", ".best"])
def test_a_checkpoint_holds_the_average(suffix: str, few: Path, tmp_path: Path) -> None:
    watch = Watch(5, tmp_path / "a.ckpt")
    fit(few, EMA(DECAY), watch)
    state = vitlit.load(tmp_path / f"a{suffix}").state_dict()
    for name, expected in averaged(watch.steps).items():
        torch.testing.assert_close(state[name.removeprefix("vit.")], expected)


def test_a_continued_run_is_the_uninterrupted_one(few: Path, tmp_path: Path) -> None:
    whole, _ = fit(few, EMA(DECAY))
    fit(few, EMA(DECAY), Watch(5, tmp_path / "a.ckpt"))
    after, _ = fit(few, EMA(DECAY), ckpt_path=tmp_path / "a.ckpt", before=tmp_path)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name


def test_a_run_is_not_continued_without_its_average(few: Path, tmp_path: Path) -> None:
    fit(few, EMA(DECAY), Watch(5, tmp_path / "a.ckpt"))
    with pytest.raises(UserError, match=r"averages weights \(EMA\), this one does not; give its trainer\.callbacks"):
        fit(few, ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(UserError, match="decay"):
        EMA(decay)


def test_an_average_that_would_lag_behind_is_said(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(few, EMA(0.9999))
    said = capsys.readouterr().out
    warning = "vitlit: warning: an EMA with decay 0.9999 lags behind in a training of 10 steps; leave EMA out\n"
    assert warning in said  # none fits 10 steps
    fit(few, EMA(0.9999), epochs=13)
    assert "a training of 65 steps; 0.8 would fit" in capsys.readouterr().out
    fit(few, EMA(0.4))
    assert "warning" not in capsys.readouterr().out


def test_an_average_begins_with_the_weights_of_a_run_without_one(few: Path, tmp_path: Path) -> None:
    fit(few, Watch(5, tmp_path / "a.ckpt"))
    watch = Watch()
    with pytest.warns(UserWarning, match="The checkpoint was not created with WeightAveraging"):
        stage, _ = fit(few, EMA(DECAY), watch, ckpt_path=tmp_path / "a.ckpt", before=tmp_path)
    for name, expected in averaged(watch.steps).items():
        torch.testing.assert_close(stage.get_parameter(name).detach(), expected)


def test_coarse_weights_are_not_averaged(few: Path) -> None:
    trainer = Trainer(accelerator="cpu", precision="bf16-true", callbacks=[EMA()], logger=False, max_epochs=1)
    data = ImageFolderData(str(few), image_size=16, batch_size=8, num_workers=0)
    stage, _ = fit(few)
    with pytest.raises(UserError, match=r"cannot average weights of trainer\.precision bf16-true"):
        trainer.fit(stage, data)


def test_the_average_computes_as_the_weights_it_is_of(few: Path, tmp_path: Path) -> None:
    """Options that no tensor shows, such as the epsilon of norms, come with weights after the average is copied."""
    size: dict[str, Any] = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 2, "heads": 2, "mlp_dim": 32}
    save_weights(ViT(**size, norm_eps=1e-3, mlp="gelu_tanh"), tmp_path / "weights.safetensors")
    stage = Finetune(
        vit=ViT(**size),
        init_from=str(tmp_path / "weights.safetensors"),
        num_classes=4,
        optimizer=partial(torch.optim.SGD, lr=1e-30),
    )
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_checkpointing": False, "logger": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=[EMA(0.5)], **quiet)
    trainer.fit(stage, ImageFolderData(str(few), image_size=16, batch_size=8, num_workers=0))
    metrics = trainer.callback_metrics
    assert metrics["val/loss_raw"] == metrics["val/loss"]
    assert stage.vit.config.norm_eps == 1e-3


def test_what_was_not_trained_is_saved_all_the_same(few: Path, tmp_path: Path) -> None:
    stage, _ = fit(few)
    trainer = Trainer(accelerator="cpu", callbacks=[EMA()], logger=False, enable_progress_bar=False)
    trainer.validate(stage, ImageFolderData(str(few), image_size=16, batch_size=8, num_workers=0), verbose=False)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert vitlit.load(tmp_path / "a.ckpt").config.num_classes == 4
