"""Flags and configs: their order, each mistake as one line, and what they may not name."""

import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL, Result, done, refused

from vitlit.model import ViTConfig

Command = Callable[..., Result]


def saved(run: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    return config


def shipped(folder: Path, old: str, new: str) -> Path:
    """configs/pretrain.yaml with a change."""
    text = Path(SMALL[1]).read_text()
    assert old in text
    path = folder / "changed.yaml"
    path.write_text(text.replace(old, new, 1))
    return path


MISTAKES = {
    "--data.batch_sise 8": ["no key data.batch_sise; did you mean data.batch_size?"],
    "--batch_size 8": ["no key batch_size; did you mean data.batch_size?"],
    "--trainer.logg false": ["no key trainer.logg; did you mean trainer.logger?"],  # no abbreviations
    "--model.vit.widht 8": ["model.vit: no key widht; did you mean width?"],
    "--model.vit.mixing 8": ["model.vit: no key mixing\n"],  # there is data.mixing, in another object
    "--data.mixing.timescale 8": ["no key data.mixing.timescale\n"],
    "--model.vit vitlit.ViT.from_preset --model.vit.preset S/16 --model.vit.width 64": [
        "model.vit: no key width, which follows from preset: leave it out, or give --model.vit vitlit.ViT and all its"
    ],
    "--model.vit.preset S/16": ["model.vit: no key width, which follows from preset"],  # SMALL has a width
    "--model.schedule.warmupp 8": ["no key schedule.warmupp; did you mean schedule.warmup?"],
    "--data.mixing.prob 0.5": ["data.mixing.prob does nothing without data.mixing.mixup or data.mixing.cutmix; give"],
    "--data.erasing.area [0.1,0.2]": ["data.erasing.area does nothing without data.erasing.prob; give it, or"],
    "--data.repeats 20": ["data.batch_size is 16; give at least 40, or fewer --data.repeats"],
    "--lr 3": ["no key lr; did you mean model.optimizer.lr?"],
    "--weight-decay 3": ["no key weight-decay; did you mean model.optimizer.weight_decay?"],
    "--model.objective Foo": [
        "model.objective: expected class, not Foo; give one of DINO, Distillation, LeJEPA, MAE, MaskedPatch, Regress"
    ],
    "--seed_everything true": ["seed_everything: Not of type seed", "'true'"],
    "--seed_everything -1": ["seed_everything: Not of type seed: -1 does not conform to restriction v>=0"],
    "--data.holdout -5%": ["data.holdout -5% is not a share"],
    "--data.crop_scale 0.5": ["data.crop_scale: expected tuple, not 0.5; write a list, such as [0.05, 1.0]"],
    "--data.batch_size -3": ["data: batch_size is -3; give at least 1"],
    "--data.seed=None": ["data.seed: expected int, not None; write null"],
    "--data.batch_size=None": ["data.batch_size: expected int, not null"],
    "--trainer.devices 0": ["value is not a valid input using"],
    "--trainer.logger vitlit.loggers.CSV": ["trainer.logger: the following arguments are required: folder"],
    "--trainer.callbacks [vitlit.callbacks.Ema]": ["no attribute 'Ema'; did you mean EMA?"],
    "--trainer.max_time 00:01:00:00": ["trainer.max_time cannot be set", "use run.time_limit"],
    "--model.optimizer AdanW": ["model.optimizer: expected class, not AdanW; did you mean AdamW?"],
    "--ckpt_path runs/gone.ckpt": ["checkpoint runs/gone.ckpt does not exist"],
    "--model.optimizer.betas [0.8,0.9] --model.optimizer SGD": ["model.optimizer: no key betas"],
    "--model.optimizer torch.optim.AdanW": ["no attribute 'AdanW'; did you mean AdamW?"],
    "--trainer.callbacks [vitlit.callbacks.ema.EMAA]": ["no attribute 'EMAA'; did you mean EMA?"],
    "--data.augment [vitlit.data.augment.TimRandAugment]": ["did you mean TimmRandAugment?"],
    "--model Pretrian": ["model: expected class, not Pretrian; did you mean Pretrain?"],
    "--data.batch_size many": ["data.batch_size: expected int, not many"],
    "--model.optimizer.lr fast": ["model.optimizer.lr: expected float or class, not fast"],
    "--data.interpolation cubic": ["data.interpolation: expected 'bilinear' or 'bicubic', not cubic"],
    "--data.image_size [8,8,8]": ["data.image_size: expected int or tuple with 2 elements, not [8, 8, 8]"],
    "--data.num_workers": ["--data.num_workers: expected one argument"],
    "--model.optimizer vitlit.objectives.Supervised": [
        "model.optimizer: Expected 'vitlit.objectives.Supervised' to be a subclass of Optimizer"
    ],
    "--model.objective torch.optim.AdamW": [
        "model.objective: Expected 'torch.optim.AdamW' to be a subclass of Objective"
    ],
    "--model.objective vitlit.objectives.Objective": ["is a base class; name one that is derived from it"],
    "--model.optimizer vitlit.optim.build_optimizer": ["model.optimizer: expected its keys, not build_optimizer"],
    "--model.vit vitlit.objectives.Supervised": ["model.vit: Import path does not correspond to a subclass of ViT"],
    "--trainer.callbacks [vitlit.ViT]": [
        "trainer.callbacks: Import path vitlit.ViT does not correspond to a subclass of Callback"
    ],
    "--trainer.callbacks [3]": ["trainer.callbacks: expected Callback, not [3]"],
    "--model.schedule 3": ["model.schedule: expected its keys, not 3"],
    "stray": ["unexpected argument 'stray'"],
    "--config": ["--config needs a config"],
    "--config pretrian": ["config pretrian does not exist; did you mean pretrain?"],
    "--config configs/pretrian.yaml": ["config configs/pretrian.yaml does not exist; did you mean pretrain?"],
    "--data.batch_size 64": ["data.batch_size 64 is more than the 40 training images"],
    "--data.batch_size 15 --trainer.devices 2 --trainer.accelerator cpu": [
        "data.batch_size 15",
        "2 devices",
        "the next",
    ],
    "--data.batch_size 10 --data.micro_batch 4": ["data.batch_size 10", "3 micro-batches", "the next"],
    "--data.image_size 20": ["patch size 8 does not divide the image size 20 x 20"],
    "--data.holdout 100%": ["data.holdout 100% is not a share such as 10% or 0.1"],
    "--model.vit.heads 3": ["heads 3 do not divide the width 16"],
    "--model.vit.num_classes 4": ["model.vit.num_classes", "leave it out"],
    "--run.monitor val/top-1": ["run.monitor val/top-1", "val/top1 "],
    "--run.monitor val/top5": ["run.monitor val/top5"],  # there are 4 classes
    "--run.name a/b": ["run.name 'a/b'", "run.root"],
    "--run.name ..": ["run.name '..'", "run.root"],
    "--trainer.precision 16-mixed --trainer.accelerator cpu": ["trainer.precision 16-mixed", "bf16-mixed or 32-true"],
    "--trainer.precision bf17": ["trainer.precision: expected 'auto' or", "not bf17"],
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistaken_flag_is_refused_before_anything_is_written(
    vitlit: Command, few: Path, tmp_path: Path, flags: str
) -> None:
    refused(vitlit("fit", *SMALL, "--data.root", few, *flags.split()), *MISTAKES[flags])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("batch_size:", "batch_sise:", "no key data.batch_sise; did you mean data.batch_size?"),
        ("patch_size:", "patch_sise:", "model.vit: no key patch_sise; did you mean patch_size?"),
        ("width: 128", "preset: B/16", "model.vit: no key preset; write class_path: vitlit.ViT.from_preset"),
        ("seed_everything", "seed_everythin", "no key seed_everythin; did you mean seed_everything?"),
        ("AdamW", "AdanW", "did you mean AdamW?"),
        (
            "class_path: Supervised",
            "class_path: Supervized",
            "model.objective: expected class, not Supervized; did you mean Supervised?",
        ),
        ("seed_everything: 0", "seed_everything: [", "is not YAML: line "),
        ("max_epochs: 30", "max_epochs: 30\n  max_epochs: 3", "the key max_epochs is there twice"),
        ("warmup: 50", "3: 50", "Key must be a string, got: 3"),
        ("class_path: Supervised", "class_path: 3", "class_path is 3, not the name of a class"),
        ("init_args: {lr: 1e-3", "init_args: [1e-3]  # {", "init_args of torch.optim.AdamW holds no keys"),
        ("schedule: {warmup: 50, decay: cosine}", "schedule: 3", "model.schedule: expected its keys, not 3"),
        (
            "max_epochs: 30",
            "callbacks: [{class_path: EMA, init_args: {dekay: 1}}]",
            "no key dekay; did you mean decay?",
        ),
        (
            "max_epochs: 30",
            "callbacks: [{class_path: EMA, decay: 1}]",
            "decay stands next to class_path EMA; put it under init_args",
        ),
        ("batch_size: 32", "batch_size: null", "data.batch_size: expected int, not null"),
        ("mlp_dim: 256", "mlp_dim: null", "model.vit.mlp_dim: expected int, not null"),
    ],
)
def test_a_mistake_in_a_config_is_refused_as_that_in_a_flag(
    vitlit: Command, few: Path, tmp_path: Path, old: str, new: str, words: str
) -> None:
    refused(vitlit("fit", "--config", shipped(tmp_path, old, new), "--data.root", few), words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"- a\n- b\n", b"\xff\xfe\x00"])
def test_a_config_that_is_none_is_named(vitlit: Command, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    refused(vitlit("fit", "--config", "mine.yaml"), "config mine.yaml ")


PRESET = ["--model.vit.preset", "Ti/16", "--model.vit.drop_path", "0.1"]


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        ("pretrain", PRESET),
        ("finetune", PRESET),
        ("recipes/deit_b16", PRESET),
        ("pretrain", ["--model.vit.drop_path=0.1", "--model.vit.preset=Ti/16"]),
        ("finetune", ["--model.vit", "vitlit.ViT.from_preset", *PRESET]),
    ],
)
def test_a_preset_replaces_the_sizes_of_a_config(vitlit: Command, config: str, flags: list[str]) -> None:
    printed = yaml.safe_load(done(vitlit("fit", "--config", config, *flags, "--print_config=skip_default")))
    vit = printed["model"]["init_args"]["vit"]
    kept = {"init": "timm"} if config == "recipes/deit_b16" else {}
    assert vit == {"class_path": "vitlit.ViT.from_preset", "init_args": {"preset": "Ti/16", "drop_path": 0.1, **kept}}


def test_the_help_of_a_vit_explains_its_options(vitlit: Command) -> None:
    lines = " ".join(done(vitlit("fit", "--model", "Pretrain", "--model.vit.help", "vitlit.ViT")).split())
    assert "--vit.depth DEPTH The number of blocks. (type: int, default: 12)" in lines
    for option in fields(ViTConfig):
        assert f"--vit.{option.name} " in lines


def test_a_flag_wins_over_a_config_that_stands_after_it(vitlit: Command, few: Path, tmp_path: Path) -> None:
    done(vitlit("fit", *SMALL[2:], "--data.batch_size", 8, "--data.root", few, *SMALL[:2]))
    assert saved(tmp_path / "runs" / "pretrain")["data"]["batch_size"] == 8


class Trap:
    """A module that leaves a file behind when it is imported."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sprung = folder, folder / "sprung"
        (folder / "evil.py").write_text(
            f"open({str(self.sprung)!r}, 'w').close()\nimport torch\nclass Evil(torch.optim.SGD):\n    pass\n"
        )

    def set(self) -> None:
        sys.path.insert(0, str(self.folder))

    def trusted(self) -> None:
        self.set()
        os.environ["VITLIT_TRUST"] = "evil"


@pytest.fixture
def trap(tmp_path: Path) -> Trap:
    return Trap(tmp_path)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--model.optimizer", "evil.Evil"),
        ("--model.optimizer", "{class_path: evil.Evil, init_args: {lr: 0.1}}"),
        ("--model", "evil.Evil"),
        ("--trainer.callbacks", "[{class_path: evil.Evil}]"),
        ("--trainer.logger", "evil.Evil"),
    ],
)
def test_a_class_outside_the_trusted_packages_is_refused_unimported(
    vitlit: Command, few: Path, trap: Trap, flag: str, value: str
) -> None:
    result = vitlit("fit", *SMALL, "--data.root", few, flag, value, before=trap.set)
    refused(result, "class evil.Evil is outside", "VITLIT_TRUST")
    assert not trap.sprung.exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("class_path: torch.optim.AdamW", "class_path: evil.Evil"),
        ("class_path: vitlit.loggers.Wandb", "class_path: evil.Evil"),
        ("trainer:\n", "trainer:\n  callbacks: [{class_path: Lines, init_args: {a: [{class_path: evil.Evil}]}}]\n"),
    ],
)
def test_a_class_in_a_config_outside_the_trusted_packages_is_refused_unimported(
    vitlit: Command, few: Path, tmp_path: Path, trap: Trap, old: str, new: str
) -> None:
    result = vitlit("fit", "--config", shipped(tmp_path, old, new), "--data.root", few, before=trap.set)
    refused(result, "class evil.Evil is outside", "VITLIT_TRUST")
    assert not trap.sprung.exists()


def test_a_function_in_a_trusted_module_that_comes_from_elsewhere_is_refused(vitlit: Command, few: Path) -> None:
    for path in ("os.system", "vitlit.run.folder.shutil.rmtree", "torch.optim.optimizer.functools.partial"):
        refused(vitlit("fit", *SMALL, "--data.root", few, "--model.optimizer", path))


def test_a_package_that_the_user_trusts_is_imported(vitlit: Command, few: Path, trap: Trap) -> None:
    flags = ("--model.optimizer", "evil.Evil", "--model.optimizer.lr", 0.1)
    done(vitlit("fit", *SMALL, "--data.root", few, *flags, before=trap.trusted))
    assert trap.sprung.exists()


@pytest.mark.parametrize("skip", ["", "=skip_default"])
def test_a_printed_config_trains(vitlit: Command, few: Path, tmp_path: Path, skip: str) -> None:
    printed = done(vitlit("fit", *SMALL, "--data.root", few, f"--print_config{skip}"))
    (tmp_path / "printed.yaml").write_text(printed)
    assert yaml.safe_load(printed)["data"]["batch_size"] == 16
    done(vitlit("fit", "--config", "printed.yaml"))
    assert (tmp_path / "runs" / "printed" / "finished.json").exists()


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--trainer.strategy", "ddpp", "ddpp"),
        ("--trainer.accelerator", "tpux", "tpux"),
        ("--trainer.devices", "two", "devices"),
        ("--model.optimizer.lr", "-1", "learning rate"),
        ("--model.schedule.warmup", "-6", "warmup -6"),
        ("--data.num_workers", "-1", "num_workers is -1"),
        ("--data.crop_scale", "[2,3]", "crop_scale"),
        ("--data.image_size", "0", "image_size is 0"),
        ("--data.seed", str(10**30), "data: seed is 1000"),
        ("--data.prefetch", "0", "data: prefetch is 0; give at least 1"),
        ("--data.std", "[.inf,1,1]", "std (inf, 1.0, 1.0)"),
        (
            "--data.augment",
            "[{class_path: torchvision.transforms.v2.GaussianNoise, init_args: {sigma: -1}}]",
            "Gaussian",
        ),
        ("--data.augment", "[torchvision.transforms.v2.MixUp]", "data.augment: MixUp fails on an image"),
        ("--data.mean", "0.5", "data.mean: expected tuple, not 0.5; write [0.5]"),
        ("--run.keep_every", "0", "run: keep_every is 0; give at least 1"),
        ("--run.save_minutes", ".nan", "run: save_minutes is nan; give at least 0"),
        ("--run.name", "a\0b", "run.name 'a"),
        ("--model.objective.hidden_dim", "-1", "hidden_dim is -1"),
        ("--model.objective.head_std", "-1", "head_std is -1.0"),
        ("--trainer.limit_train_batches", "0", "nothing to train with trainer.limit_train_batches 0"),
        ("--trainer.val_check_interval", "0", "trainer.val_check_interval 0 is not above 0"),
        ("--trainer.val_check_interval", "1000", "is 1000; give at most 2, or check_val_every_n_epoch null"),
        ("--trainer.callbacks", "[LearningRateFinder]", "LearningRateFinder would change what the config says"),
        ("--trainer.callbacks", "[EMA, EMA]", "more than one stateful callback"),
        (
            "--trainer.callbacks",
            "[{class_path: EarlyStopping, init_args: {monitor: val/topp1}}]",
            "monitor val/topp1 is not",
        ),
    ],
)
def test_values_that_make_no_sense_are_refused(vitlit: Command, few: Path, flag: str, value: str, words: str) -> None:
    refused(vitlit("fit", *SMALL, "--data.root", few, flag, value), words)


@pytest.mark.parametrize("key", ["model.optimizer", "model.optimizer.class_path"])
def test_a_class_may_follow_its_options(vitlit: Command, key: str) -> None:
    out = done(
        vitlit("fit", *SMALL, "--model.optimizer.momentum", 0.7, f"--{key}", "torch.optim.SGD", "--print_config")
    )
    assert yaml.safe_load(out)["model"]["init_args"]["optimizer"]["init_args"]["momentum"] == 0.7


def test_a_config_of_ones_own_is_found_first_and_a_folder_is_called_one(
    vitlit: Command, few: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "finetune_folder.yaml").write_text("data: {batch_sise: 8}\n")
    refused(vitlit("fit", "--config", "recipes/finetune_folder"), "did you mean data.batch_size?")
    refused(vitlit("fit", "--config", "recipes"), "config recipes does not exist; ")
    changed = shipped(tmp_path, "\nmodel:", "\nmodle:")
    refused(vitlit("fit", "--config", changed), "no key modle; did you mean model?")


def test_nothing_is_written_before_the_weights_are_found(vitlit: Command, tmp_path: Path) -> None:
    refused(vitlit("fit", "--config", "finetune"), "does not exist")
    assert not (tmp_path / "data").exists()
