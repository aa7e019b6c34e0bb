"""Spoilt configs end in one line and exit code 2, or in a run that steps, and nothing in them is executed.

Each case is one seed: a shipped config made small, spoilt in up to three places, and run in a forked child.
"""

import copy
import math
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, Result, refused
from test_recipes import MEAN, STD, TINY, shrunken, small_weights

from vitlit.data import Preprocess
from vitlit.model import ViT
from vitlit.stages import Stage
from vitlit.weights import save_weights

CASES, SHORT = 500, 40  # of `make test-all`, and of `make test`
SECONDS = 300  # after which a case counts as one that hangs
GIBIBYTES = 6  # of address space, beyond what there was, that a case may take

RECIPES = ("deit3_s16", "deit_s16_distilled", "finetune_folder", "small_cifar10", "vit_s16_imagenet1k_90ep")
NUMBERS: tuple[Any, ...] = (
    -1,
    0,
    1,
    3,
    0.5,
    1.5,
    -0.1,
    math.nan,
    math.inf,
    -math.inf,
    1e30,
    1e-30,
    10**30,
    2**31,
    2**63,
)
OTHERS: tuple[Any, ...] = (
    *("", " ", "text", "0", "-1", "1e-3", "nan", "auto", "../up", "漢字", "a\nb", "1:30", "50%", "[1"),
    *(True, False, None, [], {}, [[]], [None], [1, 2], ["text"], [-1, 2.5], [1, 2, 3, 4], {"a": {"b": 1}}, {"": None}),
)
# Settings that turn a large number into memory, processes or time; they get none.
COSTLY = {
    *("image_size", "patch_size", "width", "depth", "heads", "mlp_dim", "num_classes", "hidden_dim", "in_channels"),
    *("registers", "batch_size", "micro_batch", "repeats", "prefetch", "num_workers", "ops", "rank", "layers"),
    *("devices", "num_nodes", "num_sanity_val_steps", "min_epochs", "min_steps"),
}
EXECUTED = "executed"  # the file that a case leaves behind if it executes something
CLASSES: tuple[Any, ...] = (
    *("os.system", "builtins.eval", "subprocess.Popen", "pathlib.Path.touch", "vitlit.run.folder.shutil.rmtree"),
    *("torch.nn.Linear", "torch.optim.AdamW", "torch.optim.Optimizer", "torch.optim.lr_scheduler.StepLR", "SGD"),
    *("vitlit.ViT", "vitlit.ViT.from_preset", "vitlit.stages.Stage", "Pretrain", "Finetune", "vitlit.data.Mixing"),
    *("Supervised", "Distillation", "vitlit.objectives.Objective", "vitlit.objectives.Step", "vitlit.optim.Groups"),
    *("vitlit.data.ImageFolderData", "vitlit.data.augment.ThreeAugment", "vitlit.callbacks.EMA", "vitlit.load"),
    *("torchvision.transforms.v2.Normalize", "torchvision.transforms.v2.Resize", "torchmetrics.Accuracy"),
    *("lightning.pytorch.Trainer", "lightning.pytorch.callbacks.EarlyStopping", "lightning.pytorch.loggers.CSVLogger"),
    *("lightning.pytorch.callbacks.Callback", "LearningRateMonitor", "vitlit.errors.UserError", "vitlit.cli.main"),
    *("Nothing", "vitlit.Nothing", "torch.optim.", ".", "a b", 3, None, [], {}, "vitlit.optim", "__main__.main"),
)
RAW = (
    f"!!python/object/apply:os.system ['touch {EXECUTED}']",
    f"!!python/object/new:os.system ['touch {EXECUTED}']",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "!!timestamp 2001-12-14",
    "!!float 1",
    "!mine 1",
    "&a [1]",
    "&b {b: 1}",
    "*nowhere",
    "&c 1",
    "{<<: {a: 1}}",
    "{? [1, 2] : 3}",
    "{1: 2, 1: 3}",
    "{",
    "\t",
    "2001-12-14",
    "0x10",
    "0o17",
    "%",
)

Place = tuple[Any, Any]  # a dict or list, and a key or number in it


def places(value: Any) -> Iterator[Place]:
    """Every place of a config, at any depth."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def number(draw: random.Random, key: Any) -> Any:
    """An odd number, a small one where a large one would cost."""
    value = draw.choice(NUMBERS)
    return draw.choice((-1, 0, 0.5, math.nan)) if key in COSTLY and not value <= 3 else value


def spoil(draw: random.Random, config: dict[str, Any], raw: dict[str, str]) -> None:
    """Change one place of a config; `raw` receives text that a word in it stands for."""
    holder, key = draw.choice(list(places(config)))
    keyed = isinstance(holder, dict)
    kind = draw.choice(("number", "number", "other", "other", "move", "misspell", "foreign", "remove", "class", "raw"))
    if kind == "number":
        holder[key] = number(draw, key)
    elif kind == "other":
        holder[key] = copy.deepcopy(draw.choice(OTHERS))
    elif kind == "move":  # what stands elsewhere
        other, name = draw.choice(list(places(config)))
        if not (key in COSTLY and isinstance(other[name], int | float) and other[name] > 64):
            holder[key] = copy.deepcopy(other[name])
    elif kind == "misspell" and keyed:
        name, at = str(key), draw.randrange(len(str(key)) or 1)
        holder[name[:at] + draw.choice(("", "x", "-", ".", name[at : at + 1] * 2)) + name[at + 1 :]] = holder.pop(key)
    elif kind == "foreign" and keyed:
        holder[draw.choice(("foreign", "init_args", "class_path", "lr", "0", 7, None, True, ""))] = number(draw, key)
    elif kind == "remove":
        del holder[key]
    elif kind == "class":
        named = [place for place in places(config) if place[1] == "class_path"]
        if named and draw.random() < 0.7:
            holder, key = draw.choice(named)
            holder[key] = draw.choice(CLASSES)
        else:
            holder[key] = {"class_path": draw.choice(CLASSES), "init_args": {"command": f"touch {EXECUTED}"}}
    else:
        word = f"RAW{len(raw)}RAW"
        holder[key], raw[word] = word, draw.choice(RAW)


def write(draw: random.Random, config: dict[str, Any]) -> str:
    """A config spoilt in up to three places, as YAML; now and then with a repeated line."""
    raw: dict[str, str] = {}
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        spoil(draw, config, raw)
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    for word, stands_for in raw.items():
        text = text.replace(word, stands_for)
    lines = text.splitlines(keepends=True)
    if draw.random() < 0.05:
        lines.insert(draw.randrange(len(lines)), draw.choice(lines))
    return "".join(lines)


@pytest.fixture(scope="session")
def bases(few: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The configs to spoil: the two first ones and some recipes, made small, and one with every setting."""
    folder = tmp_path_factory.mktemp("bases")
    found = {name: shrunken(name) for name in RECIPES}
    for name, options in {"teacher": TINY, **{name: small_weights(name) for name in RECIPES}}.items():
        if options is not None:
            vit = ViT(image_size=16, num_classes=4, **options)
            vit.classes, vit.preprocess = list("0123"), Preprocess((16, 16), mean=MEAN, std=STD)
            save_weights(vit, folder / f"{name}.safetensors")
    for name in ("pretrain", "finetune"):
        found[name] = yaml.safe_load((REPOSITORY / "configs" / f"{name}.yaml").read_text())
        found[name]["trainer"] |= {"max_steps": 2, "logger": False}
        found[name]["data"] |= {"batch_size": 16, "num_workers": 0, "image_size": 16}
        found[name]["model"]["init_args"]["schedule"]["warmup"] = 1
    found["pretrain"]["model"]["init_args"]["vit"]["init_args"] |= TINY
    found["finetune"]["model"]["init_args"]["init_from"] = str(trained / "runs" / "pretrain")
    found["everything"] = yaml.safe_load((trained / "runs" / "pretrain" / "config.yaml").read_text())
    found["everything"]["run"]["name"] = "everything"
    for name, config in found.items():
        config["data"]["root"] = str(few)
        arguments = config["model"]["init_args"]
        if name in RECIPES and "init_from" in arguments:
            arguments["init_from"] = str(folder / f"{name}.safetensors")
        if "teacher" in arguments.get("objective", {}).get("init_args", {}):
            arguments["objective"]["init_args"]["teacher"] = str(folder / "teacher.safetensors")
    return found


def bounded(folder: Path) -> Callable[[], None]:
    """For a child: limit its time and memory, mark its first step with a file, and stop soon after it."""

    def before() -> None:
        signal.alarm(SECONDS)
        if sys.platform == "linux":
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + GIBIBYTES * 2**30
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        os.environ["WANDB_MODE"] = "disabled"
        ended = Stage.on_train_batch_end

        def on_train_batch_end(stage: Stage, *arguments: Any) -> None:
            ended(stage, *arguments)
            if stage.trainer.global_step:
                (folder / "stepped").touch()
            if stage.trainer.global_step > 1:
                stage.trainer.should_stop = True

        setattr(Stage, "on_train_batch_end", on_train_batch_end)  # noqa: B010

    return before


@pytest.mark.parametrize(
    "seed", [*range(SHORT), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(SHORT, CASES))]
)
def test_a_spoilt_config_is_refused_in_one_line_or_steps(
    seed: int, bases: dict[str, dict[str, Any]], vitlit: Callable[..., Result], tmp_path: Path
) -> None:
    draw = random.Random(seed)
    name = draw.choice((*sorted(bases), "everything", "everything"))
    text = write(draw, copy.deepcopy(bases[name]))
    (tmp_path / "spoilt.yaml").write_text(text)
    result = vitlit("fit", "--config", "spoilt.yaml", before=bounded(tmp_path))
    try:
        assert not (tmp_path / EXECUTED).exists(), "something was executed"
        if result.code == 0:
            assert "Traceback" not in result.err
            assert (tmp_path / "stepped").exists(), "it made no step"
        else:
            refused(result)
    except AssertionError as error:
        pytest.fail(f"seed {seed}, {name}: {error}\n{text}\nexit code {result.code}\n{result.err}", pytrace=False)


def test_the_bases_step(bases: dict[str, dict[str, Any]], vitlit: Callable[..., Result], tmp_path: Path) -> None:
    """Otherwise every case would be refused for the wrong reason."""
    for name, config in bases.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        result = vitlit("fit", "--config", f"{name}.yaml", before=bounded(tmp_path))
        assert result.code == 0, result.err
        (tmp_path / "stepped").unlink()
