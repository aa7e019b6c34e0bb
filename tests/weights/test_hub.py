"""Models of the hub from huggingface_hub's cache, without a network."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Result

import vitlit
from vitlit.errors import UserError
from vitlit.model import ViT

COMMIT = "0123456789012345678901234567890123456789"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    from huggingface_hub import constants

    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def cached(cache: Path, name: str = "owner/name", reference: str = "main") -> Path:
    """The folder of a model's snapshot, as huggingface_hub lays it out."""
    model = cache / f"models--{name.replace('/', '--')}"
    (model / "refs").mkdir(parents=True, exist_ok=True)
    (model / "refs" / reference).write_text(COMMIT)
    snapshot = model / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    return snapshot


def vit() -> ViT:
    torch.manual_seed(0)
    vit = ViT(image_size=24, patch_size=8, width=24, depth=1, heads=3, mlp_dim=40, num_classes=4).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return vit


@pytest.mark.parametrize(("reference", "name"), [("main", "hf:owner/name"), ("v1.0", "hf:owner/name@v1.0")])
def test_a_cached_model_is_read(reference: str, name: str, cache: Path) -> None:
    source = vit()
    vitlit.save_weights(source, cached(cache, reference=reference), "hf")
    loaded = vitlit.load(name)
    images = torch.randn(2, 3, 24, 24)
    assert torch.equal(loaded(images), source(images))


def test_a_model_that_is_not_there_names_the_command_that_fetches_it() -> None:
    with pytest.raises(UserError, match=r"hf:owner/name .*`hf download owner/name`"):
        vitlit.load("hf:owner/name")
    with pytest.raises(UserError, match=r"hf:owner/name@v2 .*`hf download owner/name --revision v2`"):
        vitlit.load("hf:owner/name@v2")


def test_only_safetensors_are_taken(cache: Path) -> None:
    torch.save(vit().state_dict(), cached(cache) / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"hf:owner/name has no model\.safetensors"):
        vitlit.load("hf:owner/name")


@pytest.mark.parametrize("name", ["hf:", "hf:a/b/c", "hf:../name", "hf:owner/na me"])
def test_a_name_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="not of the form hf:OWNER/NAME"):
        vitlit.load(name)


def test_finetuning_starts_from_a_model_of_the_hub(vitlit: Callable[..., Result], few: Path, cache: Path) -> None:
    import vitlit as package

    package.save_weights(vit(), cached(cache), "hf")
    flags = "--data.image_size 32 --data.batch_size 16 --data.num_workers 0 --trainer.max_steps 1"
    flags += " --model.schedule.warmup 0 --trainer.logger false --run.report false --model.init_from hf:owner/name"
    result = vitlit("fit", "--config", "finetune", "--data.root", few, *flags.split())
    assert result.code == 0, result.err
    assert (
        "weights of hf:owner/name: hf vit, assuming what the file does not say: preprocess transformers' defaults"
        in result.out
    )
    assert "4 x 4 patches" in result.out
