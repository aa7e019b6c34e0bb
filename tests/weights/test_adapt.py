"""What may differ between a file and the ViT: its size, channels and class position."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import assert_same, images_of, shaken, ti16, timm_model
from safetensors.torch import save_file
from timm.models._manipulate import adapt_input_conv
from timm.models.vision_transformer import checkpoint_filter_fn

import vitlit
from vitlit.model import ViT


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


TI, S, B = (192, 1, 3, 768), (384, 1, 6, 1536), (768, 1, 12, 3072)


@pytest.mark.parametrize("size", [32, 96, (48, 64), (48, 80)])
@pytest.mark.parametrize(
    ("name", "shape", "ours", "theirs"),
    [
        ("vit_tiny_patch16_224", TI, {}, {}),
        ("deit_tiny_distilled_patch16_224", TI, {"distilled": True}, {}),
        ("deit3_small_patch16_224", S, {"layer_scale": 0.1, "class_position": False}, {}),
        ("vit_small_patch16_224", S, {"pool": "gap", "norm": "pooled", "class_token": True}, {"global_pool": "avg"}),
        ("vit_base_patch16_siglip_224", B, {"pool": "map"}, {}),
    ],
)
def test_another_size_is_resampled_as_timm_does(
    name: str, shape: tuple[int, ...], ours: dict[str, Any], theirs: dict[str, Any], size: Any, tmp_path: Path
) -> None:
    source, target = (shaken(timm_model(name, side, depth=1, **theirs)) for side in (64, size))
    save_file(source.state_dict(), tmp_path / "theirs.safetensors")
    state = checkpoint_filter_fn(source.state_dict(), target)  # type: ignore[arg-type]
    target.load_state_dict(state, strict=True)
    width, depth, heads, mlp_dim = shape
    vit = ViT(size, 16, width, depth, heads, mlp_dim, num_classes=10, **ours).eval()
    report = vitlit.load_weights(vit, tmp_path / "theirs.safetensors")
    assert report.resampled == ["pos_embed"]
    assert (vit.get_parameter("pos_embed") - state["pos_embed"]).abs().max() <= 1e-6
    images = images_of(size)
    assert_same(vit(images), target(images))


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_other_channels_are_made_as_timm_does(channels: int, tmp_path: Path) -> None:
    source, target = (shaken(timm_model("vit_tiny_patch16_224", in_chans=count)) for count in (3, channels))
    save_file(source.state_dict(), tmp_path / "theirs.safetensors")
    stem = "patch_embed.proj.weight"
    state = {**source.state_dict(), stem: adapt_input_conv(channels, source.state_dict()[stem])}
    target.load_state_dict(state, strict=True)
    vit = ti16(64, in_channels=channels)
    report = vitlit.load_weights(vit, tmp_path / "theirs.safetensors")
    assert report.resampled == [stem]
    assert (vit.get_parameter(stem) - state[stem]).abs().max() <= 1e-6
    images = images_of(64, channels)
    assert_same(vit(images), target(images))


@pytest.mark.parametrize(
    ("name", "before", "changed"),
    [
        ("vit_tiny_patch16_224", True, ["cls_token", "pos_embed"]),
        ("vit_tiny_patch16_224", False, ["pos_embed"]),
        ("deit_tiny_distilled_patch16_224", True, ["cls_token", "dist_token", "pos_embed"]),
    ],
)
@pytest.mark.parametrize("size", [64, 96])
def test_the_class_position_folds_both_ways(
    name: str, before: bool, changed: list[str], size: int, tmp_path: Path
) -> None:
    options = {} if before else {"no_embed_class": True}
    source, target = (shaken(timm_model(name, side, **options)) for side in (64, size))
    save_file(source.state_dict(), tmp_path / "theirs.safetensors")
    target.load_state_dict(checkpoint_filter_fn(source.state_dict(), target), strict=True)  # type: ignore[arg-type]
    vit, images = ti16(size, class_position=not before, distilled="distilled" in name), images_of(size)
    assert sorted(vitlit.load_weights(vit, tmp_path / "theirs.safetensors").resampled) == changed
    assert_same(vit(images), target(images))
