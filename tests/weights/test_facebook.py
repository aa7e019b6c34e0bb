"""Weights of facebookresearch: the peer's output is ours."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import assert_same, images_of, shaken, timm_model
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn
from torch.nn import functional as F

import vitlit
from vitlit.model import ViT

State = dict[str, Any]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def headless(name: str, **options: Any) -> Any:
    return shaken(timm_model(name, num_classes=0, **options))


def facebook(path: Path, content: Any, name: str, theirs: nn.Module, size: int = 64) -> vitlit.LoadReport:
    """Assert that a file is of that kind and gives the peer's output; give the report."""
    torch.save(content, path)
    vit, images = vitlit.load(path), images_of(size)
    assert_same(vit(images), theirs(images))
    fresh = ViT(**{**vit.config.plain(), "resampling": "antialias"}).eval()
    report = vitlit.load_weights(fresh, path)
    assert report.format == f"facebook {name}"
    assert_same(fresh(images), theirs(images))
    return report


DECODER: State = {
    "mask_token": torch.ones(1, 1, 64),
    "decoder_pos_embed": torch.ones(1, 17, 64),
    "decoder_embed.weight": torch.ones(64, 192),
    "decoder_blocks.0.attn.qkv.weight": torch.ones(192, 64),
    "decoder_norm.weight": torch.ones(64),
    "decoder_pred.weight": torch.ones(768, 64),
}


def test_facebooks_mae(tmp_path: Path) -> None:
    theirs = headless("vit_tiny_patch16_224")
    content = {"model": {**theirs.state_dict(), **DECODER}, "epoch": 1, "args": Namespace(lr=1e-3, seed=0)}
    report = facebook(tmp_path / "mae.pth", content, "mae", theirs)
    assert sorted(report.unexpected) == sorted(DECODER)
    report = facebook(tmp_path / "encoder.pth", {"model": theirs.state_dict()}, "mae", theirs)
    assert report.unexpected == []
    theirs = shaken(timm_model("vit_tiny_patch16_224", global_pool="avg"))
    facebook(tmp_path / "finetuned.pth", {"model": theirs.state_dict()}, "mae", theirs)


def test_facebooks_dino(tmp_path: Path) -> None:
    theirs, student = (headless("vit_tiny_patch16_224").state_dict() for _ in range(2))
    model = timm_model("vit_tiny_patch16_224", num_classes=0)
    model.load_state_dict(theirs)
    assert facebook(tmp_path / "dino.pth", theirs, "dino", model).unexpected == []
    head = {"head.mlp.0.weight": torch.ones(8, 192), "head.last_layer.weight_v": torch.ones(8, 8)}

    def whole(prefix: str, state: State) -> State:
        return {prefix + n: t for n, t in {**{f"backbone.{n}": t for n, t in state.items()}, **head}.items()}

    for prefix in ("module.", ""):
        content = {"student": whole("module.", student), "teacher": whole(prefix, theirs), "epoch": 100}
        content |= {"args": Namespace(arch="vit_tiny", global_crops_scale=(0.4, 1.0)), "fp16_scaler": None}
        report = facebook(tmp_path / "full.pth", content, "dino", model)
        assert sorted(report.unexpected) == sorted(prefix + name for name in head)


def chunked(state: State, size: int = 2) -> State:
    """Names as DINOv2 has them in training: blocks.{chunk}.{block}."""
    names = {}
    for name in state:
        first, *rest = name.split(".", 2)
        names[name] = f"blocks.{int(rest[0]) // size}.{rest[0]}.{rest[1]}" if first == "blocks" else name
    return {names[name]: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_small_patch14_dinov2", {}),
        ("vit_small_patch14_reg4_dinov2", {}),
        ("vit_giant_patch14_dinov2", {"embed_dim": 384, "num_heads": 6}),
    ],
)
def test_facebooks_dinov2(name: str, options: dict[str, Any], chunks: bool, tmp_path: Path) -> None:
    theirs = headless(name, size=70, depth=3, **options)
    state = {**{n: t.clone() for n, t in theirs.state_dict().items()}, "mask_token": torch.ones(1, 384)}
    if "reg4" in name:
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.randn(1, 1, 384), state["pos_embed"]], dim=1)
    if "giant" in name:
        state = {n.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): t for n, t in state.items()}
    theirs.load_state_dict(checkpoint_filter_fn(dict(state), theirs), strict=True)
    state = chunked(state) if chunks else state
    report = facebook(tmp_path / "dinov2.pth", state, "dinov2", theirs, 70)
    assert report.unexpected == ["mask_token"]
    assert report.settings == ([] if "reg4" in name else ["resampling offset (was antialias)"])
    heads = {"dino_head.mlp.0.weight": torch.ones(8, 384), "ibot_head.last_layer.weight_v": torch.ones(8, 8)}
    content = {"teacher": {**{f"backbone.{n}": t for n, t in state.items()}, **heads}}
    report = facebook(tmp_path / "teacher.pth", content, "dinov2", theirs, 70)
    assert sorted(report.unexpected) == sorted(["mask_token", *heads])


@pytest.mark.parametrize("size", [28, 42, 140])
def test_facebooks_dinov2_at_another_resolution(size: int, tmp_path: Path) -> None:
    theirs = headless("vit_small_patch14_dinov2", size=70)
    torch.save({**theirs.state_dict(), "mask_token": torch.ones(1, 384)}, tmp_path / "dinov2.pth")
    # dinov2/models/vision_transformer.py, interpolate_pos_encoding, with its offset of 0.1
    positions, scale = theirs.pos_embed, (size // 14 + 0.1) / 5
    grid = positions[:, 1:].reshape(1, 5, 5, 384).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, mode="bicubic", antialias=False, scale_factor=(scale, scale))
    theirs = headless("vit_small_patch14_dinov2", size=size)
    state = torch.load(tmp_path / "dinov2.pth")
    del state["mask_token"]
    state["pos_embed"] = torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
    theirs.load_state_dict(state)
    vit, images = vitlit.load(tmp_path / "dinov2.pth"), images_of(size)
    assert_same(vit(images), theirs(images))
    other = ViT(**{**vit.config.plain(), "image_size": size, "resampling": "antialias"}).eval()
    vitlit.load_weights(other, tmp_path / "dinov2.pth")
    assert_same(other(images), theirs(images))


@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"]
)
def test_facebooks_deit(name: str, tmp_path: Path) -> None:
    theirs = shaken(timm_model(name))
    state = {
        n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for n, t in theirs.state_dict().items()
    }
    assert any("gamma_1" in n for n in state) == ("deit3" in name)
    facebook(tmp_path / "deit.pth", {"model": state}, "deit", theirs)
