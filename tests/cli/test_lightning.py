"""Every callback, logger and profiler of Lightning that a config can name works, or is refused in a line."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Result, done, refused, user_error
from lightning.pytorch import callbacks, loggers, profilers
from lightning.pytorch.callbacks import ModelCheckpoint
from small_stage import data, pretrain, trainer

from vitlit.run.callbacks import check_callbacks

FIT = ("fit", *SMALL, "--trainer.max_steps", "3")
OWN = {"config.yaml", "metrics.csv", "best.ckpt", "last.ckpt", "previous.ckpt"}

# The arguments of each, and what it prints or the file that it leaves; words alone are those of its refusal.
CALLBACKS: dict[str, tuple[str, str] | str] = {
    "BackboneFinetuning": "use model.freeze",
    "BatchSizeFinder": "give data.batch_size",
    "DeviceStatsMonitor": ("", "metrics.csv:DeviceStatsMonitor.on_train_batch_start/cpu_percent"),
    "EMAWeightAveraging": ("decay: 0.5", "is complete"),
    "EarlyStopping": ("monitor: val/top1, verbose: true", "Metric val/top1 improved"),
    "GradientAccumulationScheduler": "give data.batch_size",
    "LearningRateFinder": "give the optimizer's lr",
    "LearningRateMonitor": ("", "metrics.csv:lr-AdamW"),
    "ModelCheckpoint": ("monitor: val/top1, filename: '{epoch}-{val/top1:.2f}'", "kept/epoch=0-val_top1="),
    "ModelPruning": "use torch.nn.utils.prune",
    "ModelSummary": ("max_depth: 2", "Trainable params"),
    "OnExceptionCheckpoint": "leave it out",
    "RichModelSummary": ("", "Trainable params"),
    "RichProgressBar": ("", "Epoch 1/"),
    "SpikeDetection": ("", "is complete"),
    "StochasticWeightAveraging": "use vitlit.callbacks.EMA",
    "TQDMProgressBar": ("", "Epoch 0"),
    "ThroughputMonitor": "required: batch_size_fn",
    "Timer": ("", "is complete"),
    "WeightAveraging": ("", "is complete"),
}
BASES = {"BaseFinetuning", "BasePredictionWriter", "Callback", "Checkpoint", "LambdaCallback", "Logger", "ProgressBar"}
NEEDED = {
    "GradientAccumulationScheduler": "scheduling: {1: 2}",
    "ModelPruning": "pruning_fn: l1_unstructured",
    "OnExceptionCheckpoint": "dirpath: x",
    "StochasticWeightAveraging": "swa_lrs: 0.01",
}
LOGGERS: dict[str, tuple[str, str] | str] = {
    "CSVLogger": "required: save_dir",
    "CometLogger": "pip install",
    "LitLogger": "not LitLogger",
    "MLFlowLogger": "pip install",
    "TensorBoardLogger": ("", "tensorboard/events"),
    "WandbLogger": ("offline: true", "wandb/offline-run"),
}
PROFILERS: dict[str, tuple[str, str] | str] = {
    "AdvancedProfiler": ("", "Profile stats for"),
    "PassThroughProfiler": ("", "is complete"),
    "Profiler": "one of",
    "PyTorchProfiler": ("", "Self CPU"),
    "SimpleProfiler": ("", "FIT Profiler Report"),
    "simple": ("", "FIT Profiler Report"),
}


def named(module: Any) -> set[str]:
    return {name for name in module.__all__ if isinstance(getattr(module, name), type)}


def test_the_sweep_is_over_all_of_lightnings() -> None:
    assert set(CALLBACKS) == named(callbacks) - BASES
    # Some are listed only where their package is installed.
    assert set(LOGGERS) == named(loggers) - BASES | {"CometLogger", "MLFlowLogger", "TensorBoardLogger", "LitLogger"}
    assert set(PROFILERS) == named(profilers) - {"XLAProfiler"} | {"simple"}  # it is for TPUs


def check(result: Result, expected: tuple[str, str] | str, run: Path) -> None:
    """It is refused with these words, or it worked and printed, logged or left this."""
    if not isinstance(expected, tuple):
        refused(result, expected)
        return
    assert result.code == 0, result.err
    assert "Traceback" not in result.err
    out = result.out + "".join(f"{path.relative_to(run)}\n" for path in run.rglob("*"))
    out += "metrics.csv:" + (run / "metrics.csv").read_text().replace(",", "\nmetrics.csv:")
    assert expected[1] in out


@pytest.mark.parametrize("name", CALLBACKS)
def test_callback(name: str, vitlit: Callable[..., Result], few: Path, run: Path) -> None:
    expected = CALLBACKS[name]
    arguments = expected[0] if isinstance(expected, tuple) else NEEDED.get(name, "")
    given = f"[{{class_path: {name}, init_args: {{{arguments}}}}}]"
    check(vitlit(*FIT, "--data.root", few, "--trainer.callbacks", given), expected, run)


@pytest.mark.parametrize("name", LOGGERS)
def test_logger(name: str, vitlit: Callable[..., Result], few: Path, run: Path) -> None:
    check(vitlit(*FIT, "--data.root", few, "--trainer.logger", name), LOGGERS[name], run)


@pytest.mark.parametrize("name", PROFILERS)
def test_profiler(name: str, vitlit: Callable[..., Result], few: Path, run: Path) -> None:
    check(vitlit(*FIT, "--data.root", few, "--trainer.profiler", name), PROFILERS[name], run)


# In Python, with Lightning's own Trainer: arguments; what is refused there too has no other.
PYTHON: dict[str, dict[str, Any]] = {
    "EarlyStopping": {"monitor": "val/top1", "mode": "max"},
    "GradientAccumulationScheduler": {"scheduling": {1: 2}},
    "ModelPruning": {"pruning_fn": "l1_unstructured"},
    "OnExceptionCheckpoint": {"dirpath": "x"},
    "StochasticWeightAveraging": {"swa_lrs": 0.01},
    "ThroughputMonitor": {"batch_size_fn": lambda batch: len(batch.labels), "window_size": 3},
}
ONLY_CLI = {"OnExceptionCheckpoint", "StochasticWeightAveraging", "ThroughputMonitor"}


@pytest.mark.filterwarnings("ignore")  # Lightning's own
@pytest.mark.parametrize("name", CALLBACKS)
def test_callback_in_python(name: str, few: Path, tmp_path: Path) -> None:
    expected = CALLBACKS[name]
    callback = getattr(callbacks, name)(**PYTHON.get(name, {}))
    bar = isinstance(callback, callbacks.ProgressBar)
    shown: dict[str, Any] = {"enable_progress_bar": bar, "enable_checkpointing": True}
    runner = trainer(callbacks=[callback], logger=loggers.CSVLogger(tmp_path), **shown)
    if isinstance(expected, tuple) or name in ONLY_CLI:
        runner.fit(pretrain(), data(few))
        assert runner.global_step == 5
    else:
        user_error(expected, runner.fit, pretrain(), data(few))


def stop(monitor: str, **more: str) -> list[str]:
    words = ", ".join(f"{name}: {value}" for name, value in {"monitor": monitor, **more}.items())
    return ["--trainer.callbacks", f"[{{class_path: EarlyStopping, init_args: {{{words}}}}}]"]


def test_the_mode_follows_from_the_metric_and_a_contradiction_is_refused(
    vitlit: Callable[..., Result], few: Path, run: Path
) -> None:
    out = done(vitlit("fit", *SMALL, "--data.root", few, *stop("val/top1", patience="1"), "--trainer.max_steps", 40))
    assert "mode: max" in (run / "config.yaml").read_text()
    values = [float(row.split(",")[column]) for row, column in top1(run)]
    epoch = len(values)
    assert values[-1] <= max(values[:-1])  # it rose, or there was no end
    assert all(values[i] > max(values[:i]) for i in range(1, epoch - 1))
    assert re.search(rf"ended +early, in epoch {epoch}: .*val/top1 did not improve", out)
    another = ("fit", *SMALL, "--data.root", few, "--run.name", "another")
    refused(vitlit(*another, *stop("val/top1", mode="min")), "mode for val/top1 is min; give mode max")
    refused(vitlit(*another, *stop("train/loss", mode="max")), "mode for train/loss is max; give mode min")
    keep = ModelCheckpoint(monitor="val/top1_macro_raw")
    user_error("give mode max", trainer(callbacks=[keep], enable_checkpointing=True).fit, pretrain(), data(few))


def top1(run: Path) -> list[tuple[str, int]]:
    """The rows of metrics.csv that validation wrote, each with the column of its accuracy."""
    head, *rows = (run / "metrics.csv").read_text().splitlines()
    column = head.split(",").index("val/top1")
    return [(row, column) for row in rows if row.split(",")[column]]


def test_a_model_checkpoint_leaves_the_runs_own_alone(vitlit: Callable[..., Result], few: Path, run: Path) -> None:
    arguments = "save_last: true, save_weights_only: true, every_n_train_steps: 1"
    keep = f"[{{class_path: ModelCheckpoint, init_args: {{{arguments}}}}}]"
    done(vitlit(*FIT, "--data.root", few, "--trainer.callbacks", keep))
    assert {path.name for path in (run / "checkpoints").iterdir()} <= OWN
    assert (run / "kept" / "last.ckpt").is_file()
    assert "optimizer_states" in torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    more = ("fit", *SMALL, "--data.root", few, "--trainer.max_steps", "5", "--trainer.callbacks")
    assert "complete" in done(vitlit(*more, keep))
    into = keep.replace("save_last", "dirpath: runs/pretrain/checkpoints, save_last")
    refused(vitlit(*more, into, "--run.overwrite", "true"), "is for best.ckpt and last.ckpt; give another")


@pytest.mark.parametrize(
    ("filename", "insert", "name"),
    [
        ("{epoch}-{val/top1:.2f}", True, "epoch=1-val_top1=0.50"),
        ("e{epoch:02d}/{val/top1:.2f}", False, "e01_0.50"),
    ],
)
def test_a_slash_in_a_filename_makes_no_folder(filename: str, insert: bool, name: str) -> None:
    keep = ModelCheckpoint(filename=filename, auto_insert_metric_name=insert)
    for _ in range(2):  # a second fit checks again
        check_callbacks([keep])
    assert keep.format_checkpoint_name({"epoch": torch.tensor(1), "val/top1": torch.tensor(0.5)}) == f"{name}.ckpt"


def test_a_timer_and_a_spike_end_in_a_line(vitlit: Callable[..., Result], few: Path) -> None:
    timer = "[{class_path: Timer, init_args: {duration: '00:00:00:01'}}]"
    refused(vitlit(*FIT, "--data.root", few, "--trainer.callbacks", timer), "use run.time_limit")
    spike = "[{class_path: SpikeDetection, init_args: {rtol: 0, mode: max}}]"
    refused(vitlit("fit", *SMALL, "--data.root", few, "--trainer.callbacks", spike), "Training spike detected")


def test_options_of_a_logger_without_its_name_are_the_default_ones(
    vitlit: Callable[..., Result], few: Path, run: Path
) -> None:
    at = SMALL.index("--trainer.logger")
    without = [*SMALL[:at], *SMALL[at + 2 :]]
    project = ("--trainer.logger.project", "mine", "--trainer.logger.mode", "disabled")
    out = done(vitlit("fit", *without, "--data.root", few, "--trainer.logger", "true", *project))
    assert "W&B: disabled" in out
    assert "project: mine" in (run / "config.yaml").read_text()


def test_best_and_last_are_the_runs_own(vitlit: Callable[..., Result], finished: Path) -> None:
    for which in ("best", "last"):
        out = done(vitlit("validate", "runs/pretrain", "--ckpt_path", which))
        assert f"checkpoints/{which}.ckpt (step" in out
    refused(vitlit("validate", "runs/pretrain", "--ckpt_path", "bets"), "checkpoint bets does not exist")
    given = "runs/pretrain/checkpoints/best.ckpt"
    refused(vitlit("validate", given), "give runs/pretrain --ckpt_path best")


def test_what_was_asked_for_is_shown_and_nothing_else(vitlit: Callable[..., Result], few: Path) -> None:
    out = done(vitlit(*FIT, "--data.root", few, "--trainer.enable_model_summary", "true"))
    assert "Trainable params" in out
    assert "Tip:" not in out
    assert re.search(r"^epoch 2  step 3 of 3  loss \d", out, re.MULTILINE)
    assert not re.search(r"step .* $", out, re.MULTILINE)
