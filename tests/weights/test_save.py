"""What is written: vitlit's own files keep everything, and what a format has no network for is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import assert_same, images_of, shaken, vit_of

import vitlit
from vitlit.data import Preprocess
from vitlit.errors import UserError
from vitlit.model import ViT


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


ROPE: dict[str, Any] = {"position": "rope", "num_classes": 0}


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("timm", ROPE, "position rope"),
        ("timm", {"hidden_dim": 24}, "hidden_dim 24"),
        ("timm", {"position": "none"}, "position none"),
        ("hf", {"qk_norm": True}, "qk_norm True"),
        ("hf", {"pool": "gap"}, "pool gap"),
        ("hf", {"pool": "map", "layer_scale": 0.1, "num_classes": 0}, "pool map"),
        ("hf", {"hidden_dim": 24}, "hidden_dim 24"),
        ("hf", {"norm": "pooled"}, "norm pooled"),
        ("hf", {"final_norm": False}, "final_norm False"),
        ("hf", {"position": "none"}, "position none"),
        ("hf", {"position": "sincos2d"}, "position sincos2d"),
        ("hf", {"class_position": False}, "class_position False"),
        ("hf", {"registers": 2, "hidden_dim": 8}, "hidden_dim 8"),
        ("hf", {"distilled": True, "num_classes": 0}, "no mean of the class and the distillation token"),
        ("hf", {"registers": 2, "num_classes": 0, "mlp": "quick_gelu"}, "mlp quick_gelu"),
        ("hf", {"pre_norm": True}, "pre_norm True"),
        ("timm", {"patch_bias": False}, "patch_bias False"),
        ("torchvision", {"norm_kind": "rmsnorm"}, "norm_kind rmsnorm"),
        ("google", {"mlp": "gelu_tanh", "sub_norm": True}, "sub_norm True"),
        ("hf", {"layer_scale": 0.1, "pool": "gap"}, "pool gap"),
        ("hf", {"distilled": True, "registers": 2, "num_classes": 0}, "distilled True"),
        ("hf", {"mlp": "swiglu", "num_classes": 0}, "mlp_dim 384"),
        ("hf", {"mlp_dim": 200, "layer_scale": 0.1, "num_classes": 0}, "mlp_dim 200"),
        ("hf", ROPE, "layer_scale None"),
        ("hf", {**ROPE, "layer_scale": 0.1}, "bias of the keys"),
        ("hf", {**ROPE, "layer_scale": 0.1, "num_classes": 10}, "num_classes 10"),
        ("hf", {**ROPE, "layer_scale": 0.1, "qk_norm": True}, "qk_norm True"),
        ("torchvision", {"registers": 2}, "registers 2"),
        ("torchvision", {"distilled": True}, "distilled True"),
        ("torchvision", {"layer_scale": 0.1}, "layer_scale 0.1"),
        ("torchvision", {"qk_norm": True}, "qk_norm True"),
        ("torchvision", {"qkv_bias": False}, "qkv_bias False"),
        ("torchvision", {"pool": "gap"}, "pool gap"),
        ("torchvision", {"position": "sincos2d_mae"}, "position sincos2d_mae"),
        ("torchvision", {"class_position": False}, "class_position False"),
        ("torchvision", {"mlp": "gelu_tanh"}, "mlp gelu_tanh"),
        ("torchvision", {"mlp": "swiglu"}, "mlp swiglu"),
        ("torchvision", {"norm_eps": 1e-5}, "norm_eps 1e-05"),
        ("torchvision", {"in_channels": 1}, "in_channels 1"),
        ("torchvision", {"image_size": (16, 64)}, "square images"),
        ("google", {}, "mlp gelu"),
        ("google", {"mlp": "swiglu"}, "mlp swiglu"),
        ("google", {"mlp": "gelu_tanh", "layer_scale": 0.1}, "layer_scale 0.1"),
        ("google", {"mlp": "gelu_tanh", "registers": 2}, "registers 2"),
        ("google", {"mlp": "gelu_tanh", "distilled": True}, "distilled True"),
        ("google", {"mlp": "gelu_tanh", "qk_norm": True}, "qk_norm True"),
        ("google", {"mlp": "gelu_tanh", "qkv_bias": False}, "qkv_bias False"),
        ("google", {"mlp": "gelu_tanh", "norm": "pooled"}, "norm pooled"),
        ("google", {"mlp": "gelu_tanh", "final_norm": False}, "final_norm False"),
        ("google", {"mlp": "gelu_tanh", "norm_eps": 1e-5}, "norm_eps 1e-05"),
        ("google", {"mlp": "gelu_tanh", "position": "none"}, "position none"),
        ("google", {"mlp": "gelu_tanh", "position": "rope"}, "position rope"),
        ("google", {"mlp": "gelu_tanh", "position": "sincos2d_mae"}, "position sincos2d_mae"),
    ],
)
def test_what_a_format_has_not_is_refused_by_name(
    format: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / {"hf": "out", "google": "out.npz"}.get(format, "out.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        vitlit.save_weights(vit_of(**options), path, format)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options", [{}, {"pool": "gap", "class_token": True}, {"pool": "map"}, {"image_size": (16, 64)}], ids=str
)
def test_an_npz_is_read_back_as_the_same_network_or_refused(options: dict[str, Any], tmp_path: Path) -> None:
    vit = vit_of(mlp="gelu_tanh", **options)
    try:
        read = vitlit.load(vitlit.save_weights(vit, tmp_path / "a.npz", "google"))
    except UserError:
        return
    images = images_of(options.get("image_size", 32))
    assert_same(read(images), vit(images))


@pytest.mark.parametrize(
    ("format", "name"), [("vitlit", "a.pth"), ("timm", "a.ckpt"), ("torchvision", "a.npz"), ("google", "a.pth")]
)
def test_an_ending_of_another_format_is_refused(format: Any, name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"ends in none of .*which the format {format} has"):
        vitlit.save_weights(vit_of(), tmp_path / name, format)
    assert not list(tmp_path.iterdir())


OWN: list[dict[str, Any]] = [
    {},
    {"image_size": (16, 48), "registers": 2, "mlp": "swiglu", "layer_scale": 0.1, "qk_norm": True, "in_channels": 1},
    {"pool": "map", "position": "sincos2d", "norm_eps": 1e-5, "dropout": 0.1, "num_classes": 0},
    {"distilled": True, "class_position": False, "qkv_bias": False, "drop_path": 0.1},
    {"pool": "gap", "class_token": True, "norm": "pooled", "position": "rope"},
    {"hidden_dim": 24, "mlp": "gelu_tanh", "resampling": "offset", "position": "none", "final_norm": False},
]


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
@pytest.mark.parametrize("options", OWN)
def test_vitlits_own_files_keep_everything(options: dict[str, Any], ending: str, tmp_path: Path) -> None:
    vit = vit_of(**options)
    vit.classes = [f"Klasse {i} é ☃" for i in range(vit.config.num_classes)]
    colours = (0.1, 0.2, 0.3)[: vit.config.in_channels]
    sides = tuple(side * vit.patch_size for side in vit.grid)
    vit.preprocess = Preprocess(sides, 0.7, "bilinear", colours, colours)  # type: ignore[arg-type]
    loaded = vitlit.load(vitlit.save_weights(vit, tmp_path / f"a.{ending}"))
    assert loaded.config == vit.config
    assert loaded.classes == vit.classes
    assert loaded.preprocess == vit.preprocess
    assert loaded.state_dict().keys() == vit.state_dict().keys()
    assert all(torch.equal(tensor, vit.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    images = torch.randn(2, vit.config.in_channels, *sides)
    assert torch.equal(loaded(images), vit(images))
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"a.{ending}"]


def test_a_flipped_byte_anywhere_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    vit = shaken(ViT(image_size=16, patch_size=8, width=192, depth=1, heads=3, mlp_dim=8, num_classes=2))
    vit.classes = ["a", "b"]
    whole = vitlit.save_weights(vit, tmp_path / "whole.safetensors").read_bytes()
    header, damaged = 8 + int.from_bytes(whole[:8], "little"), tmp_path / "damaged.safetensors"
    metadata = whole.index(b'"},"')
    assert 500 < metadata < header
    harmless = set()
    for place in (*range(metadata), *range(metadata, header, 7), *range(header, len(whole), 7919)):
        damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 7]) + whole[place + 1 :])
        try:
            read = vitlit.load(damaged)
        except UserError:
            continue
        harmless.add(place)
        assert (read.config, read.classes, read.preprocess) == (vit.config, vit.classes, None), place
        assert all(torch.equal(tensor, vit.state_dict()[name]) for name, tensor in read.state_dict().items()), place
    first = whole.index(b'format":"pt"')  # which says nothing of the content
    assert harmless <= {*range(first, first + len(b'format":"pt'))}
