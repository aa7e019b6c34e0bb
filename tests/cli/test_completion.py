"""What a config leaves out follows from the data and the weights, and what contradicts them is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SMALL, Result, command, done, refused
from test_arguments import shipped
from test_predict import measured

from vitlit import load

Command = Callable[..., Result]
FINETUNE = "fit --config finetune --data.batch_size 16 --data.num_workers 0 --data.image_size 24 --trainer.max_steps 2"
FINETUNE += " --model.schedule.warmup 1 --trainer.logger false --data.root"


def test_what_a_flag_switches_off_may_keep_the_configs_settings(vitlit: Command, few: Path, tmp_path: Path) -> None:
    config = shipped(tmp_path, "  batch_size: 32", "  erasing: {prob: 0.5, fill: mean}\n  batch_size: 32")
    done(vitlit("fit", "--config", config, *SMALL[2:], "--data.root", few, "--data.erasing.prob", 0))


def test_images_that_are_enlarged_much_are_told(vitlit: Command, few: Path) -> None:
    flags = ("--data.root", few, "--trainer.max_steps", 1, "--model.schedule.warmup", 0, "--run.report", "false")
    assert "enlarged" not in done(vitlit("fit", *SMALL, *flags, "--data.image_size", 32, "--run.name", "a"))
    said = done(vitlit("fit", *SMALL, *flags, "--data.image_size", "[64,48]", "--run.name", "b"))
    assert "vitlit: warning: training images are enlarged from 8 pixels to data.image_size 48" in said


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
    more = "more trainer.max_epochs or max_steps"
    refused(vitlit(*command), f"{LAST} is at step 6, training ends at 6; give {more}")
    refused(vitlit(*command, "--trainer.max_epochs", 2), f"{LAST} is at step 6, training ends at 4")
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


@pytest.mark.parametrize(
    ("name", "lr", "batch"),
    [("pretrain", 0.001, 32), ("recipes/deit3_s16 --model.vit.preset Ti/16", 0.004, 2048)],
)
@pytest.mark.parametrize("answer", ["", "--model.optimizer.init_args.lr 2e-3", "--model.schedule.lr_per 32"])
def test_a_learning_rate_for_another_batch_is_warned_of(
    name: str, lr: float, batch: int, answer: str, vitlit: Command, few: Path
) -> None:
    flags = "--data.batch_size 8 --data.micro_batch 8 --trainer.accelerator cpu --model.schedule.warmup 1"
    flags += ' --trainer.logger false --model.groups.lr {"nothing":2}'
    result = vitlit("fit", "--config", *name.split(), "--data.root", few, *flags.split(), *answer.split())
    assert "nothing" in result.err  # is refused when the optimizer is made
    doubt = f"vitlit: warning: data.batch_size is 8, but the config's learning rate {lr} is for {batch}; "
    assert (doubt in result.out) == (not answer)


def test_adapters_under_layer_decay_are_warned_of(vitlit: Command, few: Path, work: Path) -> None:
    command = (*FINETUNE.split(), few, "--model.init_from", "runs/pretrain", "--model.lora.rank", 2)
    doubt = "layer decay hardly trains LoRA's first adapters; give --model.groups.layer_decay 1"
    assert f"vitlit: warning: {doubt}" in done(vitlit(*command, "--model.groups.layer_decay", 0.5))
    assert "layer_decay" not in done(vitlit(*command, "--run.name", "b"))


def test_two_ways_of_balancing_are_warned_of(vitlit: Command, few: Path) -> None:
    both = "--data.balanced true --model.objective.init_args.class_weights balanced"
    said = done(vitlit("fit", *SMALL, "--data.root", few, *both.split()))
    assert "data.balanced and class_weights both favour rare classes; give one" in said


@pytest.fixture(scope="module")
def tuned(few: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which runs/finetune is complete. What is refused in it leaves it as it is."""
    folder = tmp_path_factory.mktemp("tuned")
    shutil.copytree(trained / "runs", folder / "runs")
    done(command(*FINETUNE.split(), few, cwd=folder))
    return folder


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
    flags: str, words: str, few: Path, tuned: Path
) -> None:
    last = "runs/finetune/checkpoints/last.ckpt"
    longer = "--trainer.max_steps 4 --run.name other --ckpt_path"
    result = command(*FINETUNE.split(), few, *longer.split(), last, *flags.split(), cwd=tuned)
    refused(result, words, "was trained with", "would win")


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
    refused(vitlit("fit", *SMALL, "--data.root", few, *other), "averages weights (EMA), this one does not")


def test_a_preset_may_be_given_beside_weights_of_the_same_sizes(vitlit: Callable[..., Result], few: Path) -> None:
    sizes = [word for word in SMALL if not word.startswith("--model.vit.") and word not in ("16", "2", "32")]
    pretrain = [*sizes[:2], "--model.vit.preset", "Ti/8", "--data.image_size", 16, "--data.batch_size", 16]
    short = [
        "--trainer.logger",
        "false",
        "--run.report",
        "false",
        "--trainer.max_steps",
        2,
        "--model.schedule.warmup",
        1,
        "--data.root",
        few,
    ]
    done(vitlit("fit", *pretrain, *short, "--data.num_workers", 0, "--run.name", "first"))
    finetune = ["fit", "--config", "finetune", "--model.init_from", "runs/first", "--data.image_size", 16, *short]
    finetune += ["--data.batch_size", 16, "--data.num_workers", 0, "--run.name", "second", "--model.vit.preset"]
    done(vitlit(*finetune, "Ti/8"))
    finetune[finetune.index("second")] = "third"
    refused(vitlit(*finetune, "Ti/4"), "model.vit.patch_size is 4", "made with 8")
