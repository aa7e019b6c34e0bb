"""Weights of torchvision, in and out: its output is ours."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peers import assert_same, images_of, shaken, vit_of
from safetensors.torch import load_file
from torch import nn
from torchvision.models import VisionTransformer

import vitlit


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("representation", [None, 24])
@pytest.mark.parametrize(
    ("patch", "depth", "heads", "width", "mlp_dim"),
    [(16, 2, 12, 768, 3072), (32, 1, 16, 1024, 4096), (14, 1, 16, 1280, 5120)],
    ids=["b_16", "l_32", "h_14"],
)
def test_torchvision_in_and_out(
    patch: int, depth: int, heads: int, width: int, mlp_dim: int, representation: int | None, tmp_path: Path
) -> None:
    def peer() -> nn.Module:
        size = {"num_layers": depth, "num_heads": heads, "hidden_dim": width, "mlp_dim": mlp_dim}
        return VisionTransformer(2 * patch, patch, **size, num_classes=10, representation_size=representation).eval()

    theirs, images = shaken(peer()), images_of(2 * patch)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    vit = vitlit.load(tmp_path / "theirs.pth")
    assert vit.config.hidden_dim == representation
    assert_same(vit(images), theirs(images))
    file = vitlit.save_weights(shaken(vit, 0.01), tmp_path / "ours.safetensors", "torchvision")
    back = peer()
    back.load_state_dict(load_file(file), strict=True)
    assert_same(back(images), vit(images))


def test_torchvision_of_before_0_12_and_of_ddp(tmp_path: Path) -> None:
    theirs, images = shaken(VisionTransformer(32, 8, 2, 3, 192, 384, num_classes=10)), images_of(32)
    state = {
        f"module.{name}".replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): tensor
        for name, tensor in theirs.state_dict().items()
    }
    torch.save(state, tmp_path / "theirs.pth")
    assert_same(vitlit.load(tmp_path / "theirs.pth")(images), theirs(images))


def test_an_export_for_torchvision_reads_back_as_it_was_whatever_its_width(tmp_path: Path) -> None:
    vit = vit_of(width=36, heads=6)
    vit.classes = [f"class {i}" for i in range(10)]
    again = vitlit.load(vitlit.save_weights(vit, tmp_path / "a.safetensors", "torchvision"))
    assert (again.config, again.classes) == (vit.config, vit.classes)
    images = images_of(32)
    assert_same(again(images), vit(images))
