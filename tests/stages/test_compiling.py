"""A compiled training: the numbers and names of one that is not, from one graph of training and one of evaluation."""

import csv
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from shutil import which
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from conftest import REPOSITORY, SMALL, Result, done, launched, refused, user_error
from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from small_stage import TINY, Memory, data, distance, finetune, fit, state_of, trainer
from test_recipes import RECIPES, parser, shrunken, small_weights, tiny

import vitlit.cli.completion
from vitlit.callbacks import EMA
from vitlit.data.mixing import Mixing, soft_targets
from vitlit.images.preprocess import Preprocess
from vitlit.model import ViT
from vitlit.model.lora import LoRA
from vitlit.objectives import MAE, Batch, Regression, Step, Supervised
from vitlit.run.fsdp import FSDP2
from vitlit.stages import Pretrain, Stage
from vitlit.stages.compiling import worthwhile
from vitlit.weights import Weights
from vitlit.weights.weights import IMAGENET

# torch hides this warning by itself, unless it is an error.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
COMPILE = torch.compile


GRAPHS = {"default": 2, "reduce-overhead": 1}  # the last block computes the class token alone


class Graphs:
    """Makes torch.compile trace whole graphs, which it counts and runs as they are: inductor takes its time."""

    def __init__(self) -> None:
        self.count = 0

    def compile(self, function: Any, dynamic: bool, options: dict[str, Any]) -> Any:
        return COMPILE(function, fullgraph=True, dynamic=dynamic, backend=self)

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


class Scheduled(Supervised):
    """A loss that rises with the progress."""

    def forward(self, vit: ViT, batch: Batch, progress: float) -> Step:
        step = super().forward(vit, batch, progress)
        return step._replace(loss=step.loss * (1 + progress), logs={"rise": step.loss.detach() * progress})


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    made = Graphs()
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", made.compile)
    return made


def compiling(mode: Any, **options: Any) -> Pretrain:
    torch.manual_seed(0)
    scheduled = partial(Scheduled, num_classes=4, head_std=0.1)
    return Pretrain(ViT(**{**TINY, **options}), scheduled, partial(torch.optim.AdamW, lr=1e-3), compile=mode)


def losses(stage: Stage, few: Path, batches: dict[str, Any], **options: Any) -> list[float]:
    """The losses of 20 steps, and of two validations by the average of the weights and by themselves."""
    memory = Memory()
    fit(stage, few, batches, max_steps=20, max_epochs=-1, logger=memory, callbacks=[EMA(0.5)], **options)
    assert len(memory.rows["train/loss"]) == 20
    return [value for name in memory.rows if "loss" in name for _, value in memory.rows[name]]


@pytest.mark.parametrize(("mode", "micro"), [("default", 4), ("reduce-overhead", None)], ids=["blocks", "whole step"])
def test_one_graph_of_training_and_one_of_evaluation(mode: str, micro: int | None, few: Path, graphs: Graphs) -> None:
    """Through micro-batches, changing rates, the smaller last batch of 11 images, and an EMA's copy."""
    plain, compiled = compiling(False), compiling(mode)
    names = list(compiled.state_dict())
    batches = {"batch_size": 8, "micro_batch": micro, "mixing": Mixing(mixup=1.0, cutmix=1.0, prob=0.5)}
    assert losses(compiled, few, batches) == pytest.approx(losses(plain, few, batches), rel=1e-5)
    assert graphs.count == 2 * GRAPHS[mode]
    assert list(compiled.state_dict()) == names
    assert distance(state_of(plain), state_of(compiled)) < 1e-5
    compiled.objective(compiled.vit, Batch.of((torch.randn(5, 3, 16, 16), torch.arange(5) % 4)), 0.0)  # after training
    assert graphs.count == 2 * GRAPHS[mode]


def test_stochastic_depth_that_rises_is_a_graph_a_block(few: Path, graphs: Graphs) -> None:
    stage = compiling("default", depth=10, drop_path=0.1)  # more blocks than torch allows graphs
    fit(stage, few, max_steps=2)
    assert graphs.count == 10 + 2  # in evaluation, blocks do not differ, but for the last


CONFIGS = RECIPES | {name: REPOSITORY / "configs" / f"{name}.yaml" for name in ("pretrain", "finetune")}


def learns(name: str) -> tuple[dict[str, Any], bool]:
    """What of a recipe, made small, a step depends on: the arguments of its stage, and whether labels are mixed."""
    recipe = shrunken(name)
    arguments = {key: recipe["model"]["init_args"][key] for key in recipe["model"]["init_args"] if key not in RATES}
    return recipe["model"] | {"init_args": arguments}, "mixing" in recipe["data"]


RATES = ("optimizer", "schedule", "groups")
with pytest.MonkeyPatch.context() as patched:
    patched.setattr("test_recipes.RECIPES", CONFIGS)
    # Those that differ in more than numbers.
    DISTINCT = {re.sub(r"-?[\d.]+(e-?\d+)?", "", str([learns(name), small_weights(name)])): name for name in CONFIGS}


@pytest.mark.parametrize("name", sorted(DISTINCT.values()))
def test_a_recipes_step_has_no_graph_break(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr("test_recipes.RECIPES", CONFIGS)
    model, mixed = learns(name)
    model["init_args"]["optimizer"] = {"class_path": "torch.optim.AdamW"}
    given = {"model": model, "data": {"root": "few", "image_size": 16}, "seed_everything": 0}
    config = parser().parse_object(given)
    options, classes = small_weights(name), list("0123")
    weights = None
    if options is not None:
        plain = ViT(image_size=16, **options).config.plain()
        weights = Weights(Path("file"), "test", {}, plain, [], {**IMAGENET, "crop_ratio": 0.875})
    config.ckpt_path = None
    splits: Any = SimpleNamespace(scan=lambda: None, classes=classes, multi_label=False)
    vitlit.cli.completion.fill_size(config, given)
    vitlit.cli.completion.fill_config(config, weights, splits)
    stage: Stage = parser().instantiate_classes(Namespace(model=config.model, data=config.data)).model
    if stage.objective.teacher:
        stage.objective.set_teacher(ViT(image_size=16, num_classes=4, **tiny("deit_b16")))
        stage.objective.prepare(SimpleNamespace(classes=classes))
    stage.vit.preprocess = Preprocess((16, 16))
    labels, views = torch.arange(4), [torch.randn(4, 3, 16, 16) for _ in range(stage.objective.views)]
    batch = Batch.of([views[0], soft_targets(labels, 4) if mixed else labels])._replace(views=views)
    traced = COMPILE(stage.train().objective, fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        loss = traced(stage.vit, batch, torch.zeros(())).loss
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize(
    "stage",
    [
        lambda: finetune(
            lora=LoRA(rank=2), vit=ViT(**TINY, registers=2, position="rope", class_token=False, pool="map")
        ),
        lambda: finetune(
            last_blocks=1, vit=ViT(**TINY, norm_kind="rmsnorm", mlp="swiglu", activation_checkpointing=True)
        ),
        lambda: Pretrain(
            ViT(**TINY), partial(MAE, decoder_width=16, decoder_depth=1, decoder_heads=2), torch.optim.SGD
        ),
        lambda: Pretrain(ViT(**TINY), Regression, torch.optim.SGD),
    ],
    ids=["adapters", "frozen blocks", "masks", "numbers"],
)
def test_a_step_of_no_recipe_has_no_graph_break_either(stage: Callable[[], Stage]) -> None:
    torch.compiler.reset()
    made = stage().train()
    labels = torch.arange(4.0) if made.objective.numbers else torch.arange(4)
    traced = COMPILE(made.objective, fullgraph=True, backend="eager")
    traced(made.vit, Batch.of([torch.randn(4, 3, 16, 16), labels]), torch.zeros(())).loss.backward()


class Save(Callback):
    """Saves a checkpoint after step 7."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 7:
            trainer.save_checkpoint(self.path)


class End(NamedTuple):
    weights: dict[str, torch.Tensor]
    losses: list[tuple[int | None, float]]


def ends(few: Path, path: Path, mode: Any, sources: Sequence[Path | None], **options: Any) -> list[End]:
    """What 20 steps lead to, from the beginning or from a checkpoint."""
    found = []
    for source in sources:
        stage, memory = compiling(mode, **options), Memory()
        own = {"callbacks": [Save(path)], "limit_val_batches": 0, "logger": memory}
        runner = trainer(max_steps=20, max_epochs=-1, deterministic=True, **own)
        runner.fit(stage, data(few), ckpt_path=source, weights_only=True)
        found.append(End(state_of(stage), memory.rows["train/loss"]))
    return found


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_continued_training_is_the_undisturbed_one_bit_for_bit(
    mode: str, few: Path, tmp_path: Path, graphs: Graphs
) -> None:
    path = tmp_path / "last.ckpt"
    drops = {"dropout": 0.2, "drop_path": 0.2, "drop_path_decay": "constant"}
    whole, continued = ends(few, path, mode, [None, path], **drops)
    assert distance(whole.weights, continued.weights) == 0
    assert continued.losses == whole.losses[7:]
    assert graphs.count == 2 * GRAPHS[mode]


@pytest.mark.skipif(which(os.environ.get("CXX", "g++")) is None, reason="there is no C++ compiler")
def test_inductors_kernels_compute_the_same(few: Path, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    whole, continued = ends(few, path, "default", [None, path])
    assert distance(whole.weights, continued.weights) == 0
    plain = ends(few, path, False, [None])[0]
    assert [loss for _, loss in whole.losses] == pytest.approx([loss for _, loss in plain.losses], rel=1e-5)
    assert len(plain.losses) == 20
    assert list(whole.weights) == list(plain.weights)


# Of recipes, of a training of 35 s and one of 70, and of what rules CUDA graphs out.
@pytest.mark.parametrize(
    ("preset", "size", "images", "steps", "micro", "devices", "chosen"),
    [
        ("S/16", 224, 256, 112_603, 4, 1, "default"),
        ("B/16", 224, 512, 50_040, 1, 1, "default"),
        ("S/16", 224, 256, 500, 1, 1, False),
        ("S/16", 224, 256, 500, 2, 1, "default"),
        ("Ti/4", 32, 128, 117_100, 1, 1, "reduce-overhead"),
        ("Ti/4", 32, 128, 117_100, 2, 1, "default"),
        ("Ti/4", 32, 128, 117_100, 1, 2, "default"),
        ("Ti/4", 32, 128, 5000, 1, 1, False),
    ],
)
def test_auto_compiles_more_than_a_minute(
    preset: str, size: int, images: int, steps: int, micro: int, devices: int, chosen: Any
) -> None:
    with torch.device("meta"):
        vit = ViT.from_preset(preset, image_size=size)
        batch = Batch.of([torch.empty(images, 3, size, size), torch.empty(images)])
    runner = SimpleNamespace(estimated_stepping_batches=steps, accumulate_grad_batches=micro, world_size=devices)
    runner.strategy = None
    assert worthwhile(runner, vit, batch) == chosen
    runner.strategy = FSDP2()
    assert worthwhile(runner, vit, batch) == (chosen and "default")


def test_auto_compiles_nothing_on_a_cpu(few: Path, graphs: Graphs) -> None:
    fit(compiling("auto"), few, max_steps=1)
    assert graphs.count == 0


def test_what_cannot_be_compiled_is_refused_before_training(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("fast", True):
        words = "auto, false, default, reduce-overhead or max-autotune"
        user_error(f"model.compile is {mode}; give {words}", compiling, mode)
    user_error(
        r"reduce-overhead excludes .* micro-batches; give model.compile default",
        partial(fit, compiling("reduce-overhead"), few, {"micro_batch": 4}),
    )
    monkeypatch.setenv("CXX", "no-compiler")
    user_error(
        r"default: there is no C\+\+ compiler; apt install g\+\+, or give", partial(fit, compiling("default"), few)
    )


def test_a_run_may_continue_with_another_mode(finished: Path, few: Path, vitlit: Callable[..., Result]) -> None:
    again = ("fit", *SMALL, "--data.root", few, "--model.vit.dropout", 0.1)
    assert "is complete at step 6" in done(vitlit(*again, "--model.compile", "false"))
    refused(vitlit(*again, "--model.compile", "true", "--run.name", "new"), "model.compile is True; give auto")
    more = vitlit(*again, "--model.compile", "max-autotune", "--trainer.max_steps", 7, "--data.micro_batch", 8)
    refused(more, "give model.compile default")


def on_devices(devices: int, few: Path, folder: Path, *flags: object) -> list[float]:
    """The losses of a run on so many devices."""
    results = launched(devices, "fit", *SMALL, "--data.root", few, *flags, cwd=folder)
    assert {result.code for result in results} == {0}, results[0].err
    rows = csv.DictReader((folder / "runs" / "pretrain" / "metrics.csv").open())
    return [float(row["train/loss"] or row["val/loss"]) for row in rows]


@pytest.fixture(scope="module")
def alone(few: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return on_devices(1, few, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_devices_compile(strategy: str, few: Path, tmp_path: Path, alone: list[float], graphs: Graphs) -> None:
    flags = ("--trainer.strategy", strategy, "--model.compile", "default")
    assert on_devices(2, few, tmp_path, *flags) == pytest.approx(alone, rel=1e-4)
