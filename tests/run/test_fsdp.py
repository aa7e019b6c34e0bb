"""FSDP2: the numbers and the checkpoints of one device, on two CPU processes."""

import os
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Result
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed import TCPStore
from torch.distributed.tensor import DTensor

from vitlit.callbacks import EMA, Pictures
from vitlit.cli.main import main
from vitlit.cli.trainer import Trainer as OwnTrainer
from vitlit.data import ImageFolderData
from vitlit.data.views import Views
from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.model.lora import LoRA
from vitlit.objectives import DINO, Supervised
from vitlit.optim import LAMB, Groups, Schedule
from vitlit.stages import Finetune, Pretrain, Stage

pytestmark = pytest.mark.usefixtures("undrawn")

STEPS, HALF = 6, 3


def ranks(function: Callable[[], object], world_size: int = 2) -> list[int]:
    """Run a function in forked children as torchrun's agent would start them; their exit codes."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment: dict[str, Any] = {
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "GROUP_RANK": 0,
        "MASTER_PORT": store.port,
    }
    environment |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ.update(
                    {name: str(value) for name, value in {**environment, "RANK": rank, "LOCAL_RANK": rank}.items()}
                )
                code = int(function() or 0)  # type: ignore[call-overload]
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    codes: dict[int, int] = {}
    deadline = time.monotonic() + 120
    while len(codes) < world_size and time.monotonic() < deadline:
        for child in set(children) - set(codes):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for child in set(children) - set(codes):
        os.kill(child, 9)
        codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return [codes[child] for child in children]


class Watch(Callback):
    """Notes each step's loss and how much of the weights this rank holds, and saves a checkpoint half-way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses: dict[int, float] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if "train/loss" in trainer.callback_metrics:
            self.losses[trainer.global_step] = float(trainer.callback_metrics["train/loss"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == HALF and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            trainer.save_checkpoint(self.folder / "half.ckpt")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in pl_module.parameters())
        share = held / sum(p.numel() for p in pl_module.parameters())
        self.on_train_batch_start(trainer, pl_module)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        content = {"losses": self.losses, "share": share, "metrics": metrics}
        torch.save(content, self.folder / f"rank{trainer.global_rank}.pt")


def pretraining(vit: ViT) -> Stage:
    optimizer = partial(torch.optim.AdamW, lr=3e-3, eps=1e-4, weight_decay=0.1)
    groups = Groups(layer_decay=0.7, lr={"blocks.*.attn.*": 0.5})
    return Pretrain(vit, partial(Supervised, num_classes=4), optimizer, Schedule(warmup=1), groups)


def adapting(vit: ViT) -> Stage:
    optimizer = partial(LAMB, lr=1e-2, eps=1e-4, weight_decay=0.1)
    return Finetune(vit=vit, num_classes=4, lora=LoRA(rank=2), optimizer=optimizer, schedule=Schedule(warmup=1))


def distilling(vit: ViT) -> Stage:
    optimizer = partial(torch.optim.AdamW, lr=3e-3, eps=1e-4, weight_decay=0.04)
    dino = partial(DINO, prototypes=16, hidden_dim=16, bottleneck=8, masked=1.0, koleo=0.1, freeze_prototypes=0.3)
    return Pretrain(vit, dino, optimizer, Schedule(warmup=1, weight_decay_end=0.4))


CASES: dict[str, Any] = {
    "groups, accumulated": (pretraining, {}, {"batch_size": 8, "micro_batch": 2}),
    # Evaluated by fives, the 11 images would be two batches on the one rank and one on the other, which hung.
    "LoRA, recomputed": (
        adapting,
        {"activation_checkpointing": True, "position": "sincos2d", "pool": "map"},
        {"batch_size": 10},
    ),
    "a teacher, its average": (distilling, {}, {"batch_size": 8, "views": [Views(1, 16), Views(1, 8)]}),
}


def fit(case: str, root: Path, folder: Path, strategy: str, devices: int, source: Path | None = None) -> None:
    """Train a stage of CASES; `folder` gets half.ckpt, end.ckpt and what Watch notes."""
    make, options, data = CASES[case]
    torch.manual_seed(0 if source is None else 1)
    stage = make(ViT(image_size=16, patch_size=8, width=16, depth=2, heads=2, mlp_dim=32, **options))
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    trainer = OwnTrainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_steps=STEPS,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EMA(0.7), Watch(folder), Pictures()],
        default_root_dir=folder,
    )
    folder.mkdir(exist_ok=True)
    images = ImageFolderData(str(root), image_size=16, num_workers=0, **data)
    trainer.fit(stage, images, ckpt_path=source, weights_only=True)
    trainer.save_checkpoint(folder / "end.ckpt")


def read(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def difference(a: Any, b: Any) -> float:
    """The largest between two states of the same form, whose tensors are plain ones."""
    if isinstance(a, Tensor):
        assert type(b) is Tensor
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        return float((a - b).abs().max())
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max((difference(a[key], b[key]) for key in a), default=0.0)
    if isinstance(a, list):
        return max((difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    assert a == b
    return 0.0


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.long if "teacher" in case else ()) for case in CASES]
)
def test_two_devices_of_fsdp2_are_one_device_and_each_continues_the_other(case: str, few: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    runs: list[tuple[Path, str, int, Path | None]] = [
        (one, "auto", 1, None),
        (two, "fsdp2", 2, None),
        (tmp_path / "one-two", "fsdp2", 2, one / "half.ckpt"),
        (tmp_path / "two-one", "auto", 1, two / "half.ckpt"),
    ]
    for folder, strategy, devices, source in runs:
        codes = ranks(partial(fit, case, few, folder, strategy, devices, source), devices)
        assert codes == [0] * devices
        assert (folder / "pictures.png").is_file()
    expected = read(one / "end.ckpt")
    reference = read(one / "rank0.pt")
    assert list(reference["losses"]) == list(range(1, STEPS + 1))
    assert difference(read(one / "half.ckpt")["state_dict"], expected["state_dict"]) > 1e-3
    for folder, _, devices, source in runs[1:]:
        found = read(folder / "end.ckpt")
        assert found.keys() == expected.keys()
        for part in ("state_dict", "current_model_state", "optimizer_states", *({"adapters"} & expected.keys())):
            assert difference(found[part], expected[part]) < 1e-6
        for rank in range(devices):
            watched = read(folder / f"rank{rank}.pt")
            losses = {step: loss for step, loss in reference["losses"].items() if source is None or step > HALF}
            assert watched["losses"] == pytest.approx(losses, abs=1e-5)
            assert watched["share"] < 0.7 if devices == 2 else watched["share"] == 1
            # Lightning's mean of an objective's logs is over ranks, whose shares of the images differ by one.
            rough = {"val/loss_image", "val/loss_patch"}
            machine = {"train/images_per_second", "train/data_wait", "train/memory_gib"}
            for name in watched["metrics"].keys() - rough - machine:
                assert watched["metrics"][name] == pytest.approx(reference["metrics"][name], abs=1e-5)


def test_a_run_of_two_devices_is_judged_and_continued_on_one(
    vitlit: Callable[..., Result], few: Path, tmp_path: Path
) -> None:
    # Of a gradient of zero, as a bias of the keys has, Adam would make a step of its rounding error.
    fit = ["fit", *SMALL, "--data.root", str(few), "--trainer.accelerator", "cpu", "--model.optimizer.eps", "1e-4"]
    sharded = [*fit, "--run.name", "two", "--trainer.devices", "2", "--trainer.strategy", "fsdp2"]

    def run() -> int:
        os.chdir(tmp_path)
        return main(sharded)

    assert ranks(run) == [0, 0]
    assert vitlit(*fit, "--run.name", "one").code == 0
    for name in ("best.ckpt", "last.ckpt"):
        one, two = (read(tmp_path / "runs" / run / "checkpoints" / name) for run in ("one", "two"))
        assert one.keys() == two.keys()
        assert difference(one["state_dict"], two["state_dict"]) < 1e-6
    judged = [vitlit("validate", f"runs/{run}", "--trainer.devices", 1) for run in ("one", "two")]
    assert [result.code for result in judged] == [0, 0]
    assert [line for line in judged[0].out.splitlines() if "val/" in line]
    assert judged[0].out == judged[1].out.replace("/two/", "/one/")
    assert vitlit("weights", "show", "runs/two").out.replace("two", "one") == vitlit("weights", "show", "runs/one").out
    longer = ["--run.name", "two", "--trainer.max_steps", 8]
    continued = vitlit(*fit, *longer)
    assert continued.code == 0, continued.err
    assert "continuing runs/two from" in continued.out
    assert read(tmp_path / "runs/two/checkpoints/last.ckpt")["global_step"] == 8


def test_an_optimizer_of_whole_weights_is_refused_before_training(
    few: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fit = ["fit", *SMALL, "--data.root", str(few), "--trainer.accelerator", "cpu", "--trainer.devices", "2"]

    def run() -> int:
        os.chdir(tmp_path)
        return main([*fit, "--trainer.strategy", "fsdp2", "--model.optimizer", "vitlit.optim.Muon"])

    assert ranks(run) == [2, 2]
    assert "vitlit: error: Muon needs full weights, which fsdp2 shards; use ddp" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": ModelParallelStrategy()}, "strategy ModelParallelStrategy is not supported; give ddp or fsdp2"),
        (
            {"strategy": FSDPStrategy(), "accelerator": "gpu", "precision": "32-true"},
            "FSDPStrategy is not supported; give ddp or fsdp2",
        ),
        (
            {"strategy": "fsdp2", "callbacks": EMAWeightAveraging()},
            "fsdp2 .* EMAWeightAveraging; use vitlit.callbacks.EMA",
        ),
        ({"strategy": "fsdp2", "accelerator": "gpu", "precision": "16-mixed"}, "fsdp2 .* 16-mixed; use bf16-mixed"),
    ],
)
def test_what_cannot_work_is_refused(
    options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if options.get("accelerator") == "gpu":  # as if there were one
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *args: None)
        monkeypatch.setattr(torch.cuda, "set_device", lambda *args: None)
    with pytest.raises(UserError, match=words):
        OwnTrainer(**{"accelerator": "cpu", "devices": 1, "logger": False, **options})
