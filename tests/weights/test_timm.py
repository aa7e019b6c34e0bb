"""Weights of timm, in and out: its output is ours."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import user_error
from peers import assert_same, images_of, shaken, ti16, timm_model, vit_of
from safetensors.torch import save_file
from timm.data import create_transform
from torchvision.transforms.v2.functional import to_pil_image

import vitlit

State = dict[str, Any]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


TIMM: list[tuple[str, int, dict[str, Any]]] = [
    ("vit_tiny_patch16_224", 64, {}),
    ("vit_small_patch16_224", 64, {}),
    ("vit_base_patch16_224", 64, {"depth": 1}),
    ("vit_base_patch32_224", 64, {"depth": 1}),
    ("vit_small_patch8_224", 32, {}),
    ("vit_small_patch14_dinov2", 70, {"num_classes": 0}),
    ("vit_small_patch14_reg4_dinov2", 70, {"num_classes": 0}),
    ("vit_giant_patch14_dinov2", 28, {"embed_dim": 384, "num_heads": 6}),
    ("vit_giant_patch14_dinov2", 28, {"mlp_ratio": 0.25, "depth": 1, "num_classes": 0}),  # its own width
    ("deit_tiny_patch16_224", 64, {}),
    ("deit_tiny_distilled_patch16_224", 64, {}),
    ("deit_tiny_distilled_patch16_224", 64, {"num_classes": 0}),
    ("deit3_small_patch16_224", 64, {}),
    ("vit_small_patch16_224", 64, {"global_pool": "avg"}),
    ("vit_base_patch16_siglip_224", 64, {"depth": 1}),
    ("vit_base_patch16_siglip_224", 64, {"depth": 1, "num_classes": 0}),
    ("vit_base_patch16_siglip_gap_224", 64, {"depth": 1}),
    ("vit_tiny_patch16_224", 64, {"qk_norm": True, "qkv_bias": False, "in_chans": 1}),
]


@pytest.mark.parametrize(("name", "size", "options"), TIMM)
def test_timm_in_and_out(name: str, size: int, options: dict[str, Any], tmp_path: Path) -> None:
    theirs, images = shaken(timm_model(name, size, **options)), images_of(size, options.get("in_chans", 3))
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    vit = vitlit.load(tmp_path / "theirs.safetensors")
    assert_same(vit(images), theirs(images))
    for ending in ("safetensors", "pth"):
        file = vitlit.save_weights(shaken(vit, 0.01), tmp_path / f"ours.{ending}", "timm")
        back = timm_model(name, size, **options, checkpoint_path=str(file))
        assert_same(back(images), vit(images))


# The number of positions in the file, the class token's included: 13; 16, as many as a square without; 17, with.
@pytest.mark.parametrize("size", [(48, 64), (48, 80), (32, 128)])
def test_timm_of_no_square_in_and_out(size: tuple[int, int], tmp_path: Path) -> None:
    theirs, images = shaken(timm_model("vit_tiny_patch16_224", size)), images_of(size)
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    vit = ti16(size)
    report = vitlit.load_weights(vit, tmp_path / "theirs.safetensors")
    assert report.resampled == []
    assert "square" not in str(report)
    assert_same(vit(images), theirs(images))
    file = vitlit.save_weights(shaken(vit, 0.01), tmp_path / "ours.safetensors", "timm")
    assert_same(timm_model("vit_tiny_patch16_224", size, checkpoint_path=str(file))(images), vit(images))


def test_what_no_square_tells_is_asked_for(tmp_path: Path) -> None:
    save_file(timm_model("vit_tiny_patch16_224", (48, 64)).state_dict(), tmp_path / "theirs.safetensors")
    user_error("build the ViT with its image_size", vitlit.load, tmp_path / "theirs.safetensors")
    save_file(timm_model("vit_tiny_patch16_224", pos_embed="none").state_dict(), tmp_path / "theirs.safetensors")
    user_error("pos_embed is missing", vitlit.load, tmp_path / "theirs.safetensors")


def test_timm_registers_with_positions_in_the_table_fold_them(tmp_path: Path) -> None:
    theirs = shaken(timm_model("vit_small_patch14_reg4_dinov2", 70, no_embed_class=False))
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    vit, images = vitlit.load(tmp_path / "theirs.safetensors"), images_of(70)
    assert_same(vit(images), theirs(images))
    file = vitlit.save_weights(vit, tmp_path / "ours.pth", "timm")
    assert_same(timm_model("vit_small_patch14_reg4_dinov2", 70, checkpoint_path=str(file))(images), theirs(images))


@pytest.mark.parametrize("mode", ["squash", "center"])
def test_images_are_prepared_as_timm_does(mode: str, tmp_path: Path) -> None:
    """crop_mode squash, as SigLIP's models have it, of a picture that is not square."""
    cfg: dict[str, Any] = {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": mode,
    }
    save_file(timm_model("vit_tiny_patch16_224", 64).state_dict(), tmp_path / "model.safetensors")
    about = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(about))
    prepare: Any = vitlit.load(tmp_path).preprocess
    ramps = torch.linspace(0, 255, 300).expand(3, 200, 300).byte()
    theirs = create_transform((3, 64, 64), is_training=False, **cfg)(to_pil_image(ramps))
    assert (prepare(ramps)[0] - theirs).abs().max() < 3 / 127.5  # timm resizes with Pillow


@pytest.mark.parametrize("position", ["sincos2d", "sincos2d_mae"])
def test_fixed_positions_are_written_out_for_timm(position: Any, tmp_path: Path) -> None:
    vit, images = vit_of(patch_size=16, image_size=64, mlp_dim=768, position=position), images_of(64)
    file = vitlit.save_weights(vit, tmp_path / "ours.safetensors", "timm")
    assert_same(timm_model("vit_tiny_patch16_224", checkpoint_path=str(file))(images), vit(images))


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module._orig_mod.", "backbone."])
@pytest.mark.parametrize("wrapper", ["", "state_dict", "model", "state_dict_ema"])
def test_prefixes_and_wrappers_are_taken_off(prefix: str, wrapper: str, tmp_path: Path) -> None:
    theirs, images = shaken(timm_model("vit_tiny_patch16_224", depth=1)), images_of(64)
    state: State = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
    if wrapper:
        state = {wrapper: state, "epoch": 3, "optimizer": {"state": {0: torch.zeros(3)}}}
    else:
        save_file(state, tmp_path / "theirs.safetensors")
        assert_same(vitlit.load(tmp_path / "theirs.safetensors")(images), theirs(images))
    for new in (True, False):  # a zip archive, or a pickle of before torch 1.6
        torch.save(state, tmp_path / "theirs.pth", _use_new_zipfile_serialization=new)
        assert_same(vitlit.load(tmp_path / "theirs.pth")(images), theirs(images))


def test_averaged_weights_go_before_the_others(tmp_path: Path) -> None:
    one, averaged = (shaken(timm_model("vit_tiny_patch16_224", depth=1)) for _ in range(2))
    images = images_of(64)
    for raw, ema in (("state_dict", "state_dict_ema"), ("model", "model_ema")):  # timm's names, DeiT's
        torch.save({raw: one.state_dict(), ema: averaged.state_dict()}, tmp_path / "a.pth")
        assert_same(vitlit.load(tmp_path / "a.pth")(images), averaged(images))


def test_half_precision_loads_as_single(tmp_path: Path) -> None:
    theirs, images = shaken(timm_model("vit_tiny_patch16_224")).bfloat16(), images_of(64)
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    vit = vitlit.load(tmp_path / "theirs.safetensors")
    assert {tensor.dtype for tensor in vit.state_dict().values()} == {torch.float32}
    assert_same(vit(images), theirs.float()(images))
