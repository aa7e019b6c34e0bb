"""The recipes are those of their papers, at full size."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import REPOSITORY

from vitlit.model import ViT
from vitlit.objectives import Supervised

IMAGENET = 1_281_167
RECIPES = REPOSITORY / "configs" / "recipes"


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text())


def test_every_recipe_states_source_result_cost_and_differences() -> None:
    for path in RECIPES.glob("*.yaml"):
        header = path.read_text().split("seed_everything")[0]
        assert all(f"# {word}" in header for word in ("Source", "Expected", "Cost", "Differs")), path.name


@pytest.mark.parametrize(
    ("name", "size", "parameters", "epochs", "batch", "lr", "decay", "dropout", "steps"),
    [
        # 2010.11929 table 3; the tanh head adds D^2 + D parameters to the published 86,567,656.
        ("vit_b16_imagenet1k", 224, 86_567_656 + 768 * 769, 300, 4096, 3e-3, 0.3, 0.1, 312 * 300),
        # 2205.01580; the original recipe's S/16 with its tanh head has 22,198,504 parameters.
        ("vit_s16_imagenet1k_90ep", 224, 22_198_504, 90, 1024, 1e-3, 0.1, 0.0, 1251 * 90),
    ],
)
def test_pretraining_recipes_are_the_papers(
    name: str, size: int, parameters: int, epochs: int, batch: int, lr: float, decay: float, dropout: float, steps: int
) -> None:
    recipe = read(name)
    stage, data, trainer = recipe["model"]["init_args"], recipe["data"], recipe["trainer"]
    with torch.device("meta"):
        vit = ViT.from_preset(**stage["vit"]["init_args"], image_size=data["image_size"])
        Supervised(vit, 1000)
    assert sum(p.numel() for p in vit.parameters()) == parameters
    assert vit.config["dropout"] == dropout
    assert data["image_size"] == size
    assert data["batch_size"] == batch
    assert float(stage["optimizer"]["init_args"]["lr"]) == lr
    assert stage["optimizer"]["init_args"]["weight_decay"] == decay
    assert stage["schedule"] == {"warmup": 10_000, "decay": "cosine"}
    assert trainer["gradient_clip_val"] == 1.0
    assert IMAGENET // data["batch_size"] * trainer["max_epochs"] == steps
    assert trainer["max_epochs"] == epochs


def test_the_finetuning_recipe_is_the_papers() -> None:
    recipe = read("vit_b16_imagenet1k_384")
    stage, data = recipe["model"]["init_args"], recipe["data"]
    assert stage["optimizer"]["class_path"] == "torch.optim.SGD"
    assert stage["optimizer"]["init_args"] == {"lr": 0.03, "momentum": 0.9}  # a value of table 4's grid, no decay
    assert (data["image_size"], data["batch_size"], recipe["trainer"]["max_steps"]) == (384, 512, 20_000)
    assert stage["init_from"] == "runs/vit_b16_imagenet1k"


def test_recipes_use_all_devices_and_automatic_precision() -> None:
    for path in RECIPES.glob("*.yaml"):
        trainer = read(Path(path).stem)["trainer"]
        assert trainer["devices"] == trainer["accelerator"] == trainer["strategy"] == "auto"
        assert "precision" not in trainer
