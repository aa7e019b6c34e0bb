"""Pictures of what a ViT makes of the same images while it learns."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HEADS, SMALL, Result, done
from lightning.pytorch import Trainer
from PIL import Image
from small_stage import data, trainer
from test_ddp import no_rank_is_left_behind
from test_loggers import recorded
from test_resume import assert_same
from test_without_labels import EACH, OBJECTIVES, made
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from vitlit.callbacks import EMA, Pictures, pictures
from vitlit.model import ViT
from vitlit.objectives import Batch, Objective

__all__ = ["no_rank_is_left_behind"]  # of every test here, too


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Tensor]]]:
    """The titles and rows of all pictures that are drawn."""
    kept: list[tuple[str, dict[str, Tensor]]] = []
    own = pictures.draw

    def draw(title: str, shown: dict[str, Tensor], preprocess: Any) -> Any:
        kept.append((title, shown))
        return own(title, shown, preprocess)

    monkeypatch.setattr(pictures, "draw", draw)
    return kept


@EACH
def test_a_run_with_pictures_is_the_run_without(
    make: Callable[[ViT], Objective], few: Path, tmp_path: Path, drawn: list[tuple[str, dict[str, Tensor]]]
) -> None:
    def fit(*callbacks: Any) -> tuple[Any, ...]:
        stage, of_data = made(make, dropout=0.1, drop_path=0.1)
        runner = trainer(max_epochs=2, callbacks=[EMA(0.7), *callbacks], default_root_dir=tmp_path)
        torch.manual_seed(3)
        runner.fit(stage, data(few, **of_data))
        modes = {name: module.training for name, module in stage.named_modules()}
        timed = ("train/data_wait", "train/images_per_second", "train/memory_gib", "train/mfu")
        metrics = {name: value for name, value in runner.callback_metrics.items() if name not in timed}
        return stage.state_dict(), modes, torch.get_rng_state(), runner.optimizers[0].state_dict(), metrics

    alone = fit()
    assert not list(tmp_path.iterdir())
    for ours, other in zip(fit(Pictures(3)), alone, strict=True):
        assert_same(ours, other)
    assert [path.name for path in tmp_path.iterdir()] == ["pictures.png"]
    assert [title.partition(", ")[2] for title, _ in drawn] == ["epoch 1, step 5", "epoch 2, step 10"]
    first, last = (shown for _, shown in drawn)
    assert torch.equal(first["images"], last["images"])
    own = list(first)[-1]
    assert len(first[own]) == 3
    assert not torch.equal(first[own], last[own])
    if "visible patches" in first:
        assert torch.equal(first["visible patches"], last["visible patches"])


@pytest.mark.parametrize("name", ["mae", "dino"])
def test_the_weights_that_go_on_are_drawn_on_images_spread_over_the_split(
    name: str, few: Path, tmp_path: Path, drawn: list[tuple[str, dict[str, Tensor]]]
) -> None:
    stage, of_data = made(OBJECTIVES[name])
    runner = trainer(max_epochs=2, callbacks=[Pictures(4), EMA(0.7)], default_root_dir=tmp_path)  # in either order
    runner.fit(stage, data(few, **of_data))  # and ends with the average in the stage
    folder = data(few)
    batches = list(folder.val_dataloader())
    images, numbers = (torch.cat(parts) for parts in zip(*((b.views[0], b.indices) for b in batches), strict=True))
    some = torch.tensor([0, 2, 5, 8])
    assert torch.equal(numbers, torch.arange(11))
    assert torch.equal(drawn[-1][1]["images"], images[some])
    with torch.no_grad():
        expected = stage.eval().pictures(Batch([images[some]], some, some, some))
    for row, tensor in expected.items():
        torch.testing.assert_close(drawn[-1][1][row], tensor)
    if name == "dino":
        teacher: Any = stage.objective.teacher_vit
        with torch.no_grad():
            teacher.blocks[-1].attn.qkv.weight.mul_(-3)
        moved = stage.pictures(Batch([images[some]], some, some, some))
        assert not torch.equal(moved["attention of the class token"], expected["attention of the class token"])


def test_two_devices_draw_once(few: Path, tmp_path: Path) -> None:
    stage, of_data = made(OBJECTIVES["lejepa"])
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork", "max_epochs": 2}
    trainer(callbacks=[Pictures(1)], default_root_dir=tmp_path, **options).fit(stage, data(few, **of_data))
    with Image.open(tmp_path / "pictures.png") as sheet:
        assert sheet.width > 0


def test_plain_loaders_and_a_plain_trainer(tmp_path: Path, drawn: list[tuple[str, dict[str, Tensor]]]) -> None:
    stage, _ = made(OBJECTIVES["mae"])
    images = torch.randn(10, 3, 16, 16)
    loader = DataLoader(TensorDataset(images), 5)
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path / "new"}
    Trainer(fast_dev_run=True, callbacks=[Pictures(5)], **quiet).fit(stage, loader, loader)
    assert torch.equal(drawn[0][1]["images"], images[::2])
    assert (tmp_path / "new" / "pictures.png").is_file()


def test_images_are_drawn_in_their_colours_and_maps_from_dark_to_bright(tmp_path: Path) -> None:
    images = torch.zeros(2, 3, 32, 32)
    images[0, 0] = 1  # red
    maps = torch.zeros(2, 4, 4)
    maps[1] = 1
    figure = pictures.draw("a title", {"images": images, "maps": maps}, None)
    figure.savefig(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 20) or []}
    assert {(255, 0, 0), (0, 0, 0), (255, 255, 255)} <= colours
    assert {(68, 1, 84), (253, 231, 36)} <= colours  # both ends of viridis


MAE_RUN = ("fit", *SMALL, "--model.objective", "MAE", *(f"--model.objective.{n}={x}" for n, x in HEADS["MAE"].items()))


def test_a_command_leaves_a_picture_unless_told_not_to(vitlit: Callable[..., Result], few: Path, run: Path) -> None:
    logger = ("--trainer.logger", "vitlit.loggers.Wandb")
    done(vitlit(*MAE_RUN, "--data.root", few, *logger))
    with Image.open(run / "pictures.png") as sheet:
        assert sheet.width > sheet.height
    (logged,) = (run / "wandb").glob("offline-run-*")
    steps = [row["trainer/global_step"] for row in recorded(logged)[0] if any("pictures" in name for name in row)]
    assert steps == [1, 3, 5]
    assert len(list((logged / "files" / "media" / "images").glob("pictures_*.png"))) == 3
    private = (*logger, "--trainer.logger.pictures", "false", "--run.name", "private")
    done(vitlit(*MAE_RUN, "--data.root", few, *private))
    assert (run.parent / "private" / "pictures.png").is_file()
    assert not list((run.parent / "private").glob("wandb/*/files/media/images/*"))
    none = "[{class_path: vitlit.callbacks.Pictures, init_args: {images: 0}}]"
    done(vitlit(*MAE_RUN, "--data.root", few, "--run.name", "none", "--trainer.callbacks", none))
    assert not (run.parent / "none" / "pictures.png").exists()
    done(vitlit("fit", *SMALL, "--data.root", few, "--run.name", "labels"))
    assert not (run.parent / "labels" / "pictures.png").exists()
