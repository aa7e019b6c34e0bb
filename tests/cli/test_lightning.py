"""Every callback, logger and profiler of Lightning that a config can name works, or is refused in a line."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, Result, refused, user_error
from lightning.pytorch import Trainer, callbacks, loggers, profilers
from small_stage import data, pretrain

FIT = ("fit", *SMALL, "--trainer.max_steps", "3")
OWN = {"config.yaml", "metrics.csv", "best.ckpt", "last.ckpt", "previous.ckpt"}

WORKS = dict[str, Any]
# Callbacks with the arguments that they need, and what is printed or the file that is left; None is refused.
CALLBACKS: dict[str, tuple[str, str] | str | None] = {
    "BackboneFinetuning": "use model.freeze",
    "BaseFinetuning": "is a base class",
    "BasePredictionWriter": "is a base class",
    "BatchSizeFinder": "give data.batch_size",
    "Callback": "is a base class",
    "Checkpoint": "is a base class",
    "DeviceStatsMonitor": ("", "metrics.csv:DeviceStatsMonitor.on_train_batch_start/cpu_percent"),
    "EMAWeightAveraging": ("decay: 0.5", "is complete"),
    "EarlyStopping": ("monitor: val/top1, verbose: true", "Metric val/top1 improved"),
    "GradientAccumulationScheduler": "give data.batch_size",
    "LambdaCallback": "without a function does nothing",
    "LearningRateFinder": "give the optimizer's lr",
    "LearningRateMonitor": ("", "metrics.csv:lr-AdamW"),
    "ModelCheckpoint": ("monitor: val/top1, filename: '{epoch}-{val/top1:.2f}'", "kept/epoch=0-val_top1="),
    "ModelPruning": "use torch.nn.utils.prune",
    "ModelSummary": ("max_depth: 2", "Trainable params"),
    "OnExceptionCheckpoint": "leave it out",
    "ProgressBar": "is a base class",
    "RichModelSummary": ("", "Trainable params"),
    "RichProgressBar": ("", "Epoch 1/"),
    "SpikeDetection": ("", "is complete"),
    "StochasticWeightAveraging": "use vitlit.callbacks.EMA",
    "TQDMProgressBar": ("", "Epoch 0"),
    "ThroughputMonitor": "images_per_second",
    "Timer": ("", "is complete"),
    "WeightAveraging": ("", "is complete"),
}
NEEDED = {
    "GradientAccumulationScheduler": "scheduling: {1: 2}",
    "ModelPruning": "pruning_fn: l1_unstructured",
    "OnExceptionCheckpoint": "dirpath: x",
    "StochasticWeightAveraging": "swa_lrs: 0.01",
}
LOGGERS: dict[str, tuple[str, str] | str | None] = {
    "CSVLogger": "metrics.csv is written in any case",
    "CometLogger": "pip install",
    "LitLogger": "litlogger",
    "Logger": "a base class",
    "MLFlowLogger": "pip install",
    "TensorBoardLogger": ("", "tensorboard/events"),
    "WandbLogger": ("offline: true", "wandb/offline-run"),
}
PROFILERS: dict[str, tuple[str, str] | str | None] = {
    "AdvancedProfiler": ("", "Profile stats for"),
    "PassThroughProfiler": ("", "is complete"),
    "Profiler": "one of",
    "PyTorchProfiler": ("", "Self CPU"),
    "SimpleProfiler": ("", "FIT Profiler Report"),
    "XLAProfiler": "use simple or pytorch",
    "simple": ("", "FIT Profiler Report"),
}


def named(module: Any, base: type) -> set[str]:
    return {name for name in module.__all__ if isinstance(getattr(module, name), type)}


def test_the_sweep_is_over_all_of_lightnings() -> None:
    assert set(CALLBACKS) == named(callbacks, callbacks.Callback)
    assert set(LOGGERS) == named(loggers, loggers.Logger) | {
        "CometLogger",
        "MLFlowLogger",
        "TensorBoardLogger",
        "LitLogger",
    }
    assert set(PROFILERS) == named(profilers, profilers.Profiler) | {"simple"}


def check(result: Result, expected: tuple[str, str] | str | None, run: Path) -> None:
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
    if name == "TensorBoardLogger":
        pytest.importorskip("tensorboard")
    check(vitlit(*FIT, "--data.root", few, "--trainer.logger", name), LOGGERS[name], run)


@pytest.mark.parametrize("name", PROFILERS)
def test_profiler(name: str, vitlit: Callable[..., Result], few: Path, run: Path) -> None:
    check(vitlit(*FIT, "--data.root", few, "--trainer.profiler", name), PROFILERS[name], run)


# In Python, with Lightning's own Trainer: arguments; what is refused there too has no other.
PYTHON: dict[str, dict[str, Any]] = {
    "EarlyStopping": {"monitor": "val/top1", "mode": "max"},
    "GradientAccumulationScheduler": {"scheduling": {1: 2}},
    "ModelCheckpoint": {"monitor": "val/top1", "mode": "max"},
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
    run = partial(Trainer, default_root_dir=tmp_path, max_epochs=1, logger=loggers.CSVLogger(tmp_path))
    quiet = {"enable_model_summary": False, "log_every_n_steps": 1, "accelerator": "cpu"}
    trainer = run(callbacks=[callback], enable_progress_bar=isinstance(callback, callbacks.ProgressBar), **quiet)
    if isinstance(expected, tuple) or name in ONLY_CLI:
        trainer.fit(pretrain(), data(few))
        assert trainer.global_step == 5
    else:
        user_error(expected, trainer.fit, pretrain(), data(few))
