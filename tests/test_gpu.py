"""On an NVIDIA GPU: a killed run continues bit for bit, the numbers are the CPU's, and no step waits."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import watched
from conftest import REPOSITORY, SMALL
from test_resume import COMMAND, assert_same, left

import vitlit

pytestmark = pytest.mark.skipif(not Path("/dev/nvidia0").exists(), reason="there is no NVIDIA GPU")

GPU = ("--trainer.accelerator", "gpu", "--trainer.devices", 1)
# Heads of 64, and enough of them that the GPU's own kernels for attention and matrix products are what runs.
WIDE = ("--model.vit.width", 128, "--model.vit.heads", 2, "--model.vit.mlp_dim", 512)


def begin(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """`vitlit ARGUMENTS` in a process group of its own: a process that is forked could not use the GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return subprocess.Popen(
        [sys.executable, "-m", "vitlit", *map(str, arguments)],
        cwd=folder,
        env=environment | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), environment.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(folder: Path, *arguments: object) -> str:
    process = begin(folder, *arguments)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def rows(folder: Path) -> list[dict[str, str]]:
    file = folder / "runs" / "pretrain" / "metrics.csv"
    return list(csv.DictReader(file.open())) if file.exists() else []


def losses(folder: Path) -> list[float]:
    return [float(row["train/loss"]) for row in rows(folder) if row["train/loss"]]


@pytest.mark.parametrize(
    ("precision", "mode"),
    [("32-true", "false"), ("bf16-mixed", "false"), ("16-mixed", "false"), ("bf16-mixed", "reduce-overhead")],
)
def test_a_killed_run_ends_as_the_undisturbed_one(precision: str, mode: str, few: Path, tmp_path: Path) -> None:
    command = (*COMMAND, *GPU, *WIDE, "--data.root", few, "--trainer.precision", precision, "--model.compile", mode)
    command += ("--trainer.deterministic", "true", "--trainer.max_epochs", 4)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    undisturbed = begin(whole, *command)

    draw = random.Random(0)
    for kill in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        process = begin(killed, *command, "--data.num_workers", 2)
        known = len(rows(killed))
        while process.poll() is None and len(rows(killed)) <= known:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        os.killpg(process.pid, kill)
        output, _ = process.communicate()
        assert process.returncode == (-kill if kill == signal.SIGKILL else 143), output
    finish(killed, *command, "--data.num_workers", 2)
    output, _ = undisturbed.communicate()
    assert undisturbed.returncode == 0, output
    assert_same(left(killed), left(whole))


def test_losses_are_those_of_the_cpu(few: Path, tmp_path: Path) -> None:
    mixing = ("--data.mixing.mixup", 0.8, "--data.mixing.cutmix", 1.0)
    erasing = ("--data.erasing.prob", 0.5, "--data.erasing.fill", "mean")  # noise would be the device's
    command = ("fit", *SMALL, *WIDE, *mixing, *erasing, "--data.root", few, "--trainer.precision", "32-true")
    # A bias of the keys has no gradient: with a small eps Adam would blow its rounding errors up.
    command += ("--trainer.max_steps", 10, "--model.optimizer.init_args.eps", 1e-4)
    for name, device in (("cpu", ("--trainer.accelerator", "cpu")), ("gpu", GPU)):
        (tmp_path / name).mkdir()
        finish(tmp_path / name, *command, *device)
    found = losses(tmp_path / "gpu")
    assert len(found) == 10
    assert found == pytest.approx(losses(tmp_path / "cpu"), rel=1e-4)


def test_compiled_losses_are_those_of_an_uncompiled_run(few: Path, tmp_path: Path) -> None:
    command = ("fit", *SMALL, *WIDE, *GPU, "--data.root", few, "--trainer.precision", "32-true")
    command += ("--trainer.max_steps", 12, "--model.optimizer.init_args.eps", 1e-4)
    found = {}
    for mode in ("false", "default", "reduce-overhead", "max-autotune"):
        (tmp_path / mode).mkdir()
        finish(tmp_path / mode, *command, "--model.compile", mode, "--trainer.callbacks", "[vitlit.callbacks.EMA]")
        found[mode] = losses(tmp_path / mode)
        found[mode] += [float(row["val/loss"]) for row in rows(tmp_path / mode) if row["val/loss"]]
    for mode, values in found.items():
        assert values == pytest.approx(found["false"], rel=1e-4), mode


def test_a_sharded_run_is_one_file_that_a_cpu_evaluates(few: Path, tmp_path: Path) -> None:
    command = ("fit", *SMALL, *WIDE, *GPU, "--data.root", few, "--trainer.precision", "32-true")
    for name in ("auto", "fsdp2"):
        (tmp_path / name).mkdir()
        finish(tmp_path / name, *command, "--trainer.strategy", name)
    assert losses(tmp_path / "fsdp2") == pytest.approx(losses(tmp_path / "auto"), rel=1e-5)
    vit = vitlit.load(tmp_path / "fsdp2" / "runs" / "pretrain")
    assert vit.preprocess is not None
    files = sorted((few / "val").glob("*/*"))
    with torch.inference_mode():
        guesses = [vit.classes[guess] for guess in vit(vit.preprocess(files)).argmax(-1)]
    top1 = sum(guess == file.parent.name for guess, file in zip(guesses, files, strict=True)) / len(files)
    best = max(float(row["val/top1"]) for row in rows(tmp_path / "fsdp2") if row["val/top1"])
    assert top1 == pytest.approx(best)


@pytest.mark.parametrize("recipe", watched.RECIPES)
def test_no_step_between_logs_waits_for_the_gpu(recipe: str, few: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    command = [sys.executable, watched.__file__, recipe, str(few), str(tmp_path)]
    subprocess.run(command, env=environment, check=True)


# The batches of two epochs under a Trainer, to a file.
BATCHES = """
import sys, torch
from test_loaders import Recorder, folder_data, trainer
from vitlit.data import workers
from vitlit.data.dataset import ImagesOnDevice
from vitlit.data.erasing import Erasing
from vitlit.data.mixing import Mixing

root, out, device, cache, stream = sys.argv[1:]
if stream == "none":
    workers.ahead = lambda batches, device: batches
original = ImagesOnDevice.__getitems__
def unwaiting(self, items):
    torch.cuda.set_sync_debug_mode("error")
    batch = original(self, items)
    torch.cuda.set_sync_debug_mode("default")
    return batch
if device == "gpu":
    ImagesOnDevice.__getitems__ = unwaiting
module = Recorder()
data = folder_data(root, cache=cache, num_workers=1, mixing=Mixing(0.8, 1.0), erasing=Erasing(0.5, fill="mean"))
trainer(accelerator=device, devices=1).fit(module, data)
batches = [*module.train_batches, *module.val_batches]
assert all(part.device.type == module.number.device.type for batch in batches for part in (*batch.views, batch.labels))
torch.save([[*(view.cpu() for view in b.views), b.labels.cpu(), b.indices.cpu()] for b in batches], out)
"""


def batches(root: Path, out: Path, *arguments: str) -> list[list[torch.Tensor]]:
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    paths = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "data")]
    environment["PYTHONPATH"] = os.pathsep.join([*paths, environment.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", BATCHES, root, out, *arguments], env=environment, check=True)
    found: list[list[torch.Tensor]] = torch.load(out)
    return found


@pytest.mark.parametrize("cache", ["none", "memory", "device"])
def test_batches_on_a_stream_of_their_own_are_the_same(cache: str, few: Path, tmp_path: Path) -> None:
    streamed, plain, host = (
        batches(few, tmp_path / f"{number}.pt", *arguments)
        for number, arguments in enumerate((("gpu", cache, "own"), ("gpu", cache, "none"), ("cpu", "none", "none")))
    )
    for ours, same, theirs in zip(streamed, plain, host, strict=True):
        assert all(map(torch.equal, ours, same))
        assert all(one.shape == other.shape for one, other in zip(ours, theirs, strict=True))
        assert (ours[0] - theirs[0]).abs().max() < (1.01 * 2 / 255 if cache == "device" else 1e-5)
        assert torch.equal(ours[-1], theirs[-1])
