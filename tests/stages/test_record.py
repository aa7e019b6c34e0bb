"""What a stage records of itself: plain values that give it back, and that run nothing."""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_stage import TINY, data, distance, finetune, fit, pretrain, saved, state_of, trainer
from torch import nn

import vitlit
from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.objectives import Supervised
from vitlit.optim import Schedule
from vitlit.stages import Finetune, Pretrain, Stage


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", [pretrain, finetune])
def test_a_checkpoint_holds_plain_values_and_gives_the_stage_back(kind: Any, few: Path, tmp_path: Path) -> None:
    stage = kind()
    path = saved(stage, few, tmp_path / "a.ckpt")
    torch.load(path, weights_only=True)
    images = torch.randn(3, 3, 16, 16)
    expected = stage.eval()(images)
    for again in (type(stage).load_from_checkpoint(path), Stage.load_from_checkpoint(path)):
        assert type(again) is type(stage)
        assert torch.equal(again.eval()(images), expected)
        assert again.schedule == stage.schedule
        optimizers = [s.optimizer([nn.Parameter(torch.zeros(1))]) for s in (stage, again)]
        assert type(optimizers[0]) is type(optimizers[1])
        assert optimizers[0].defaults == optimizers[1].defaults
    assert torch.equal(vitlit.load(path)(images), expected)


def test_a_checkpoint_records_public_paths(few: Path, tmp_path: Path) -> None:
    stage = pretrain()
    path = saved(stage, few, tmp_path / "a.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    record = checkpoint["hyper_parameters"]
    assert record["_class_path"] == "vitlit.stages.Pretrain"
    assert record["objective"]["class_path"] == "vitlit.objectives.Supervised"
    assert record["optimizer"]["class_path"] == "torch.optim.AdamW"
    again = Stage.load_from_checkpoint(path)
    assert type(again) is Pretrain
    assert distance(state_of(again), state_of(stage)) == 0


def test_a_checkpoint_of_the_other_stage_is_refused(few: Path, tmp_path: Path) -> None:
    path = saved(pretrain(), few, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"a\.ckpt holds a \S*Pretrain, not a Finetune"):
        Finetune.load_from_checkpoint(path)


class Derived(Pretrain):
    """A stage of a user's own."""


def test_a_stage_of_ones_own_loads_where_its_package_is_trusted(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Derived(ViT(**TINY), partial(Supervised, num_classes=4), partial(torch.optim.AdamW, lr=1e-3))
    path = saved(stage, few, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=rf"{__name__}\.Derived is outside the packages that may be named"):
        Stage.load_from_checkpoint(path)
    monkeypatch.setenv("VITLIT_TRUST", __name__)
    for again in (Derived.load_from_checkpoint(path), Stage.load_from_checkpoint(path)):
        assert type(again) is Derived
        assert distance(state_of(again), state_of(stage)) == 0


def test_a_stage_that_was_loaded_trains_and_saves_again(few: Path, tmp_path: Path) -> None:
    again = Stage.load_from_checkpoint(saved(pretrain(schedule=Schedule(1, "linear")), few, tmp_path / "a.ckpt"))
    third = Stage.load_from_checkpoint(saved(again, few, tmp_path / "b.ckpt"))
    assert third.schedule == Schedule(1, "linear")
    assert distance(state_of(again), state_of(third)) == 0


def test_a_parameter_has_one_name_in_a_checkpoint(few: Path, tmp_path: Path) -> None:
    stage = pretrain()
    names = torch.load(saved(stage, few, tmp_path / "a.ckpt"), weights_only=True)["state_dict"].keys()
    assert names == {f"vit.{name}" for name in stage.vit.state_dict()}


def test_a_checkpoint_says_what_the_model_is_and_sees(few: Path, tmp_path: Path) -> None:
    about = torch.load(saved(pretrain(), few, tmp_path / "a.ckpt"), weights_only=True)["vitlit"]
    assert about["classes"] == ["0", "1", "2", "3"]
    assert about["preprocess"]["image_size"] == (16, 16)
    assert ViT(**about["vit"]).config.plain() == about["vit"]


@pytest.mark.parametrize(
    "factory", [lambda vit: Supervised(vit, 4), partial(lambda vit, n: Supervised(vit, n), n=4), Supervised.__call__]
)
def test_a_factory_that_a_checkpoint_cannot_name_is_refused_in_one_line(factory: Any) -> None:
    with pytest.raises(UserError, match=r"cannot be stored in a checkpoint; give a class or a functools\.partial") as e:
        Pretrain(ViT(**TINY), factory, partial(torch.optim.AdamW, lr=1e-3))
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="cannot be stored"):
        Pretrain(ViT(**TINY), partial(Supervised, num_classes=4), lambda groups: torch.optim.AdamW(groups, lr=1e-3))


def test_a_finetuned_checkpoint_needs_no_other_file(few: Path, tmp_path: Path) -> None:
    source = saved(pretrain(), few, tmp_path / "pretrain.ckpt")
    stage = finetune(source)
    path = saved(stage, few, tmp_path / "finetune.ckpt")
    source.unlink()
    images = torch.randn(2, 3, 16, 16)
    again = Finetune.load_from_checkpoint(path)
    assert torch.equal(again.eval()(images), stage.eval()(images))
    fit(finetune(vit=ViT(**TINY)), few, max_epochs=2)  # and a run of it goes on
    trainer(max_epochs=2).fit(Finetune.load_from_checkpoint(path), data(few), ckpt_path=path, weights_only=True)


class Evil:
    """A pickle that runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


POPEN = "lightning.pytorch.strategies.launchers.subprocess_script.subprocess.Popen"  # beneath a trusted package


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_instantiator", "subprocess.check_output"),
        ("_class_path", "subprocess.Popen"),
        ("_class_path", POPEN),
        ("optimizer", {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "MARKER"]}}),
        ("optimizer", {"class_path": POPEN, "init_args": {"args": ["touch", "MARKER"]}}),
        ("objective", {"class_path": "os.system", "init_args": {"command": "touch MARKER"}}),
        ("objective", {"class_path": POPEN, "dict_kwargs": {"args": ["touch", "MARKER"]}}),
        ("vit", {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "MARKER"]}}),
        ("vit", {"class_path": POPEN, "init_args": {"args": ["touch", "MARKER"]}}),
    ],
)
def test_a_checkpoint_that_names_a_foreign_callable_does_not_get_it_called(
    key: str, value: Any, few: Path, tmp_path: Path
) -> None:
    path = saved(pretrain(), few, tmp_path / "a.ckpt")
    marker = tmp_path / "marker"
    checkpoint = torch.load(path, weights_only=True)

    def filled(item: Any) -> Any:
        if isinstance(item, dict):
            return {name: filled(part) for name, part in item.items()}
        if isinstance(item, list):
            return [filled(part) for part in item]
        return item.replace("MARKER", str(marker))

    checkpoint["hyper_parameters"][key] = filled(value)
    torch.save(checkpoint, path)
    with pytest.raises((UserError, ValueError, argparse.ArgumentError)) as caught:
        fit(Stage.load_from_checkpoint(path), few, max_steps=1)
    assert not marker.exists()
    if "subprocess.Popen" in str(value) and POPEN not in str(value):
        assert isinstance(caught.value, UserError)
        assert "subprocess.Popen is outside the packages" in str(caught.value)


@pytest.mark.parametrize("nested", [False, True])
def test_a_pickle_that_would_run_a_command_is_refused(nested: bool, few: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = tmp_path / "evil.ckpt"
    if nested:
        checkpoint = torch.load(saved(pretrain(), few, path), weights_only=True)
        torch.save({**checkpoint, "extra": Evil(marker)}, path)
    else:
        torch.save(Evil(marker), path)
    for read in (vitlit.load, Stage.load_from_checkpoint, lambda p: vitlit.load_weights(ViT(**TINY), p)):
        with pytest.raises(UserError, match=r"evil\.ckpt is not a checkpoint"):
            read(path)
    assert not marker.exists()
