"""The recipes: each is its source's at full size, built as the command line builds it, and a shrunken copy steps."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from conftest import HEADS, REPOSITORY, Result
from jsonargparse import Namespace

import vitlit.cli.completion
from vitlit.cli.parser import Parser
from vitlit.data import ImageFolderData, Preprocess
from vitlit.model import ViT
from vitlit.stages import Stage
from vitlit.weights import Weights, save_weights
from vitlit.weights.weights import IMAGENET

pytestmark = pytest.mark.usefixtures("undrawn")

RECIPES = {path.stem: path for path in sorted((REPOSITORY / "configs" / "recipes").glob("*.yaml"))}

# Full size, by recipe, literal numbers of its source. parameters: those of 2010.11929's table 1 and of the published
# files, less what the recipe has not, with the head; decayed: those under weight decay. Steps of ImageNet-1k are of
# 1,281,167 images. peak and last: of the learning rate; quarter: what is left of it after a quarter of the decay,
# 0.8536 for a cosine, 0.75 for a line; dashes where the rate changes by epoch, which BY_EPOCH holds.
FACTS = """
                          parameters     decayed  size batch   steps warmup  peak   last quarter decay clip
vit_b16_imagenet1k        87_158_248  86_882_304   224  4096   93600  10000  3e-3      0  0.8536   0.3    1
vit_b16_imagenet1k_384    86_859_496           0   384   512   20000    500  3e-2      0  0.8536     0    1
vit_b16_imagenet21k      103_186_515 102_889_728   224  4096  310680  10000  1e-3   1e-5  0.75    0.03    1
vit_b16_transfer          86_098_186           0   384   512     500     50  3e-2      0  0.8536     0    1
augreg_ti16_imagenet1k     5_754_280   5_684_736   224  4096   93835  10000  1e-3      0  0.8536   0.1    1
augreg_s16_imagenet1k     22_198_120  22_060_032   224  4096   93835  10000  1e-3      0  0.8536   0.1    1
augreg_b16_imagenet1k     87_157_480  86_882_304   224  4096   93835  10000  1e-3      0  0.8536   0.1    1
augreg_imagenet1k_384     22_196_200           0   384   512   20000    500  1e-2      0  0.8536     0    1
vit_s16_imagenet1k_90ep   22_122_472  22_060_032   224  1024  112603  10000  1e-3      0  0.8536   0.1    1
vit_s16_imagenet1k_150ep  22_122_472  22_060_032   224  1024  187671  10000  1e-3      0  0.8536   0.1    1
vit_s16_imagenet1k_300ep  22_122_472  22_060_032   224  1024  375342  10000  1e-3      0  0.8536   0.1    1
deit_s16                  22_050_664  21_912_576   224  1024  375300      -  1e-3      -       -  0.05    0
deit_b16                  86_567_656  86_292_480   224  1024  375300      -  1e-3      -       -  0.05    0
deit_s16_distilled        22_436_432  22_296_960   224  1024  375300      -  1e-3      -       -  0.05    0
deit_b16_distilled        87_338_192  87_061_248   224  1024  375300      -  1e-3      -       -  0.05    0
deit3_s16                 22_059_496  21_912_576   224  2048  500000      -  4e-3      -       -  0.05    0
deit3_b16                 86_545_384  86_292_480   192  2048  500000      -  3e-3      -       -  0.05    0
deit3_b16_224             86_585_320  86_292_480   224   512   50040      -  1e-5      -       -   0.1    0
mae_b16_finetune          86_567_656  86_292_480   224  1024  125100   6255  2e-3   1e-6  0.8536  0.05    0
mae_l16_finetune         304_326_632 303_800_320   224  1024   62550   6255  4e-3   1e-6  0.8536  0.05    0
small_cifar10              2_692_426   2_692_426    32   128  117100  11710  1e-3   1e-6  0.8536  0.05    0
dinov2_linear_probe       22_013_800           0   224  1024   12500      0  4e-2      0  0.8536     0    0
"""

# The epochs, and the learning rates of the first, by facebookresearch/deit's main.py with timm's scheduler: epoch n has
# the rate of n - 1, and the cosine has begun when the warm-up ends.
DEIT = (300, [1e-6, 1e-6, 2.008e-4, 4.006e-4, 6.004e-4, 8.002e-4, 9.993e-4, 9.990e-4])
BY_EPOCH: dict[str, tuple[int, list[float]]] = {
    **dict.fromkeys(("deit_s16", "deit_b16", "deit_s16_distilled", "deit_b16_distilled"), DEIT),
    "deit3_s16": (800, [1e-6, 1e-6, 8.008e-4, 1.6006e-3, 2.4004e-3, 3.2002e-3, 3.9996e-3]),
    "deit3_b16": (800, [1e-6, 1e-6, 6.008e-4, 1.2006e-3, 1.8004e-3, 2.4002e-3, 2.9997e-3]),
    "deit3_b16_224": (20, [1e-6, 1e-6, 2.8e-6, 4.6e-6, 6.4e-6, 8.2e-6, 1e-5, 1e-5]),
}

# What the sources regularise with. path: stochastic depth; smooth: label smoothing; mixed: the share of batches that
# are; lowest: the smallest crop's area; ratio: of the crop at evaluation. A dash is not compared.
REGULARISED = """
                          dropout  path smooth mixup cutmix mixed erase repeats lowest ratio
vit_b16_imagenet1k            0.1     0      0     0      0     1     0       1   0.05 0.875
vit_b16_imagenet1k_384        0.1     0      0     0      0     1     0       1   0.05     1
vit_b16_imagenet21k           0.1     0      0     0      0     1     0       1   0.05 0.875
vit_b16_transfer                0     0      0     0      0     1     0       1   0.05     1
augreg_ti16_imagenet1k          0     0      0     0      0     1     0       1   0.05 0.875
augreg_s16_imagenet1k           0     0      0   0.5      0     1     0       1   0.05 0.875
augreg_b16_imagenet1k         0.1   0.1      0   0.8      0     1     0       1   0.05 0.875
augreg_imagenet1k_384           0     0      0     0      0     1     0       1   0.05     1
vit_s16_imagenet1k_90ep         0     0      0   0.2      0     1     0       1   0.05 0.875
vit_s16_imagenet1k_150ep        0     0      0   0.2      0     1     0       1   0.05 0.875
vit_s16_imagenet1k_300ep        0     0      0   0.2      0     1     0       1   0.05 0.875
deit_s16                        0   0.1    0.1   0.8      1     1  0.25       3   0.08 0.875
deit_b16                        0   0.1    0.1   0.8      1     1  0.25       3   0.08 0.875
deit_s16_distilled              0   0.1    0.1   0.8      1     1  0.25       3   0.08 0.875
deit_b16_distilled              0   0.1    0.1   0.8      1     1  0.25       3   0.08 0.875
deit3_s16                       0  0.05      0   0.8      1     1     0       3   0.08     1
deit3_b16                       0   0.2      0   0.8      1     1     0       3   0.08     1
deit3_b16_224                   0   0.2    0.1   0.8      1     1     0       1   0.08     1
mae_b16_finetune                0   0.1    0.1   0.8      1     1  0.25       1   0.08 0.875
mae_l16_finetune                0   0.2    0.1   0.8      1     1  0.25       1   0.08 0.875
small_cifar10                   0   0.1    0.1     1      1   0.5  0.25       1      -     1
dinov2_linear_probe             0     0      0     0      0     1     0       1   0.08 0.875
"""

# And what they train by.
METHODS = """
                          optimizer loss     crop            augment
vit_b16_imagenet1k        AdamW     sigmoid  inception       -
vit_b16_imagenet1k_384    SGD       softmax  inception       -
vit_b16_imagenet21k       AdamW     sigmoid  inception       -
vit_b16_transfer          SGD       softmax  inception       -
augreg_ti16_imagenet1k    AdamW     sigmoid  inception       BigVisionRandAugment
augreg_s16_imagenet1k     AdamW     sigmoid  inception       BigVisionRandAugment
augreg_b16_imagenet1k     AdamW     sigmoid  inception       BigVisionRandAugment
augreg_imagenet1k_384     SGD       softmax  inception       -
vit_s16_imagenet1k_90ep   AdamW     softmax  inception       BigVisionRandAugment
vit_s16_imagenet1k_150ep  AdamW     softmax  inception       BigVisionRandAugment
vit_s16_imagenet1k_300ep  AdamW     softmax  inception       BigVisionRandAugment
deit_s16                  AdamW     softmax  random_resized  TimmRandAugment
deit_b16                  AdamW     softmax  random_resized  TimmRandAugment
deit_s16_distilled        AdamW     softmax  random_resized  TimmRandAugment
deit_b16_distilled        AdamW     softmax  random_resized  TimmRandAugment
deit3_s16                 LAMB      bce      random_resized  ThreeAugment
deit3_b16                 LAMB      bce      random_resized  ThreeAugment
deit3_b16_224             AdamW     softmax  random_resized  TimmRandAugment
mae_b16_finetune          AdamW     softmax  random_resized  TimmRandAugment
mae_l16_finetune          AdamW     softmax  random_resized  TimmRandAugment
small_cifar10             AdamW     softmax  pad             AutoAugment
dinov2_linear_probe       SGD       softmax  random_resized  -
"""

# The same of pretraining without labels. parameters: the encoder's, as published, with a mask token where it needs one;
# of the objective those that learn; end: of the weight decay.
UNLABELLED = """
                  parameters  objective  size batch   steps warmup peak   last decay  end clip views
masked_patch_b16  85_799_424    393_728   224  4096  100000  10000 2e-4      0   0.1    -    1     1
mae_b16_800ep     85_647_360 26_008_320   224  4096  249600  12480 2.4e-3    0  0.05    -    0     1
dino_s16_100ep    21_665_664 22_286_592   224   512  250200  25020 1e-3   1e-6  0.04  0.4    3    10
dinov2_s14_short  21_629_184 22_286_592   224  1024  125000  12500 4e-3   1e-6  0.04  0.4    3    10
lejepa_s16        21_665_664  5_255_296   224   512  250200  25020 5e-4   5e-7  0.05    -    0     8
"""

# Training images and classes; of ImageNet-21k without the 0.4 % held out.
IMAGES = {"data/imagenet": (1_281_167, 1000), "data/imagenet21k": (14_140_333, 21_843), "data/cifar10": (50_000, 10)}

# The files that others publish, which finetunings begin with: the ViT in them, and its preprocessing.
FILES: dict[str | None, tuple[str, dict[str, Any]]] = {
    "mae_pretrain_vit_base.pth": ("B/16", {}),
    "mae_pretrain_vit_large.pth": ("L/16", {}),
    "dinov2_vits14_pretrain.pth": ("S/14", {"image_size": 518, "layer_scale": 1e-5, "resampling": "offset"}),
    None: ("S/14", {}),  # the user's
}

# The learning rates of a layer-wise decay of 0.65 over 12 blocks, from the embedding to the head (MAE's lr_decay.py).
LAYER_RATES = {0: 0.003697, 1: 0.005688, 6: 0.049022, 12: 0.65, 13: 1.0}


def table(text: str) -> dict[str, dict[str, float | str]]:
    head, *rows = [line.split() for line in text.strip().splitlines()]
    return {
        row[0]: {name: value(cell) for name, cell in zip(head, row[1:], strict=True) if cell != "-"} for row in rows
    }


def value(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load(RECIPES[name].read_text())


class Built(NamedTuple):
    """A recipe's objects at full size, on the meta device, their arguments, and the number of training images."""

    stage: Stage
    data: ImageFolderData
    arguments: dict[str, Any]
    images: int


@cache
def parser() -> Parser:
    """What the command line reads model and data with."""
    made = Parser()
    made.add_argument("--seed_everything", type=int)
    made.add_lightning_class_args(Stage, "model", subclass_mode=True)
    made.add_lightning_class_args(ImageFolderData, "data")
    return made


@cache
def begins(name: str) -> Weights | None:
    """The weights that a recipe begins with, None for none: of another recipe's run, or of a published file."""
    arguments = read(name)["model"]["init_args"]
    if "init_from" not in arguments:
        return None
    source = arguments["init_from"]
    if source in FILES:
        preset, options = FILES[source]
        with torch.device("meta"):
            vit = ViT.from_preset(preset, **options)
        preprocess: dict[str, Any] = {**IMAGENET, "crop_ratio": 0.875} if source else {}
    else:
        before = built(Path(source).name)
        vit, preprocess = before.stage.vit, asdict(before.data.preprocess)
        del preprocess["image_size"]
    return Weights(Path(source or "file"), "test", {}, vit.config.plain(), [], preprocess)


@cache
def built(name: str) -> Built:
    recipe = read(name)
    images, classes = IMAGES.get(recipe["data"]["root"], (1000, 10))
    recipe["data"]["root"] = recipe["data"]["root"] or "folder"
    config = parser().parse_object({key: recipe[key] for key in ("seed_everything", "model", "data")})
    config.ckpt_path = None
    splits: Any = SimpleNamespace(scan=lambda: None, classes=[str(i) for i in range(classes)], multi_label=False)
    weights = begins(name)
    vitlit.cli.completion.fill_size(config, recipe)
    vitlit.cli.completion.fill_config(config, weights, splits)
    with torch.device("meta"):
        made = parser().instantiate_classes(Namespace(model=config.model, data=config.data))
    made.model.weights = weights
    made.model.lead(made.data)
    return Built(made.model, made.data, config.model.init_args.as_dict(), images)


@cache
def optimised(name: str) -> tuple[torch.optim.Optimizer, Callable[[int], float], int]:
    """A recipe's optimizer, the share of the peak that an update uses, and the number of updates, on its own data."""
    stage, data, _, images = built(name)
    trainer, epoch = read(name)["trainer"], images // data.batch_size
    total = trainer["max_steps"] if trainer["max_epochs"] == -1 else epoch * trainer["max_epochs"]
    stage.trainer = SimpleNamespace(
        estimated_stepping_batches=total,
        fast_dev_run=False,
        num_training_batches=epoch,
        accumulate_grad_batches=1,
        datamodule=SimpleNamespace(steps_per_epoch=epoch, batch_size=data.batch_size),
    )
    made = stage.configure_optimizers()
    return made["optimizer"], made["lr_scheduler"]["scheduler"].lr_lambdas[0], total


# All recipes


def test_the_tables_have_all_recipes() -> None:
    own = {name for name in RECIPES if name.startswith("small_") or name.endswith("_folder")} - {"small_cifar10"}
    ours = set(RECIPES) - own - {"continue_dinov2"}
    assert set(table(FACTS)) == set(table(REGULARISED)) == set(table(METHODS)) == ours - set(table(UNLABELLED))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_it_is(name: str) -> None:
    header = RECIPES[name].read_text().split("seed_everything")[0]
    fields = [line.split()[1] for line in header.splitlines() if line.startswith("# ") and line[2] != " "]
    assert [word for word in fields if word in ("Source", "Expected", "Run", "Cost", "Differs")] == [
        *("Source", "Expected", "Run", "Cost", "Differs")
    ]
    run = " ".join(line.strip("# ") for line in header.partition("# Run")[2].partition("# Cost")[0].splitlines())
    measured = re.match(r"\d.* at ([0-9a-f]{7})\b.* [\d.]+ hours", run)
    assert measured or run.startswith("not run")
    row = [
        line for line in (REPOSITORY / "docs" / "recipes.md").read_text().splitlines() if line.startswith(f"| `{name}`")
    ]
    assert not measured or [measured[1] in line for line in row] == [True]
    assert f"vitlit fit --config recipes/{name}" in header
    assert "MEASURED" not in header
    trainer = read(name)["trainer"]
    assert {trainer.get(key, "auto") for key in ("devices", "accelerator", "strategy")} == {"auto"}
    assert "precision" not in trainer
    assert trainer["logger"] == {"class_path": "vitlit.loggers.Wandb"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_begins_with_what_there_is(name: str) -> None:
    arguments = read(name)["model"]["init_args"]
    for source in (arguments.get("init_from"), arguments.get("objective", {}).get("init_args", {}).get("teacher")):
        assert source in FILES or source.removeprefix("runs/") in RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds(name: str) -> None:
    stage, data, *_ = built(name)
    optimizer, share, total = optimised(name)
    groups = optimizer.param_groups
    trained = sum(p.numel() for part in (stage.vit, stage.objective) for p in part.parameters() if p.requires_grad)
    assert sum(p.numel() for group in groups for p in group["params"]) == trained
    assert all(0 <= share(step) <= 1 for step in range(0, total, max(1, total // 100)))
    assert data.batch_size % (data.micro_batch or 1) == 0


# By source


@pytest.mark.parametrize("name", table(FACTS))
def test_a_recipe_is_its_sources(name: str) -> None:
    stage, data, *_ = built(name)
    optimizer, share, total = optimised(name)
    groups = optimizer.param_groups
    decays = {group["weight_decay"] for group in groups}
    facts = table(FACTS)[name]
    found: dict[str, float] = {
        "parameters": sum(p.numel() for p in stage.vit.parameters()),
        "decayed": sum(p.numel() for group in groups if group["weight_decay"] for p in group["params"]),
        "size": data.preprocess.image_size[0],
        "batch": data.batch_size,
        "steps": total,
        "peak": max(group["initial_lr"] for group in groups),
        "decay": max(decays),
        "clip": read(name)["trainer"].get("gradient_clip_val", 0),
    }
    if "quarter" in facts:
        warmup, end = next(step for step in range(total) if share(step) == 1), share(total)
        left = (share(round(warmup + (total - warmup) / 4)) - end) / (1 - end)
        assert left == pytest.approx(facts.pop("quarter"), abs=2e-3)
        found |= {"warmup": warmup, "last": found["peak"] * end}
    assert found == {key: pytest.approx(fact, rel=1e-5) for key, fact in facts.items()}
    assert decays <= {0, found["decay"]}


@pytest.mark.parametrize("name", table(UNLABELLED))
def test_a_recipe_without_labels_is_its_sources(name: str) -> None:
    stage, data, *_ = built(name)
    (optimizer, share, total), facts = optimised(name), table(UNLABELLED)[name]
    peak = max(group["initial_lr"] for group in optimizer.param_groups)
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in stage.vit.parameters()),
        "objective": sum(p.numel() for p in stage.objective.parameters() if p.requires_grad),
        "size": data.preprocess.image_size[0],
        "batch": data.batch_size,
        "steps": total,
        "warmup": next(step for step in range(total) if share(step) == 1),
        "peak": peak,
        "last": peak * share(total),
        "decay": max(group["weight_decay"] for group in optimizer.param_groups),
        "end": stage.schedule.weight_decay_end,
        "clip": read(name)["trainer"].get("gradient_clip_val", 0),
        "views": data.num_views,
    }
    assert {key: found[key] for key in facts} == {key: pytest.approx(fact, rel=1e-5) for key, fact in facts.items()}
    assert (found["end"] is None) == ("end" not in facts)


@pytest.mark.parametrize("name", sorted(set(table(FACTS)) - set(BY_EPOCH)))
def test_a_warm_up_begins_at_its_sources_rate(name: str) -> None:
    optimizer, share, _ = optimised(name)
    peak = max(group["initial_lr"] for group in optimizer.param_groups)
    first = {"dinov2_linear_probe": 4e-2, "small_cifar10": 1e-6}  # of those without a warm-up from 0
    assert peak * share(0) == pytest.approx(first.get(name, 0))


@pytest.mark.parametrize("name", BY_EPOCH)
def test_the_rates_of_epochs_are_the_sources(name: str) -> None:
    (optimizer, share, total), (epochs, rates) = optimised(name), BY_EPOCH[name]
    (peak,) = {group["initial_lr"] for group in optimizer.param_groups}
    steps = total // epochs
    assert [peak * share(steps * i) for i in range(len(rates))] == pytest.approx(rates, rel=1e-3)
    assert peak * share(total - 1) == pytest.approx(1e-5, rel=0.02)  # 1.01e-5: the scheduler's last epoch is not used


@pytest.mark.parametrize("name", table(METHODS))
def test_a_recipe_regularises_as_its_source_does(name: str) -> None:
    stage, data, *_ = built(name)
    recipe, config = read(name), stage.vit.config
    (augment,) = recipe["data"].get("augment") or [{"class_path": None}]
    found: dict[str, Any] = {
        "dropout": config.dropout,
        "path": config.drop_path,
        "smooth": stage.objective.label_smoothing,
        "mixup": data.mixing.mixup,
        "cutmix": data.mixing.cutmix,
        "mixed": data.mixing.prob,
        "erase": data.erasing.prob,
        "repeats": data.repeats,
        "lowest": recipe["data"].get("crop_scale", [None])[0],
        "ratio": data.preprocess.crop_ratio,
        "optimizer": type(optimised(name)[0]).__name__,
        "loss": stage.objective.loss,
        "crop": recipe["data"].get("crop"),
        "augment": str(augment["class_path"]).rpartition(".")[-1],
    }
    facts = table(REGULARISED)[name] | table(METHODS)[name]
    assert {key: found[key] for key in facts} == facts
    assert ("augment" in table(METHODS)[name]) == ("augment" in recipe["data"])
    assert data.mixing.switch == 0.5
    assert config.attention_dropout == 0


def test_the_schedule_of_better_plain_vits_is_theirs() -> None:
    """Values of big_vision's schedule for 112,603 steps (utils.py)."""
    optimizer, share, _ = optimised("vit_s16_imagenet1k_90ep")
    peak = optimizer.param_groups[0]["initial_lr"]
    values = {0: 0, 1: 1e-7, 5000: 5e-4, 10_000: 1e-3, 20_000: 9.767e-4, 56_301: 5.763e-4, 100_000: 3.677e-5}
    assert {step: peak * share(step) for step in values} == pytest.approx(values, rel=2e-4)


def test_layers_of_mae_learn_at_maes_rates() -> None:
    optimizer, _, _ = optimised("mae_b16_finetune")
    rates = sorted({group["initial_lr"] for group in optimizer.param_groups})
    assert len(rates) == 14
    assert {i: rates[i] / 2e-3 for i in LAYER_RATES} == pytest.approx(LAYER_RATES, rel=1e-3)
    rates = sorted({group["initial_lr"] for group in optimised("mae_l16_finetune")[0].param_groups})
    assert (len(rates), rates[0] / rates[-1], rates[1] / rates[0]) == pytest.approx((26, 0.75**25, 1 / 0.75))


def test_what_else_the_sources_say() -> None:
    """Arguments of a few objectives, optimizers and augmentations, as their programs have them."""

    def argument(name: str, part: str, key: str) -> Any:
        return built(name).arguments[part]["init_args"][key]

    for name in ("augreg_ti16_imagenet1k", "augreg_s16_imagenet1k", "augreg_b16_imagenet1k"):
        assert argument(name, "objective", "head_bias") == -6.9
    for name, std in (
        ("deit_b16", 0.02),
        ("deit3_s16", 0.02),
        ("mae_l16_finetune", 2e-5),
        ("dinov2_linear_probe", 0.01),
    ):
        assert argument(name, "objective", "head_std") == std
    for name in ("deit3_s16", "deit3_b16"):
        assert (argument(name, "optimizer", "eps"), argument(name, "optimizer", "max_grad_norm")) == (1e-8, 1)
    for name, teacher in (("deit_s16_distilled", "runs/deit_b16"), ("deit_b16_distilled", "runs/deit3_b16_224")):
        found = [argument(name, "objective", key) for key in ("kind", "share", "teacher")]
        assert found == ["hard", 0.5, teacher]
    for name in ("vit_b16_imagenet21k", "vit_b16_imagenet1k"):
        assert argument(name, "objective", "head_bias") == -10
    magnitudes = {"augreg_ti16": 0, "augreg_s16": 15, "augreg_b16": 20, "vit_s16": 10}
    for start, magnitude in magnitudes.items():
        for name in (name for name in RECIPES if name.startswith(start)):
            assert read(name)["data"]["augment"][0]["init_args"] == {"ops": 2, "magnitude": magnitude}
    for name in (name for name in RECIPES if name.startswith("deit_")):
        assert read(name)["trainer"]["callbacks"][0]["init_args"] == {"decay": 0.99996}
    assert built("deit3_b16_224").arguments["keep_head"] is True
    probe = built("dinov2_linear_probe").stage.vit
    assert {name for name, p in probe.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


# Whose initial weights, and whether every block has the same stochastic depth, if not vision_transformer's and not.
INITS = {
    **dict.fromkeys(("augreg_ti16_imagenet1k", "augreg_s16_imagenet1k", "augreg_b16_imagenet1k"), "big_vision"),
    **dict.fromkeys(("deit_s16", "deit_b16", "deit_s16_distilled", "deit_b16_distilled"), "timm"),
    **dict.fromkeys(("deit3_s16", "deit3_b16"), "timm"),
}
SAME_DEPTH = ("deit3_s16", "deit3_b16", "deit3_b16_224", "small_cifar10")
# (interpolation, squash) of evaluation, and the resampling of positions.
SEEN = {
    "vit_b16_imagenet21k": ("bilinear", False, "bilinear"),
    "vit_b16_imagenet1k": ("bilinear", False, "bilinear"),
    "vit_b16_imagenet1k_384": ("bilinear", True, "bilinear"),
    "vit_b16_transfer": ("bilinear", True, "bilinear"),
    "augreg_ti16_imagenet1k": ("bilinear", False, "bilinear"),
    "augreg_s16_imagenet1k": ("bilinear", False, "bilinear"),
    "augreg_b16_imagenet1k": ("bilinear", False, "bilinear"),
    "augreg_imagenet1k_384": ("bicubic", False, "bilinear"),
    **dict.fromkeys((f"vit_s16_imagenet1k_{epochs}ep" for epochs in (90, 150, 300)), ("bilinear", False, "antialias")),
    "dinov2_linear_probe": ("bicubic", False, "offset"),
}


@pytest.mark.parametrize("name", table(FACTS))
def test_a_recipe_begins_and_looks_as_its_source_does(name: str) -> None:
    stage, data, *_ = built(name)
    config, rate = stage.vit.config, stage.vit.config.drop_path
    assert config.init == INITS.get(name, "vision_transformer")
    blocks: Any = stage.vit.blocks
    rates = [block.drop_path for block in blocks]
    assert (rates[0], rates[-1]) == (rate if name in SAME_DEPTH else 0, rate)
    found = (data.preprocess.interpolation, data.preprocess.squash, config.resampling)
    assert found == SEEN.get(name, ("bicubic", False, "antialias"))
    assert config.mlp == ("gelu_tanh" if name.startswith(("vit_", "augreg_")) else "gelu")
    assert config.float32_head == (name == "dinov2_linear_probe")


def test_what_a_recipes_source_leaves_open_stands_in_its_header() -> None:
    """Numbers that cannot be reached, or not always, and epochs as their logs count them."""
    said = {
        "deit_b16": ["unstable", "79.2", "78.8", "78.6"],
        "deit_b16_distilled": ["none that can be reached", "convnet"],
        "deit_s16_distilled": ["none that can be reached", "convnet"],
        "deit3_s16": ["after 6, 11, 21, 51 and 101 epochs"],
        "deit3_b16": ["after 6, 11, 21, 51 and 101 epochs"],
        "vit_b16_imagenet21k": ["47.88"],
        "vit_b16_imagenet1k": ["74.79", "-10", "-6.9", "not known"],
        "vit_b16_transfer": ["5e9b3db", "98.76", "99.02", "flips"],
        "augreg_b16_imagenet1k": ["79.154", "81.102"],
        "augreg_imagenet1k_384": ["81.130", "81.102", "central square"],
        "vit_s16_imagenet1k_90ep": ["76.9 to 77.3", "5 h 41"],
        "small_cifar10": ["100", "a pixel smaller"],
    }
    for name, words in said.items():
        header = " ".join(line[1:].strip() for line in RECIPES[name].read_text().splitlines() if line.startswith("#"))
        assert [word for word in words if word not in header] == [], name


# Shrunken copies

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as the published files have them
TINY = {"patch_size": 8, "width": 16, "depth": 2, "heads": 2, "mlp_dim": 32}


def tiny(name: str) -> dict[str, Any]:
    """A recipe's ViT made small."""
    options = read(name)["model"]["init_args"]["vit"]["init_args"]
    return {key: value for key, value in options.items() if key not in ("preset", "image_size")} | TINY


def small_weights(name: str) -> dict[str, Any] | None:
    """The ViT, made small, whose weights a recipe begins with."""
    source = read(name)["model"]["init_args"].get("init_from", "")
    if source == "":
        return None
    if source not in FILES:
        return tiny(Path(source).name)
    return {key: value for key, value in FILES[source][1].items() if key != "image_size"} | TINY


def shrunken(name: str) -> dict[str, Any]:
    """A recipe made so small that it steps in no time, with its options as they are."""
    recipe = copy.deepcopy(read(name))
    arguments = recipe["model"]["init_args"]
    if "vit" in arguments:
        arguments["vit"] = {"class_path": "vitlit.ViT", "init_args": tiny(name)}
    if "init_from" in arguments:
        arguments["init_from"] = "weights.safetensors"
    if "teacher" in arguments.get("objective", {}).get("init_args", {}):
        arguments["objective"]["init_args"]["teacher"] = "teacher.safetensors"
    if heads := HEADS.get(arguments.get("objective", {}).get("class_path", "")):
        arguments["objective"]["init_args"] = {**arguments["objective"].get("init_args", {}), **heads}
    arguments["schedule"]["warmup"] = 1
    small = {"root": "few", "image_size": 16, "batch_size": 8, "num_workers": 0}
    recipe["data"] |= small | ({"micro_batch": 4} if "micro_batch" in recipe["data"] else {})
    recipe["data"].pop("holdout", None)
    recipe["trainer"] |= {"max_steps": 2, "max_epochs": -1, "logger": False, "accelerator": "cpu", "devices": 1}
    return recipe


# Recipes that differ only in what is made small step once.
DISTINCT = {json.dumps([shrunken(name), small_weights(name)]): name for name in reversed(RECIPES)}


@pytest.mark.parametrize("name", sorted(DISTINCT.values()))
def test_a_shrunken_copy_steps(name: str, few: Path, tmp_path: Path, vitlit: Callable[..., Result]) -> None:
    recipe = shrunken(name)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for file, options in (("weights", small_weights(name)), ("teacher", TINY)):
        if options is not None:
            vit = ViT(image_size=16, num_classes=4, **options)
            vit.classes, vit.preprocess = list("0123"), Preprocess((16, 16), mean=MEAN, std=STD)
            save_weights(vit, tmp_path / f"{file}.safetensors")
    result = vitlit("fit", "--config", "recipe.yaml", "--data.root", few, "--run.report", "false")
    assert result.code == 0, result.err
    assert "runs/recipe is complete" in result.out
