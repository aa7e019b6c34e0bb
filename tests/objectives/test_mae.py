"""Masked autoencoding against transformers' ViTMAEForPreTraining, and what it may and may not see."""

import math
from typing import Any

import pytest
import torch
from conftest import randomized
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.objectives import MAE, Batch

TINY: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 24, "depth": 2, "heads": 3, "mlp_dim": 40}
DECODER: dict[str, Any] = {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 4}
PATCHES = 16


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def made(options: dict[str, Any] | None = None, **of_mae: Any) -> tuple[ViT, MAE]:
    vit = randomized(ViT(**{**TINY, "position": "sincos2d_mae", **(options or {})}))
    return vit, randomized(MAE(vit, **{**DECODER, **of_mae}))


def batch_of(images: Tensor, first: int = 0) -> Batch:
    return Batch.of((images, torch.full((len(images),), -1), torch.arange(first, first + len(images))))


LAYERS = {
    "vit.embeddings.patch_embeddings.projection": "vit.patch_embed.proj",
    "vit.embeddings.cls_token": "vit.cls_token",
    "vit.layers.": "vit.blocks.",
    "vit.layernorm": "vit.norm",
    "decoder.decoder_layers.": "decoder_blocks.",
    "decoder.": "",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.o_proj": "attn.proj",
    "mlp.fc": "mlp.fc",
}


def theirs_of(vit: ViT, mae: MAE, normalize: bool) -> Any:
    """transformers' network with the same weights."""
    config = ViTMAEConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=32,
        patch_size=8,
        layer_norm_eps=1e-6,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=64,
        norm_pix_loss=normalize,
    )
    theirs = ViTMAEForPreTraining(config).eval()
    ours = {f"vit.{name}": tensor for name, tensor in vit.state_dict().items()} | mae.state_dict()
    state = theirs.state_dict()
    for name in state:
        renamed = name
        for their, our in LAYERS.items():
            renamed = renamed.replace(their, our)
        part = next((i for i, letter in enumerate("qkv") if f".{letter}_proj." in name), None)
        if part is not None:
            fused, _, kind = renamed.rpartition(".attention.")
            tensor = ours[f"{fused}.attn.qkv.{kind.rpartition('.')[2]}"]
            state[name] = tensor.chunk(3)[part]
        elif name.endswith(("position_embeddings", "pos_embed")):
            table = build_2d_sinusoidal_position_embedding(4, 4, state[name].shape[-1], cls_token=True)
            state[name] = torch.cat(table.chunk(2, dim=1)[::-1], dim=1)[None]  # as `initialize_weights` fills it
        else:
            state[name] = ours[renamed]
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", [True, False])
def test_loss_and_reconstruction_equal_transformers(normalize: bool, dtype: torch.dtype) -> None:
    vit, mae = made(normalize_pixels=normalize)
    theirs = theirs_of(vit, mae, normalize).to(dtype)
    vit, mae = vit.to(dtype), mae.to(dtype)
    images, noise = torch.randn(3, 3, 32, 32, dtype=dtype), torch.rand(3, PATCHES)
    expected = theirs(images, noise=noise)
    loss, predicted, hidden, _ = mae.reconstruct(vit, images, noise)
    assert torch.equal(hidden, expected.mask.bool())
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(predicted, expected.logits, rtol=0, atol=1e-5)
    assert expected.logits.std() > 0.1


@pytest.mark.parametrize(
    ("preset", "parameters", "trained"),
    [("B/16", 111_907_840, 111_655_680), ("L/16", 329_541_888, None), ("H/14", 657_074_508, None)],
)
def test_parameter_counts(preset: str, parameters: int, trained: int | None) -> None:
    """Published counts include the two fixed position tables, with a row for the class token."""
    with torch.device("meta"):
        vit = ViT.from_preset(preset, position="sincos2d_mae")
        mae = MAE(vit)
    count = sum(p.numel() for network in (vit, mae) for p in network.parameters())
    assert trained in (None, count)
    assert count + (1 + math.prod(vit.grid)) * (vit.width + 512) == parameters


@pytest.mark.parametrize(("ratio", "hidden"), [(0.75, 12), (0.6, 10), (0.5, 8), (0.9, 15)])
def test_the_mask_ratio_is_hidden_of_every_image(ratio: float, hidden: int) -> None:
    vit, mae = made(mask_ratio=ratio)
    mask = mae.reconstruct(vit, torch.randn(4, 3, 32, 32), torch.rand(4, PATCHES))[2]
    assert mask.sum(dim=1).tolist() == [hidden] * 4
    assert len({tuple(row) for row in mask.tolist()}) > 1


def pixels(mask: Tensor) -> Tensor:
    """A mask of patches as one of pixels, (B, 1, 32, 32)."""
    return mask.reshape(-1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)


@pytest.mark.parametrize("normalize", [True, False])
def test_predictions_see_visible_patches_alone_and_the_loss_compares_hidden_ones(normalize: bool) -> None:
    vit, mae = made(normalize_pixels=normalize)
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, PATCHES)
    loss, predicted, hidden, _ = mae.reconstruct(vit, images, noise)
    changed = torch.where(pixels(hidden), torch.randn_like(images), images)
    other_loss, same, *_ = mae.reconstruct(vit, changed, noise)
    assert torch.equal(same, predicted)
    assert other_loss != loss

    visible = images.clone().requires_grad_()
    mae.reconstruct(vit, visible, noise)[1].sum().backward()
    assert visible.grad is not None
    assert torch.equal((visible.grad != 0).any(dim=1, keepdim=True), ~pixels(hidden))

    answer = predicted.detach().clone()
    wrong = torch.where(hidden[..., None], answer, answer + 100)
    mae.decode = lambda tokens, keep: wrong  # type: ignore[method-assign]
    torch.testing.assert_close(mae.reconstruct(vit, images, noise)[0], loss)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"position": "learned", "registers": 2},
        {"position": "rope", "pool": "gap", "heads": 2},
        {"distilled": True, "in_channels": 1, "image_size": (32, 48)},
    ],
)
def test_a_gradient_reaches_every_parameter(options: dict[str, Any]) -> None:
    vit, mae = made(options)
    vit.train()
    images = torch.randn(4, vit.config.in_channels, *vit.config.sides)
    step = mae.train()(vit, batch_of(images), 0.0)
    step.loss.backward()
    assert step.logits is None
    for network in (vit, mae):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_what_is_hidden_follows_the_draws_alone() -> None:
    vit, mae = made()
    images = torch.randn(4, 3, 32, 32)

    def loss(training: bool, seed: int, first: int = 0, chosen: slice = slice(None)) -> float:
        torch.manual_seed(seed)
        batch = batch_of(images, first)
        batch = Batch([batch.views[0][chosen]], batch.labels[chosen], batch.indices[chosen], batch.draws[chosen])
        return mae.train(training)(vit, batch, 0.0).loss.item()

    assert loss(False, seed=1) == loss(True, seed=2) != loss(False, seed=1, first=4)
    halves = [loss(True, seed=3, chosen=half) for half in (slice(2), slice(2, 4))]
    assert loss(True, seed=1) == pytest.approx(sum(halves) / 2, rel=1e-5)


def test_validation_hides_each_patch_as_often() -> None:
    vit, mae = made()
    seen: list[Tensor] = []
    reconstruct = mae.reconstruct
    mae.reconstruct = lambda *given: seen.append(reconstruct(*given)[2]) or reconstruct(*given)  # type: ignore
    mae.eval()(vit, batch_of(torch.zeros(1, 3, 32, 32).expand(2000, -1, -1, -1)), 0.0)
    share = seen[0].double().mean(dim=0)
    assert (share - 0.75).abs().max() < 0.05  # five standard deviations
    together = seen[0].double().T @ seen[0].double() / 2000
    assert (together[~torch.eye(PATCHES, dtype=torch.bool)] - 0.75 * 11 / 15).abs().max() < 0.06


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_in_mixed_and_in_low_precision(dtype: torch.dtype) -> None:
    vit, mae = made()
    images = torch.randn(4, 3, 32, 32)
    expected = mae(vit, batch_of(images), 0.0).loss
    vit, mae = vit.to(dtype), mae.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        loss = mae(vit, batch_of(images.to(dtype)), 0.0).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.05)


def test_a_head_is_removed() -> None:
    vit = ViT(**TINY, num_classes=5)
    MAE(vit, **DECODER)
    assert vit.config.num_classes == 0


@pytest.mark.parametrize(
    ("options", "of_mae", "message"),
    [
        ({}, {"mask_ratio": 1.0}, "mask_ratio 1.0 must hide some of 16 patches"),
        ({}, {"mask_ratio": 0.0}, "mask_ratio 0.0"),
        ({}, {"mask_ratio": 0.99}, "mask_ratio 0.99 .* leave others visible"),
        ({}, {"decoder_heads": 3}, "MAE's decoder: heads 3 do not divide the width 16"),
        ({}, {"decoder_depth": 0}, "MAE's decoder: ViT: depth is 0; give at least 1"),
        ({"pool": "map"}, {}, "does not train with model.vit.pool map"),
        ({"pool": "gap", "norm": "pooled"}, {}, "norm pooled; set them when you finetune"),
    ],
)
def test_what_cannot_be_learned_is_refused(options: dict[str, Any], of_mae: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(options, **of_mae)


@pytest.mark.parametrize("normalized", [True, False])
def test_pictures_of_an_oracle_are_the_images(normalized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    vit, mae = made({"image_size": (32, 48)}, normalize_pixels=normalized)
    levels = torch.randint(256, (2, 3, 32, 48))
    images = levels / 127.5 - 1
    batch = batch_of(images, 7)
    visible = mae.pictures(vit, batch)["visible patches"]
    shown = (visible != 0).any(1)
    assert shown.unfold(1, 8, 8).unfold(2, 8, 8).all((-1, -2)).sum((1, 2)).tolist() == [6, 6]
    assert torch.equal(visible.movedim(1, -1)[shown], images.movedim(1, -1)[shown])
    assert torch.equal(mae.pictures(vit, batch)["visible patches"], visible)
    reconstruction = mae.pictures(vit, batch)["reconstruction"]
    assert torch.equal(reconstruction.movedim(1, -1)[shown], images.movedim(1, -1)[shown])
    assert (reconstruction - images).abs().mean() > 0.1
    # What the decoder ought to say.
    patches = images.reshape(2, 3, 4, 8, 6, 8).permute(0, 2, 4, 3, 5, 1).reshape(2, 24, -1)
    if normalized:
        variance, mean = torch.var_mean(patches, -1, keepdim=True)
        patches = (patches - mean) / (variance + 1e-6).sqrt()
    monkeypatch.setattr(mae, "decode", lambda tokens, keep: patches)
    predicted = (mae.pictures(vit, batch)["reconstruction"] + 1) * 127.5
    assert (predicted - levels).abs().max() < 1
    assert mae(vit, batch, 0.0).loss < 1e-6
