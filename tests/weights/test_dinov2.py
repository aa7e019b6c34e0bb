"""A genuine DINOv2 ViT-S/14 against transformers; VITLIT_DINOV2 names its file, with the names of `Dinov2Model`."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import Result
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import vitlit as package

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def file() -> Path:
    if "VITLIT_DINOV2" not in os.environ:
        pytest.skip("VITLIT_DINOV2 names no file")
    return Path(os.environ["VITLIT_DINOV2"]).absolute()


@pytest.fixture(scope="module")
def theirs(file: Path, tmp_path_factory: pytest.TempPathFactory) -> transformers.Dinov2Model:
    config = transformers.Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    )
    folder = tmp_path_factory.mktemp("dinov2")
    transformers.Dinov2Model(config).save_pretrained(folder)
    save_file(
        {**load_file(folder / "model.safetensors"), **load_file(file)}, folder / "model.safetensors", {"format": "pt"}
    )
    return transformers.Dinov2Model.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Smooth random pictures, whose positions matter."""
    noise = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return F.interpolate(noise, size=(518, 518), mode="bicubic")


def test_its_features_equal_transformers(file: Path, theirs: transformers.Dinov2Model, images: Tensor) -> None:
    with torch.inference_mode():
        expected = theirs(images).last_hidden_state
        assert expected.abs().max() > 1
        assert (package.load(file).features(images) - expected).abs().max() < 1e-4


def test_at_224_pixels_it_follows_dinov2s_own_resampling(
    file: Path, theirs: transformers.Dinov2Model, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """facebookresearch/dinov2, interpolate_pos_encoding: a scale of (16 + 0.1) / 37, which transformers leaves out."""
    images = F.interpolate(images, size=(224, 224), mode="bilinear", antialias=True)
    table = load_file(file)["embeddings.position_embeddings"]
    grid = table[:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=((16 + 0.1) / 37, (16 + 0.1) / 37), mode="bicubic")
    offset = torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, 256, 384)], dim=1)
    vit = package.load(file)
    small = package.ViT(**{**vit.config.plain(), "image_size": 224, "resampling": "antialias"}).eval()
    assert package.load_weights(small, file).resampled == ["pos_embed"]
    with torch.inference_mode():
        as_transformers = theirs(images).last_hidden_state
        monkeypatch.setattr(theirs.embeddings, "interpolate_pos_encoding", lambda *_: offset)
        expected = theirs(images).last_hidden_state
        assert (vit.features(images) - expected).abs().max() < 1e-4
        assert (small.features(images) - expected).abs().max() < 1e-4
        vit.resampling = "bicubic"
        assert (vit.features(images) - as_transformers).abs().max() < 1e-4


def test_show_names_it(vitlit: Callable[..., Result], file: Path) -> None:
    out = vitlit("weights", "show", file).out
    for words in ("hf dinov2", "S/14 (", "518 x 518 pixels, 37 x 37 patches", "22,056,192", "resampling offset"):
        assert words in out
