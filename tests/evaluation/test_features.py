"""Features against timm's, and the same whatever the batches."""

from pathlib import Path

import pytest
import torch
from conftest import stranger, user_error
from safetensors.torch import save_file
from torch import Tensor

from vitlit import ViT, load
from vitlit.evaluation import features, probe_inputs

NAMES = ("pooled", "logits", "class", "patches")


def images(count: int, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    model: torch.nn.Module = stranger(depth=5)
    return model


@pytest.fixture(scope="module")
def ours(theirs: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> ViT:
    file: Path = tmp_path_factory.mktemp("weights") / "timm.safetensors"
    save_file(theirs.state_dict(), file)
    return load(file)


def test_they_are_timms(ours: ViT, theirs: torch.nn.Module) -> None:
    batch = images(5)
    found = features(ours, [batch[:2], batch[2:]], NAMES)
    with torch.inference_mode():
        layers = theirs.get_intermediate_layers(batch, n=4, return_prefix_tokens=True, norm=True)  # type: ignore[operator]
        tokens = theirs.forward_features(batch)  # type: ignore[operator]
        logits = theirs(batch)
    expected = {
        "pooled": tokens[:, 0],
        "logits": logits,
        "class": torch.stack([prefix[:, 0] for _, prefix in layers], 1),
        "patches": layers[-1][0].mean(1),
    }
    assert found.keys() == expected.keys()
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], atol=2e-5, rtol=1e-4)
    inputs = probe_inputs(found)
    assert [each.shape[1] // 192 for each in inputs.values()] == [1, 4, 2, 5]
    torch.testing.assert_close(inputs["4 blocks, patches"][:, -384:-192], expected["pooled"], atol=2e-5, rtol=1e-4)


def test_they_do_not_depend_on_the_batches(ours: ViT) -> None:
    """Bit for bit, on any machine: the network sees no other size than 64."""
    everything, sizes = images(130), set[int]()
    hook = ours.patch_embed.register_forward_pre_hook(lambda _, given: sizes.add(len(given[0])))
    whole = features(ours, [everything], NAMES)
    for size in (1, 7, 64):
        parts = everything.split(size)
        found = features(ours, (part.to(memory_format=torch.channels_last) for part in parts), NAMES)
        assert all(torch.equal(found[name], whole[name]) for name in NAMES)
    hook.remove()
    assert sizes == {64}


@pytest.mark.parametrize("norm", ["tokens", "pooled"])
def test_a_vit_without_a_class_token_gives_means(norm: str) -> None:
    vit = ViT(32, 8, width=16, depth=2, heads=2, mlp_dim=32, class_token=False, pool="gap", norm=norm).eval()
    found = features(vit, [images(3)], ("class", "patches", "pooled"))
    assert found["class"].shape == (3, 2, 16)
    assert torch.equal(found["class"][:, -1], found["patches"])
    if norm == "tokens":
        torch.testing.assert_close(found["patches"], found["pooled"])


def test_a_vit_that_trains_is_refused(ours: ViT) -> None:
    user_error("vit.eval", features, ViT(32, 8, width=16, depth=1, heads=2, mlp_dim=32), [images(1)])
