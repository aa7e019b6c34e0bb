"""The command line: what works, and each mistake as one line."""

import csv
import io
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SMALL, Result, command
from PIL import Image
from test_loggers import recorded

from vitlit import __version__, load
from vitlit.cli import main as cli
from vitlit.cli.main import HELP, explain
from vitlit.data.stream import order
from vitlit.errors import UserError
from vitlit.model import ViTConfig
from vitlit.stages import Stage

Command = Callable[..., Result]
FINETUNE = "fit --config finetune --data.batch_size 16 --data.num_workers 0 --data.image_size 24 --trainer.max_steps 2"
FINETUNE += " --model.schedule.warmup 1 --trainer.logger false --data.root"


def refused(result: Result, *words: object, code: int = 2) -> None:
    """It is one line, with these words in it, and exit code 2."""
    assert result.code == code, result.err
    assert result.err.startswith("vitlit: error: ")
    assert result.err.count("\n") == 1, result.err
    for word in words:
        assert str(word) in result.err


def done(result: Result) -> str:
    """It worked, and nothing was complained about; what it printed."""
    assert result.code == 0, result.err
    assert not result.err
    return result.out


def columns(run: Path) -> set[str]:
    with (run / "metrics.csv").open(newline="") as file:
        return set(next(csv.reader(file)))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def measured(out: str) -> dict[str, float]:
    """The numbers in the table that an evaluation prints, by the metric's name without its split."""
    return {name: float(value) for name, value in re.findall(r"(?:val|test)/(\w+)\W+?([\d.]+)", out)}


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


@pytest.fixture
def data(few: Path, tmp_path: Path) -> Path:
    """A copy of the few images, to be spoilt."""
    return Path(shutil.copytree(few, tmp_path / "images"))


@pytest.fixture
def work(trained: Path, tmp_path: Path) -> Path:
    """A folder of one's own in which runs/pretrain is complete."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path


# Images that are not as they must be.


def spoil_nothing_there(root: Path) -> str:
    shutil.rmtree(root)
    return "is not a folder"


def spoil_empty(root: Path) -> str:
    shutil.rmtree(root)
    root.mkdir()
    return "--data.holdout 10%"


def spoil_no_classes(root: Path) -> str:
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    return "holds no class folders"


def spoil_empty_class(root: Path) -> str:
    for image in (root / "train" / "2").iterdir():
        image.unlink()
    return "train/2 holds no image"


def spoil_flat_val(root: Path) -> str:
    for image in list((root / "val").glob("*/*")):
        image.rename(root / "val" / f"{image.parent.name}-{image.name}")
    for folder in [path for path in (root / "val").iterdir() if path.is_dir()]:
        folder.rmdir()
    return "images but no class folders"


def spoil_strange_val_class(root: Path) -> str:
    (root / "val" / "zebra").mkdir()
    return "'zebra'"


def spoil_no_val(root: Path) -> str:
    shutil.rmtree(root / "val")
    return "--data.holdout 10%"


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_nothing_there,
        spoil_empty,
        spoil_no_classes,
        spoil_empty_class,
        spoil_flat_val,
        spoil_strange_val_class,
        spoil_no_val,
    ],
)
def test_folders_laid_out_otherwise_are_refused_before_anything_is_written(
    vitlit: Command, data: Path, tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    remedy = spoil(data)
    refused(vitlit("fit", *SMALL, "--data.root", data), data, remedy)
    assert not (tmp_path / "runs").exists()


def test_a_class_without_validation_images_is_said_in_one_line(vitlit: Command, data: Path) -> None:
    shutil.rmtree(data / "val" / "3")
    out = done(vitlit("fit", *SMALL, "--data.root", data))
    assert [line for line in out.splitlines() if "no image of" in line] == [
        f"{data}/val has no image of 1 classes, '3' among them"
    ]


@pytest.mark.parametrize(("kind", "workers"), [("text.png", 0), ("cut.png", 0), ("cut.jpg", 2)])
def test_an_image_that_cannot_be_read_is_named(vitlit: Command, data: Path, kind: str, workers: int) -> None:
    original = min((data / "train" / "1").iterdir())
    spoilt = original.with_name(kind)
    if kind == "text.png":
        spoilt.write_text("not an image")
    else:
        Image.open(original).resize((64, 64)).save(spoilt)
        spoilt.write_bytes(spoilt.read_bytes()[: spoilt.stat().st_size // 2])
    original.unlink()
    result = vitlit("fit", *SMALL, "--data.root", data, "--data.num_workers", workers)
    refused(result)
    assert result.err.startswith(f"vitlit: error: cannot read the image {spoilt}: ")


# Flags and configs.

MISTAKES = {
    "--data.batch_sise 8": ["no key data.batch_sise; did you mean data.batch_size?"],
    "--batch_size 8": ["no key batch_size; did you mean data.batch_size?"],
    "--trainer.logg false": ["no key trainer.logg; did you mean trainer.logger?"],  # no abbreviations
    "--model.vit.widht 8": ["model.vit: no key widht; did you mean width?"],
    "--model.vit.mixing 8": ["model.vit: no key mixing\n"],  # there is data.mixing, in another object
    "--data.mixing.timescale 8": ["no key data.mixing.timescale\n"],
    "--model.vit vitlit.ViT.from_preset --model.vit.preset S/16 --model.vit.width 64": [
        "model.vit: no key width, which follows from preset: give --model.vit.preset, or --model.vit vitlit.ViT"
    ],
    "--model.vit.preset S/16": ["model.vit: no key width, which follows from preset"],  # SMALL has a width
    "--model.schedule.warmupp 8": ["no key schedule.warmupp; did you mean schedule.warmup?"],
    "--data.mixing.prob 0.5": ["data.mixing.prob does nothing without data.mixing.mixup or data.mixing.cutmix; give"],
    "--data.erasing.area [0.1,0.2]": ["data.erasing.area does nothing without data.erasing.prob; give it, or leave it"],
    "--data.repeats 20": ["data.batch_size 16", "give at least 40, or fewer --data.repeats, 8 or less"],
    "--model.optimizer AdanW": ["no class AdanW; did you mean AdamW?"],
    "--model.optimizer torch.optim.AdanW": ["no attribute 'AdanW'; did you mean AdamW?"],
    "--trainer.callbacks [vitlit.callbacks.ema.EMAA]": ["no attribute 'EMAA'; did you mean EMA?"],
    "--data.augment [vitlit.data.augment.TimRandAugment]": ["did you mean TimmRandAugment?"],
    "--model Pretrian": ["no class Pretrian; did you mean Pretrain?"],
    "--data.batch_size many": ["data.batch_size: expected int, not many"],
    "--model.optimizer.lr fast": ["model.optimizer.lr: expected float or class, not fast"],
    "--data.interpolation cubic": ["data.interpolation: expected 'bilinear' or 'bicubic', not cubic"],
    "--data.image_size [8,8,8]": ["data.image_size: expected int or tuple with 2 elements, not [8, 8, 8]"],
    "--data.num_workers": ["--data.num_workers: expected one argument"],
    "--model.optimizer vitlit.objectives.Supervised": ["vitlit.objectives.Supervised is no subclass of Optimizer"],
    "--model.objective torch.optim.AdamW": ["torch.optim.AdamW is no subclass of Objective"],
    "--model.objective vitlit.objectives.Objective": ["is a base class; name one that is derived from it"],
    "--model.optimizer vitlit.optim.build_optimizer": ["model.optimizer: expected its keys, not build_optimizer"],
    "--model.vit vitlit.objectives.Supervised": ["vitlit.objectives.Supervised is no subclass of ViT"],
    "--trainer.callbacks [vitlit.ViT]": ["trainer.callbacks: vitlit.ViT is no subclass of Callback"],
    "--trainer.callbacks [3]": ["trainer.callbacks: expected Callback, not 3"],
    "--model.schedule 3": ["model.schedule: expected its keys, not 3"],
    "stray": ["what is 'stray'?"],
    "--config": ["--config needs a config"],
    "--config pretrian": ["config pretrian does not exist; did you mean pretrain?"],
    "--config configs/pretrian.yaml": ["config configs/pretrian.yaml does not exist; did you mean pretrain?"],
    "--data.batch_size 64": ["data.batch_size 64 is more than the 40 training images"],
    "--data.batch_size 15 --trainer.devices 2 --trainer.accelerator cpu": [
        "data.batch_size 15",
        "2 devices",
        "the nearest",
    ],
    "--data.batch_size 10 --data.micro_batch 4": ["data.batch_size 10", "3 micro-batches", "the nearest"],
    "--data.image_size 20": ["patch size 8 does not divide the image size 20 x 20"],
    "--data.holdout 100%": ["data.holdout 100% is not a share such as 10% or 0.1"],
    "--model.vit.heads 3": ["heads 3 do not divide the width 16"],
    "--model.vit.num_classes 4": ["model.vit.num_classes", "leave it out"],
    "--run.monitor val/top-1": ["run.monitor val/top-1", "val/top1 "],
    "--run.monitor val/top5": ["run.monitor val/top5"],  # there are 4 classes
    "--run.name a/b": ["run.name 'a/b'", "run.root"],
    "--run.name ..": ["run.name '..'", "run.root"],
    "--ckpt_path missing.ckpt": ["missing.ckpt does not exist"],
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
        ("class_path: Supervised", "class_path: Supervized", "no class Supervized; did you mean Supervised?"),
        ("seed_everything: 0", "seed_everything: [", "is not YAML: line "),
        ("max_epochs: 30", "max_epochs: 30\n  max_epochs: 3", "the key max_epochs is there twice"),
        ("warmup: 50", "3: 50", "the key 3 is no text"),
        ("class_path: Supervised", "class_path: 3", "class_path is 3, not the name of a class"),
        ("init_args: {lr: 1e-3", "init_args: [1e-3]  # {", "init_args of torch.optim.AdamW holds no keys"),
        ("schedule: {warmup: 50, decay: cosine}", "schedule: 3", "model.schedule: expected its keys, not 3"),
        ("schedule: {", "schedule: &a {decay: *a}  # {", "with those that aliases repeat"),
        (
            "max_epochs: 30",
            "callbacks: [{class_path: EMA, init_args: {dekay: 1}}]",
            "no key dekay; did you mean decay?",
        ),
        (
            "max_epochs: 30",
            "callbacks: [{class_path: EMA, decay: 1}]",
            "decay stands beside class_path EMA; put it under init_args",
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(vitlit: Command, few: Path) -> None:
    refused(vitlit("fit", *SMALL, "--data.root", few, "--trainer.accelerator", "gpu"), "gpu", "cpu")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--trainer.max_steps -1 --trainer.max_epochs -1", "training has no end"),
        ("--model.schedule.warmup 6", "model.schedule.warmup is 6 steps but training has only 6"),
    ],
)
def test_a_training_that_cannot_end_well_is_refused_before_it_begins(
    vitlit: Command, few: Path, tmp_path: Path, flags: str, words: str
) -> None:
    refused(vitlit("fit", *SMALL, "--data.root", few, *flags.split()), words, "trainer.max_steps")
    assert not (tmp_path / "runs" / "pretrain" / "checkpoints").exists()


@pytest.mark.parametrize("command", ["validate", "test", "predict", "fit"])
def test_a_command_without_a_config_says_what_it_takes(vitlit: Command, command: str) -> None:
    refused(vitlit(command), f"{command} needs --config CONFIG")


def test_a_flag_wins_over_a_config_that_stands_after_it(vitlit: Command, few: Path, tmp_path: Path) -> None:
    done(vitlit("fit", *SMALL[2:], "--data.batch_size", 8, "--data.root", few, *SMALL[:2]))
    assert saved(tmp_path / "runs" / "pretrain")["data"]["batch_size"] == 8


@pytest.mark.parametrize(
    "flags",
    [
        ["--model.vit.preset", "Ti/16", "--model.vit.drop_path", "0.1"],
        ["--model.vit.drop_path=0.1", "--model.vit.preset=Ti/16"],
        ["--model.vit", "vitlit.ViT.from_preset", "--model.vit.preset", "Ti/16", "--model.vit.drop_path", "0.1"],
    ],
)
@pytest.mark.parametrize("config", ["pretrain", "finetune", "recipes/deit_b16"])
def test_a_preset_replaces_the_sizes_of_a_config(vitlit: Command, config: str, flags: list[str]) -> None:
    printed = yaml.safe_load(done(vitlit("fit", "--config", config, *flags, "--print_config=skip_default")))
    vit = printed["model"]["init_args"]["vit"]
    assert vit == {"class_path": "vitlit.ViT.from_preset", "init_args": {"preset": "Ti/16", "drop_path": 0.1}}


def test_the_help_of_a_vit_explains_its_options(vitlit: Command) -> None:
    lines = " ".join(done(vitlit("fit", "--model", "Pretrain", "--model.vit.help", "vitlit.ViT")).split())
    assert "--vit.depth DEPTH The number of blocks. (type: int, default: 12)" in lines
    for option in fields(ViTConfig):
        assert f"--vit.{option.name} " in lines


@pytest.mark.parametrize("name", ["pretrain", "configs/pretrain.yaml"])
def test_a_shipped_config_is_found_by_its_name_in_any_folder(vitlit: Command, tmp_path: Path, name: str) -> None:
    refused(vitlit("fit", "--config", name, "--data.root", "nowhere"), "data.root nowhere")


# What a config may not name.


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


# Bugs and help.


def debug() -> None:
    os.environ["VITLIT_DEBUG"] = "1"


def bug() -> None:
    def training_step(*arguments: object) -> None:
        raise RuntimeError("a bug")

    setattr(Stage, "training_step", training_step)  # noqa: B010


def test_vitlit_debug_shows_a_mistakes_traceback(vitlit: Command) -> None:
    result = vitlit("fit", *SMALL, "--data.root", "nowhere", before=debug)
    assert result.code == 1
    assert "Traceback" in result.err
    assert "UserError: data.root nowhere" in result.err


def test_a_bug_keeps_its_traceback(vitlit: Command, few: Path) -> None:
    result = vitlit("fit", *SMALL, "--data.root", few, before=bug)
    assert result.code == 1
    assert "Traceback" in result.err
    assert "RuntimeError: a bug" in result.err
    assert "vitlit: error" not in result.err


def test_a_mistake_is_found_behind_the_errors_that_it_caused() -> None:
    bug, mistake = RuntimeError("a bug"), UserError("a\nmistake")
    assert explain(bug) is None
    bug.__cause__ = RuntimeError("another")
    bug.__cause__.__context__ = mistake
    assert explain(bug) == "a mistake"


def test_help_version_and_unknown_commands_answer_without_torch() -> None:
    code = """if True:
        import sys
        from vitlit.cli import main
        codes = [main(line.split()) for line in ("", "--help", "--version", "config pretrain", "fti", "frobnicate",
                                                "data show nowhere --step 1")]
        print(codes, [name for name in ("torch", "lightning", "wandb", "numpy") if name in sys.modules])
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == f"{HELP}{HELP}vitlit {__version__}\n{Path(SMALL[1]).read_text()}[0, 0, 0, 0, 2, 2, 2] []\n"
    assert result.stderr.splitlines() == [
        "vitlit: error: no command 'fti'; did you mean fit?",
        "vitlit: error: no command 'frobnicate'; vitlit --help lists them",
        "vitlit: error: nowhere is not a run's folder: it has no config.yaml",
    ]


def test_config_lists_and_prints_what_is_shipped(vitlit: Command) -> None:
    assert "\n  pretrain\n" in done(vitlit("config"))
    assert done(vitlit("config", "pretrain")) == Path(SMALL[1]).read_text()
    refused(vitlit("config", "pretrian"), "did you mean pretrain?")


@pytest.mark.parametrize("arguments", [["digits"], ["digits", "a", "b"], ["--out", "a"], ["imagenet", "a"]])
def test_data_says_how_it_is_used(vitlit: Command, arguments: list[str]) -> None:
    refused(vitlit("data", *arguments), "usage: vitlit data", "OUT", "cifar10")


def test_predict_says_first_what_it_takes(vitlit: Command) -> None:
    usage, _, about, *_ = done(vitlit("predict", "--help")).splitlines()
    assert usage == "usage: vitlit predict RUN PHOTOS... [--out FILE.csv] [--KEY VALUE ...]"
    assert about == "Classify PHOTOS: images, or folders searched to their depth."


@pytest.mark.parametrize(
    "arguments", ["config", "data check --help", "data show runs/pretrain --step 3", "data check images"]
)
def test_a_reader_that_goes_ends_a_command_in_silence(arguments: str, work: Path, few: Path) -> None:
    (work / "images").symlink_to(few)
    reader, writer = os.pipe()
    os.close(reader)
    result = command(*arguments.split(), cwd=work, before=lambda: os.dup2(writer, 1))
    os.close(writer)
    assert (result.code, result.err) == (141, "")


def test_so_it_does_where_nothing_is_buffered(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)

    def unbuffered() -> None:  # as PYTHONUNBUFFERED makes it
        raw: Any = io.FileIO(1, "w", closefd=False)
        sys.stdout = io.TextIOWrapper(raw, write_through=True)
        os.dup2(writer, 1)

    result = command("config", cwd=tmp_path, before=unbuffered)
    os.close(writer)
    assert (result.code, result.err) == (141, "")


def test_another_pipe_that_breaks_is_a_bug(vitlit: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: list[str]) -> int:
        raise BrokenPipeError

    monkeypatch.setitem(cli.COMMANDS, "doctor", broken)
    result = vitlit("doctor")
    assert result.code == 1
    assert "BrokenPipeError" in result.err


def test_data_lists_its_commands_and_each_has_help(vitlit: Command) -> None:
    for arguments in (["data"], ["data", "--help"], ["data", "digits", "-h"], ["data", "imagenet", "--help"]):
        assert all(name in done(vitlit(*arguments)) for name in ("cifar10", "imagenet", "check", "shard"))
    for arguments in (["data", "check"], ["data", "shard"], ["benchmark"], ["benchmark", "data"]):
        assert "ROOT" in done(vitlit(*arguments, "--help"))


@pytest.mark.parametrize("skip", ["", "=skip_default"])
def test_a_printed_config_trains(vitlit: Command, few: Path, tmp_path: Path, skip: str) -> None:
    printed = done(vitlit("fit", *SMALL, "--data.root", few, f"--print_config{skip}"))
    (tmp_path / "printed.yaml").write_text(printed)
    assert yaml.safe_load(printed)["data"]["batch_size"] == 16
    done(vitlit("fit", "--config", "printed.yaml"))
    assert (tmp_path / "runs" / "printed" / "finished.json").exists()


# Training.


@pytest.mark.parametrize(("classes", "top5"), [(2, False), (3, False), (6, True)])
def test_metrics_have_their_names(vitlit: Command, digits: Path, tmp_path: Path, classes: int, top5: bool) -> None:
    for split in ("train", "val"):
        for label in range(classes):
            (tmp_path / "part" / split).mkdir(parents=True, exist_ok=True)
            (tmp_path / "part" / split / str(label)).symlink_to(digits / split / str(label))
    done(vitlit("fit", *SMALL, "--data.root", "part"))
    names = {"train/loss", "train/lr", "train/images_per_second", "train/data_wait"}
    names |= {"val/loss", "val/top1", "val/top1_macro"}
    assert columns(tmp_path / "runs" / "pretrain") == {"step", "epoch"} | names | ({"val/top5"} if top5 else set())


def test_one_class_is_refused(vitlit: Command, few: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "one" / split).mkdir(parents=True)
        (tmp_path / "one" / split / "0").symlink_to(few / split / "0")
    refused(vitlit("fit", *SMALL, "--data.root", "one", "--data.batch_size", 8), "at least 2")


def test_bfloat16_trains(vitlit: Command, few: Path) -> None:
    assert "is complete" in done(vitlit("fit", *SMALL, "--data.root", few, "--trainer.precision", "bf16-mixed"))


@pytest.mark.parametrize("share", ["10%", "0.1"])
def test_a_share_of_plain_class_folders_is_held_out(vitlit: Command, few: Path, share: str) -> None:
    out = done(vitlit("fit", *SMALL, "--data.root", few / "train", "--data.holdout", share))
    assert "36 training and 4 validation images, 4 classes" in out


def test_digits_are_made_where_the_default_folder_is_missing(vitlit: Command, tmp_path: Path) -> None:
    once = ("--trainer.max_steps", 1, "--model.schedule.warmup", 0)
    assert "1,438 training and 359 validation images" in done(vitlit("fit", *SMALL, *once))
    assert len(list((tmp_path / "data" / "digits" / "train").iterdir())) == 10


def test_nothing_is_made_where_another_folder_is_missing_or_the_default_is_there(
    vitlit: Command, tmp_path: Path
) -> None:
    refused(vitlit("fit", *SMALL, "--data.root", "data/digit"), "data/digit is not a folder")
    assert not (tmp_path / "data").exists()
    (tmp_path / "data" / "digits").mkdir(parents=True)
    refused(vitlit("fit", *SMALL), "data/digits has no folder train")
    assert not list((tmp_path / "data" / "digits").iterdir())


def no_number(where: str) -> Callable[[], None]:
    """Spoil the loss of the fourth step, which ends the second epoch, or its gradient alone."""

    def before() -> None:
        original = Stage.training_step

        def training_step(self: Stage, batch: Any, index: int) -> torch.Tensor:
            factor = math.nan if self.trainer.global_step == 3 else 1.0
            if where == "loss":
                return original(self, (batch[0] * factor, *batch[1:]), index)
            return original(self, batch, index) * factor

        setattr(Stage, "training_step", training_step)  # noqa: B010

    return before


@pytest.mark.parametrize(("where", "words"), [("loss", "the loss of step 3"), ("gradient", "the gradient of step 3")])
def test_a_run_that_comes_to_no_number_stops_with_sound_checkpoints(
    vitlit: Command, few: Path, tmp_path: Path, where: str, words: str
) -> None:
    result = vitlit("fit", *SMALL, "--data.root", few, before=no_number(where))
    shown = order(0, 1, 40)[16:32].tolist()
    listed = f"(training images {' '.join(map(str, shown[:8]))} and 8 more) is no finite number"
    good = "the last good checkpoint is runs/pretrain/checkpoints/last.ckpt"
    refused(result, f"{words} {listed}", "vitlit data show runs/pretrain --step 3", "learning rate", good)
    for name in ("last", "best"):
        checkpoint = torch.load(tmp_path / "runs" / "pretrain" / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 2
        assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())


def test_the_images_of_any_step_of_a_run_are_shown(vitlit: Command, few: Path, work: Path) -> None:
    printed = done(vitlit("data", "show", "runs/pretrain", "--step", 3))
    rows = list(csv.DictReader(printed.splitlines()))
    assert [int(row["index"]) for row in rows] == order(0, 1, 40)[16:32].tolist()
    for row in rows:
        assert Path(row["path"]).parent == few / "train" / row["label"]
        assert Path(row["path"]).is_file()
    refused(vitlit("data", "show", "runs/pretrain", "--step", -1), "step -1 is less than 0")
    refused(vitlit("data", "show", "runs", "--step", 1), "runs is not a run's folder")
    refused(vitlit("data", "show", "runs/pretrain"), "--step")


def test_what_a_flag_switches_off_may_keep_the_configs_settings(vitlit: Command, few: Path, tmp_path: Path) -> None:
    config = shipped(tmp_path, "  batch_size: 32", "  erasing: {prob: 0.5, fill: mean}\n  batch_size: 32")
    done(vitlit("fit", "--config", config, *SMALL[2:], "--data.root", few, "--data.erasing.prob", 0))


def test_a_learning_rate_that_blows_up_stops_the_run_without_a_checkpoint(
    vitlit: Command, few: Path, tmp_path: Path
) -> None:
    flags = ("--model.optimizer.lr", 1e30, "--model.schedule.warmup", 0)
    refused(vitlit("fit", *SMALL, "--data.root", few, *flags), "is no finite number")
    assert not (tmp_path / "runs" / "pretrain" / "checkpoints").exists()


# Checkpoints and weights.


def junk(folder: Path) -> str:
    (folder / "junk.ckpt").write_text("not a checkpoint" * 100)
    return "junk.ckpt"


def cut(folder: Path) -> str:
    whole = (folder / "runs" / "pretrain" / "checkpoints" / "last.ckpt").read_bytes()
    (folder / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    return "cut.ckpt"


def foreign(folder: Path) -> str:
    torch.save({"weight": torch.zeros(2)}, folder / "foreign.ckpt")
    return "foreign.ckpt"


@pytest.mark.parametrize("make", [junk, cut, foreign])
def test_a_file_that_is_no_checkpoint_is_named(
    vitlit: Command, few: Path, work: Path, make: Callable[[Path], str]
) -> None:
    name = make(work)
    refused(vitlit("fit", *SMALL, "--data.root", few, "--run.name", "b", "--ckpt_path", name), name, "checkpoint")
    refused(vitlit(*FINETUNE.split(), few, "--model.init_from", name), name, "checkpoint")
    assert [path.name for path in (work / "runs").glob("[!.]*")] == ["pretrain"]


LAST = "runs/pretrain/checkpoints/last.ckpt"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model.vit.depth 3", ["model.vit.depth is 3", "made with 2"]),
        ("--data.image_size 32", ["data.image_size is 32", "made with 16"]),
        ("--data.mean [0,0,0]", ["data.mean", "(0.5, 0.5, 0.5)"]),
        ("--data.batch_size 8", ["batch_size 16", "8", "model.init_from"]),
        ("--data.seed 5", ["seed 0", "5"]),
    ],
)
def test_a_checkpoint_that_the_config_contradicts_is_refused(
    vitlit: Command, few: Path, work: Path, flags: str, words: list[str]
) -> None:
    command = ("fit", *SMALL, "--data.root", few, "--model.vit.dropout", 0.1, "--trainer.max_steps", 9)
    refused(vitlit(*command, "--run.name", "b", "--ckpt_path", LAST, *flags.split()), *words)
    assert not (work / "runs" / "b" / "checkpoints").exists()


def test_a_checkpoint_beyond_the_end_of_training_is_refused(vitlit: Command, few: Path, work: Path) -> None:
    command = ("fit", *SMALL, "--data.root", few, "--model.vit.dropout", 0.1, "--run.name", "b", "--ckpt_path", LAST)
    more = "more --trainer.max_epochs or --trainer.max_steps"
    refused(vitlit(*command), f"{LAST} is at step 6, and this training ends at step 6; give {more}")
    refused(vitlit(*command, "--trainer.max_epochs", 2), f"{LAST} is at step 6, and this training ends at step 4")
    assert not (work / "runs" / "b").exists()
    done(vitlit(*command, "--trainer.max_steps", 7))


def test_a_checkpoint_of_the_other_stage_is_refused(vitlit: Command, few: Path, work: Path) -> None:
    refused(
        vitlit(*FINETUNE.split(), few, "--ckpt_path", LAST), LAST, "holds a Pretrain", "Finetune", "--model.init_from"
    )


@pytest.mark.parametrize("source", ["runs/pretrain", LAST])
def test_finetuning_starts_from_a_run_or_a_file_at_another_size(
    vitlit: Command, few: Path, work: Path, source: str
) -> None:
    out = done(vitlit(*FINETUNE.split(), few, "--model.init_from", source))
    assert "3 x 3 patches" in out
    assert f"weights of {source}: " in out
    assert ", 1 resampled, " in out
    assert (work / "runs" / "finetune" / "finished.json").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model.init_from missing", ["missing does not exist"]),
        ("--model.init_from runs/no", ["runs/no does not exist; name the folder of a run, or a checkpoint file\n"]),
        ("--model.init_from runs", ["runs holds no checkpoints"]),
        ("--model.init_from null", ["--model.init_from"]),
        ("--data.mean [0.1,0.2,0.3]", ["data.mean is (0.1, 0.2, 0.3)", "best.ckpt was made with (0.5, 0.5, 0.5)"]),
        ("--data.image_size 20", ["patch size 8 does not divide"]),
        (
            "--model.vit vitlit.ViT --model.vit.patch_size 8 --model.vit.width 16 --model.vit.heads 2 "
            "--model.vit.mlp_dim 32 --model.vit.depth 3",
            ["model.vit.depth is 3, but runs/pretrain/checkpoints/best.ckpt was made with 2"],
        ),
    ],
)
def test_finetuning_from_what_does_not_fit_is_refused(
    vitlit: Command, few: Path, work: Path, flags: str, words: list[str]
) -> None:
    refused(vitlit(*FINETUNE.split(), few, *flags.split()), *words)
    assert not (work / "runs" / "finetune").exists()


# Evaluation and prediction.


def test_validation_of_a_run_gives_the_numbers_of_its_best_epoch(vitlit: Command, work: Path) -> None:
    run = work / "runs" / "pretrain"
    rows = [row for row in table(run / "metrics.csv") if row["val/top1"]]
    best = max(rows, key=lambda row: float(row["val/top1"]))  # the first of them, where several are
    (run / "checkpoints" / "last.ckpt").write_text("not needed")
    numbers = measured(done(vitlit("validate", "runs/pretrain")))
    assert numbers == pytest.approx({name: float(best[f"val/{name}"]) for name in ("loss", "top1", "top1_macro")})
    assert measured(done(vitlit("validate", "--config", run / "config.yaml", "--data.batch_size", 4))) == pytest.approx(
        numbers
    )


def test_testing_a_run_reads_its_test_folder(vitlit: Command, few: Path, work: Path) -> None:
    refused(vitlit("test", "runs/pretrain"), "no folder test")
    shutil.copytree(few, work / "tested")
    shutil.copytree(few / "val", work / "tested" / "test")
    shutil.rmtree(work / "tested" / "val")
    assert measured(done(vitlit("test", "runs/pretrain", "--data.root", "tested"))) == pytest.approx(
        measured(done(vitlit("validate", "runs/pretrain")))
    )


def test_what_is_no_run_cannot_be_evaluated(vitlit: Command, work: Path) -> None:
    refused(vitlit("validate", "nowhere"), "nowhere is not the folder of a run")
    refused(vitlit("predict", "runs", "a.png"), "runs is not the folder of a run")
    shutil.rmtree(work / "runs" / "pretrain" / "checkpoints")
    refused(vitlit("validate", "runs/pretrain"), "holds no checkpoints/best.ckpt")


def test_predictions_are_those_of_the_loaded_network_in_the_order_given(vitlit: Command, few: Path, work: Path) -> None:
    photos = [*sorted((few / "val").glob("*/*"))[::-3], few / "train" / "0" / "00000.png"]
    done(vitlit("predict", "runs/pretrain", *photos, "--out", "out/classes.csv", "--data.batch_size", 2))
    rows = table(work / "out" / "classes.csv")
    assert [row["path"] for row in rows] == [str(photo) for photo in photos]

    vit = load(work / "runs" / "pretrain")
    assert vit.preprocess is not None
    with torch.no_grad():
        probabilities, order = vit(vit.preprocess(photos)).softmax(-1).sort(descending=True)
    for row, expected, classes in zip(rows, probabilities.tolist(), order.tolist(), strict=True):
        found = [float(row[f"probability{end}"]) for end in ("", "_2", "_3", "_4")]
        assert found == pytest.approx(expected, abs=1e-5)
        assert [row[f"class{end}"] for end in ("", "_2", "_3", "_4")] == [vit.classes[i] for i in classes]


def test_photos_are_files_flat_folders_and_trees(vitlit: Command, few: Path, work: Path) -> None:
    flat = sorted((few / "val" / "1").iterdir())
    tree = sorted((few / "val").glob("*/*"))
    odd = work / os.fsdecode(b"caf\xe9.png")  # which is not UTF-8
    odd.write_bytes(flat[0].read_bytes())
    assert "12 images" in done(vitlit("predict", "runs/pretrain", odd, few / "val" / "1", few / "val"))
    rows = table(work / "runs" / "pretrain" / "predictions.csv")
    assert [row["path"] for row in rows] == [str(photo) for photo in dict.fromkeys((odd, *flat, *tree))]  # each once
    names = "path class probability class_2 probability_2 class_3 probability_3 class_4 probability_4"
    assert " ".join(rows[0]) == names  # there are 4 classes


def test_five_of_ten_classes_are_predicted(vitlit: Command, digits: Path, tmp_path: Path) -> None:
    done(vitlit("fit", *SMALL, "--data.root", digits, "--trainer.max_steps", 3))
    done(vitlit("predict", "--out", "five.csv", "runs/pretrain", digits / "val" / "7"))
    for row in table(tmp_path / "five.csv"):
        likely = [float(row[f"probability{end}"]) for end in ("", "_2", "_3", "_4", "_5")]
        assert likely == sorted(likely, reverse=True)
        assert sum(likely) <= 1
    assert len(row) == 11


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.png"], "missing.png does not exist"),
        (["empty"], "no image under empty"),
        (["notes.txt"], "cannot read the image notes.txt"),
        (["empty", "--out", "notes.txt/a.csv"], ""),
    ],
)
def test_photos_that_cannot_be_read_are_refused(vitlit: Command, work: Path, arguments: list[str], words: str) -> None:
    (work / "empty").mkdir()
    (work / "notes.txt").write_text("text")
    refused(vitlit("predict", "runs/pretrain", *arguments), words)
    assert not (work / "runs" / "pretrain" / "predictions.csv").exists()


@pytest.mark.parametrize("out", ["notes.txt/a.csv", "runs", "."])
def test_predictions_that_cannot_be_written_are_refused_before_any_is_made(
    vitlit: Command, few: Path, work: Path, out: str
) -> None:
    (work / "notes.txt").write_text("text")
    refused(vitlit("predict", "runs/pretrain", few / "val", "--out", out), f"cannot write {out}: ", "another --out")
    assert not list(work.glob("*.partial"))


# Weights & Biases.


def test_a_run_is_logged_to_wandb(vitlit: Command, few: Path, tmp_path: Path) -> None:
    out = done(vitlit("fit", *SMALL, "--data.root", few, "--trainer.logger", "vitlit.loggers.Wandb"))
    run = tmp_path / "runs" / "pretrain"
    (logged,) = (run / "wandb").glob("offline-run-*")
    assert f"wandb sync runs/pretrain/wandb/{logged.name}\n" in out
    history, config = recorded(logged)
    assert config["config"]["data"]["batch_size"] == 16
    assert config["classes"] == ["0", "1", "2", "3"]
    for row in table(run / "metrics.csv"):
        for name in ("train/loss", "train/lr", "val/top1"):
            if row[name]:
                values = [r[name] for r in history if r.get("trainer/global_step") == int(row["step"]) and name in r]
                assert values == pytest.approx([float(row[name])])
    tables = {name for row in history for name in row if "/" not in name}
    assert {"mistakes", "confusion"} <= {name.partition(".")[0] for name in tables}


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--trainer.strategy", "ddpp", "ddpp"),
        ("--trainer.accelerator", "tpux", "tpux"),
        ("--trainer.devices", "two", "devices"),
        ("--model.optimizer.lr", "-1", "learning rate"),
        ("--model.schedule.warmup", "-6", "warmup -6"),
        ("--data.num_workers", "-1", "num_workers -1"),
        ("--data.crop_scale", "[2,3]", "crop_scale"),
        ("--data.image_size", "0", "image size 0"),
        ("--data.seed", str(10**30), "data.seed"),
        ("--data.prefetch", "0", "data.prefetch 0 is less than 1"),
        ("--data.std", "[.inf,1,1]", "std (inf, 1.0, 1.0)"),
        (
            "--data.augment",
            "[{class_path: torchvision.transforms.v2.GaussianNoise, init_args: {sigma: -1}}]",
            "Gaussian",
        ),
        ("--data.augment", "[torchvision.transforms.v2.MixUp]", "data.augment: MixUp fails on an image"),
        ("--data.augment", "torchvision.transforms.v2.AugMix", "; write [torchvision.transforms.v2.AugMix]"),
        ("--data.mean", "0.5", "data.mean: expected tuple, not 0.5; write [0.5]"),
        ("--run.keep_every", "0", "run.keep_every 0"),
        ("--run.save_minutes", ".nan", "run.save_minutes nan"),
        ("--run.name", "a\0b", "run.name 'a"),
        ("--model.objective.hidden_dim", "-1", "hidden_dim -1"),
        ("--model.objective.head_std", "-1", "head_std -1.0"),
        ("--model.optimizer", "SparseAdam", "SparseAdam is for sparse gradients"),
        ("--model.optimizer.capturable", "true", "model.optimizer.capturable"),
        ("--model.groups.lr", "{'*': 1e300}", "beyond float32"),
        ("--trainer.limit_train_batches", "0", "nothing to train with trainer.limit_train_batches 0"),
        ("--trainer.val_check_interval", "0", "trainer.val_check_interval 0 is not above 0"),
        ("--trainer.val_check_interval", "1000", "more than the 2 batches of an epoch"),
        ("--trainer.gradient_clip_val", "-1", "trainer.gradient_clip_val -1"),
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


def test_a_run_without_validation_says_that_none_is_best(vitlit: Command, few: Path) -> None:
    result = vitlit("fit", *SMALL, "--data.root", few, "--trainer.limit_val_batches", 0)
    assert result.code == 0, result.err
    assert "none is best" in result.out


# What recipes are made of


def manifest(few: Path, folder: Path, several: bool) -> Path:
    rows = [(path, path.parent.name, path.parent.parent.name) for path in sorted(few.rglob("*.png"))]
    more = ["|even" if several and int(label) % 2 == 0 else "" for _, label, _ in rows]
    lines = [
        f"{path.relative_to(few)},{label}{also},{split}" for (path, label, split), also in zip(rows, more, strict=True)
    ]
    (folder / "labels.csv").write_text("\n".join(["path,label,split", *lines]))
    return folder / "labels.csv"


@pytest.mark.parametrize("several", [False, True])
def test_a_run_on_a_manifest_is_evaluated_and_predicts_without_it(
    several: bool, vitlit: Command, few: Path, tmp_path: Path
) -> None:
    labels = manifest(few, tmp_path, several)
    flags = ["--data.root", few, "--data.manifest", labels]
    flags += ["--model.objective.init_args.loss", "bce"] if several else []
    said = done(vitlit("fit", *SMALL, *flags))
    assert ("best val/map" if several else "best val/top1") in said
    assert f"--data.manifest {labels}" in said
    metrics = {"val/loss", "val/map"} if several else {"val/loss", "val/top1", "val/top1_macro"}
    assert {name for name in columns(tmp_path / "runs/pretrain") if name.startswith("val/")} == metrics
    assert ("map" if several else "top1") in measured(done(vitlit("validate", "runs/pretrain")))
    labels.unlink()
    done(vitlit("predict", "runs/pretrain", few / "val", "--out", "out.csv"))
    assert len(table(tmp_path / "out.csv")) == 11


def test_a_finetuning_that_changes_the_network_is_evaluated_and_continued(
    vitlit: Command, few: Path, work: Path
) -> None:
    """As MAE's finetuning: the architecture is the weights' but for what the config says."""
    vit = {"class_path": "vitlit.ViT", "init_args": {"pool": "gap", "norm": "pooled", "drop_path": 0.1}}
    config = yaml.safe_load(vitlit("config", "finetune").out)
    config["model"]["init_args"]["vit"] = vit
    (work / "gap.yaml").write_text(yaml.safe_dump(config))
    flags = [*FINETUNE.replace("--config finetune", "--config gap.yaml").split(), few]
    done(vitlit(*flags))
    assert "top1" in measured(done(vitlit("validate", "runs/gap")))
    done(vitlit("predict", "runs/gap", few / "val"))
    assert "runs/gap is complete" in done(vitlit(*flags, "--trainer.max_steps", 4))
    assert load(work / "runs/gap").config.drop_path == 0.1
    assert load(work / "runs/gap").config.depth == 2


@pytest.mark.parametrize(("name", "lr", "batch"), [("pretrain", 0.001, 32), ("recipes/deit3_s16", 0.004, 2048)])
@pytest.mark.parametrize("answer", ["", "--model.optimizer.init_args.lr 2e-3", "--model.schedule.lr_per 32"])
def test_a_learning_rate_for_another_batch_is_doubted(
    name: str, lr: float, batch: int, answer: str, vitlit: Command, few: Path
) -> None:
    flags = "--data.batch_size 8 --data.micro_batch 8 --trainer.accelerator cpu --model.schedule.warmup 1000000"
    result = vitlit("fit", "--config", name, "--data.root", few, *flags.split(), *answer.split())
    assert result.code == 2  # for the warm-up
    doubt = f"vitlit: warning: data.batch_size is 8, but the config's learning rate {lr} is for {batch}; in proportion"
    assert (doubt in result.out) == (not answer)


def test_adapters_under_layer_decay_are_doubted(vitlit: Command, few: Path, work: Path) -> None:
    command = (*FINETUNE.split(), few, "--model.init_from", "runs/pretrain", "--model.lora.rank", 2)
    doubt = "layer_decay 0.5 leaves LoRA's adapters near the image almost still; give --model.groups.layer_decay 1"
    assert f"vitlit: warning: model.groups.{doubt}" in done(vitlit(*command, "--model.groups.layer_decay", 0.5))
    assert "layer_decay" not in done(vitlit(*command, "--run.name", "b"))


def test_a_loss_that_rose_is_said_at_the_end(vitlit: Command, few: Path) -> None:
    out = done(vitlit("fit", *SMALL, "--data.root", few, "--model.optimizer.lr", 10, "--model.schedule.warmup", 0))
    assert re.search(r"vitlit: warning: train/loss rose from 1\.\d+ to [\d,.]+; lower the learning rate \(", out)
    assert "rose" not in done(vitlit("fit", *SMALL, "--data.root", few, "--run.name", "b"))


def test_two_ways_of_balancing_are_doubted(vitlit: Command, few: Path) -> None:
    both = "--data.balanced true --model.objective.init_args.class_weights balanced"
    said = done(vitlit("fit", *SMALL, "--data.root", few, *both.split()))
    assert "class_weights weigh them more besides; give one" in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model.freeze true", "(model.freeze False -> True)"),
        ("--model.lora.rank 2", "model.lora.rank None -> 2"),
        ("--model.groups.layer_decay 0.5", "(model.groups.layer_decay 1.0 -> 0.5)"),
        ("--model.optimizer.init_args.lr 0.5", "(model.optimizer.lr 0.0005 -> 0.5)"),
        ("--model.schedule.lr_per 8", "(model.schedule.lr_per None -> 8"),
    ],
)
def test_other_settings_than_a_checkpoints_would_lose_and_are_refused(
    flags: str, words: str, vitlit: Command, few: Path, work: Path
) -> None:
    done(vitlit(*FINETUNE.split(), few))
    last = "runs/finetune/checkpoints/last.ckpt"
    longer = "--trainer.max_steps 4 --run.name other --ckpt_path"
    refused(
        vitlit(*FINETUNE.split(), few, *longer.split(), last, *flags.split()), words, "was trained with", "would win"
    )


def test_a_teacher_that_is_not_there_is_said_before_anything_is_written(
    vitlit: Command, few: Path, tmp_path: Path
) -> None:
    flags = "--model.objective Distillation --model.objective.init_args.teacher runs/none"
    refused(vitlit("fit", *SMALL, "--data.root", few, *flags.split()), "runs/none")
    assert not (tmp_path / "runs" / "pretrain").exists()


def test_an_averaged_run_is_not_continued_without_its_average(vitlit: Command, few: Path, tmp_path: Path) -> None:
    ema = "[{class_path: vitlit.callbacks.EMA, init_args: {decay: 0.5}}]"
    done(vitlit("fit", *SMALL, "--data.root", few, "--trainer.callbacks", ema))
    last = "runs/pretrain/checkpoints/last.ckpt"
    other = ["--run.name", "other", "--trainer.max_steps", 8, "--ckpt_path", last]
    refused(vitlit("fit", *SMALL, "--data.root", few, *other), "averages its weights (EMA), this one does not")
