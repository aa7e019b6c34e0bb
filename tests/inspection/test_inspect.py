"""`vitlit inspect`, and the figures that it draws."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Result, done, paint, refused
from PIL import Image

import vitlit as package
from vitlit.images.preprocess import Preprocess
from vitlit.inspection import figures
from vitlit.model import ViT

Command = Callable[..., Result]
ALL = {"filters", "positions", "distance", "images", "occlusion", "heads"}


def saved(path: Path, preprocess: Preprocess | None = None, **options: object) -> Path:
    """The file of a tiny ViT."""
    torch.manual_seed(0)
    size = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 2, "heads": 2, "mlp_dim": 32}
    vit = ViT(**{**size, **options})
    vit.preprocess = preprocess or Preprocess((16, 16))
    package.save_weights(vit, path, format="vitlit")
    return path


def test_every_figure_of_a_classifier_is_written(vitlit: Command, tmp_path: Path) -> None:
    file = saved(tmp_path / "a.safetensors", num_classes=3)
    paint(tmp_path / "1.png", tmp_path / "2.png")
    out = done(vitlit("inspect", file, "1.png", "2.png", "--out", "looks"))
    assert "attention of the class token" in out
    assert {path.stem for path in (tmp_path / "looks").glob("*.png")} == ALL
    for name in ALL:
        assert f"looks/{name}.png" in out
        with Image.open(tmp_path / "looks" / f"{name}.png") as picture:
            assert min(picture.size) > 300
            assert picture.convert("L").getextrema() == (0, 255)
    refused(vitlit("inspect", file, "1.png", "--out", "looks"), "looks exists and is not empty")
    photos = tmp_path / "photos"
    photos.mkdir()
    paint(*(photos / f"{number:02}.png" for number in range(20)))
    done(vitlit("inspect", file, photos, "--out", "folder"))
    with Image.open(tmp_path / "folder" / "images.png") as drawn, Image.open(tmp_path / "looks" / "images.png") as two:
        assert two.width < drawn.width  # 7 of 20, evenly
    done(vitlit("inspect", file, photos, "1.png", "--out", "both"))  # the file too, whatever the folder holds
    with Image.open(tmp_path / "both" / "images.png") as both, Image.open(tmp_path / "folder" / "images.png") as drawn:
        assert both.width > drawn.width


def test_what_does_not_apply_to_a_vit_is_said(vitlit: Command, tmp_path: Path) -> None:
    grey = Preprocess((16, 16), mean=(0.5,), std=(0.5,))
    file = saved(tmp_path / "a.safetensors", grey, position="rope", pool="gap", registers=1, in_channels=1, width=16)
    paint(tmp_path / "1.png")
    out = done(vitlit("inspect", file, "1.png", "--out", "looks"))
    assert re.search(r"^positions: not drawn, .*position: rope", out, re.M)
    assert re.search(r"^occlusion: not drawn, .*no head", out, re.M)
    assert "attention of the patches (pool: gap)" in out
    assert {path.stem for path in (tmp_path / "looks").iterdir()} == ALL - {"positions", "occlusion"}


def test_mistakes_are_one_line_and_leave_nothing(vitlit: Command, tmp_path: Path) -> None:
    file = saved(tmp_path / "a.safetensors")
    paint(tmp_path / "1.png")
    (tmp_path / "2.png").write_text("no image")
    refused(vitlit("inspect", file, "1.png"), "--out")
    refused(vitlit("inspect", file, "--out", "looks"), "IMAGE")
    refused(vitlit("inspect", "nowhere", "1.png", "--out", "looks"), "nowhere does not exist")
    refused(vitlit("inspect", file, "1.png", "2.png", "--out", "looks"), "cannot read the image 2.png")
    (tmp_path / "none").mkdir()
    refused(vitlit("inspect", file, "none", "--out", "looks"), "no image under none")
    four = ViT(image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp_dim=32, in_channels=4)
    package.save_weights(four, tmp_path / "four.safetensors", format="vitlit")
    refused(vitlit("inspect", "four.safetensors", "1.png", "--out", "looks"), "set vit.preprocess")
    assert not list(tmp_path.glob("looks*"))


def test_the_figures_show_their_numbers() -> None:
    torch.manual_seed(0)
    vit = ViT(image_size=16, patch_size=4, width=32, depth=2, heads=2, mlp_dim=32, num_classes=2).eval()
    vit.preprocess, images = Preprocess((16, 16)), torch.rand(2, 3, 16, 16) * 2 - 1
    shown = figures.draw_images(vit, images).axes
    assert len(shown) == 8
    torch.testing.assert_close(torch.tensor(shown[1].images[0].get_array()), (images[1].permute(1, 2, 0) + 1) / 2)
    deep = Preprocess((16, 16), mean=(0.1, 0.2, 0.3, 0.4), std=(0.5,) * 4, range=(0, 4095))
    found = figures.coloured(torch.zeros(1, 4, 2, 2), deep)  # the first three of four channels
    torch.testing.assert_close(found, torch.tensor([0.1, 0.2, 0.3]).expand(1, 2, 2, 3))
    heads = figures.draw_heads(vit, images).axes
    assert [axes.get_xlabel() for axes in heads] == ["", "", "head 1", "head 2"]
    assert [axes.get_ylabel() for axes in heads] == ["block 1", "", "block 2", ""]
    (axes,) = figures.draw_distance(vit, images).axes
    assert "(pixels)" in axes.get_ylabel()
    assert len(axes.get_xticks()) == 2
    positions = figures.draw_positions(vit).axes
    assert len(positions) == 17
    assert positions[-1].get_ylabel() == "Cosine similarity"
    assert torch.tensor(positions[5].images[0].get_array())[1, 1] == pytest.approx(1)
    filters = figures.draw_filters(vit).axes
    assert len(filters) == 28
