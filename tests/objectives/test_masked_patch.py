"""Masked patch prediction against the paper's rates, and against numpy on the pixels."""

import math

import numpy as np
import pytest
import torch
from conftest import user_error

from vitlit.images.preprocess import Preprocess
from vitlit.model import ViT
from vitlit.objectives import Batch, MaskedPatch
from vitlit.objectives.masked_patch import corruption, mean_colours, rearranged

pytestmark = pytest.mark.usefixtures("undrawn")

TINY = {"image_size": 32, "patch_size": 8, "width": 16, "depth": 1, "heads": 2, "mlp_dim": 32}


def test_half_of_the_patches_are_corrupted_in_the_papers_shares() -> None:
    images, patches = 1100, 196
    corrupted, mask, source = corruption(torch.arange(images) * 977 + 5, patches)
    assert corrupted.shape == (images, patches // 2)
    chosen = torch.zeros(images, patches, dtype=torch.bool).scatter(1, corrupted, True)
    assert chosen.sum() == images * patches // 2 > 1e5
    moved = source != torch.arange(patches)
    assert not ((mask | moved) & ~chosen).any()
    assert not (mask & moved).any()
    count = int(chosen.sum())
    for rate, happened in ((0.8, mask), (0.1, moved), (0.1, chosen & ~mask & ~moved)):
        assert abs(int(happened.sum()) - rate * count) < 3 * math.sqrt(count * rate * (1 - rate))
    steps = (source - torch.arange(patches))[moved] % patches  # another patch is any other one
    assert abs(steps.double().mean() - patches / 2) < 3 * patches / math.sqrt(12 * len(steps))
    often = chosen.double().mean(0)
    assert (often - 0.5).abs().max() < 5 * math.sqrt(0.25 / images)


def test_another_patch_is_its_embedding() -> None:
    vit, images = ViT(**TINY), torch.randn(3, 3, 32, 32)
    source = torch.randint(16, (3, 16))
    expected = vit.patch_embed(images).gather(1, source[..., None].expand(-1, -1, 16))
    torch.testing.assert_close(vit.patch_embed(rearranged(images, source, 8)), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_targets_are_the_three_highest_bits_of_the_mean_colours(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, channels, 32, 32))
    pixels[0], pixels[1], pixels[2] = 255, 0, 128
    bright = np.arange(3, 50)[:, None, None, None]
    pixels[3:] = np.clip(pixels[3:] // 4 + 4 * bright, 0, 255)
    mean, std = (0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels]
    shape = (1, channels, 1, 1)
    normalised = (pixels / 255 - np.reshape(mean, shape)) / np.reshape(std, shape)
    found = mean_colours(torch.from_numpy(normalised).float(), 8, mean, std)
    means = pixels.reshape(50, channels, 4, 8, 4, 8).mean((3, 5)).reshape(50, channels, 16)
    levels = np.floor(means / 32).astype(int)
    expected = sum(levels[:, channel] * 8 ** (channels - 1 - channel) for channel in range(channels))
    assert found.tolist() == expected.tolist()
    assert found[0].unique().item() == 8**channels - 1
    assert len(found.unique()) > 6


def test_it_sees_no_masked_pixels() -> None:
    torch.manual_seed(0)
    vit = ViT(**TINY)
    objective = MaskedPatch(vit)
    vit.preprocess = Preprocess((32, 32))
    images, numbers = torch.randn(2, 3, 32, 32), torch.tensor([3, 2**62])
    images.requires_grad_()
    batch = Batch([images], torch.full((2,), -1), numbers, numbers)
    loss = objective(vit, batch, 0.0).loss
    gradient, *_ = torch.autograd.grad(loss, [images])
    _, mask, source = corruption(numbers, 16)
    reached = gradient.reshape(2, 3, 4, 8, 4, 8).abs().sum((1, 3, 5)).flatten(1) > 0
    for row in range(2):
        seen = {int(patch) for patch, hidden in zip(source[row], mask[row], strict=True) if not hidden}
        assert seen == set(reached[row].nonzero().flatten().tolist())


def test_what_cannot_be_learned_is_refused() -> None:
    user_error("pool map", MaskedPatch, ViT(**TINY, pool="map"))
    vit = ViT(**TINY)
    user_error(
        "set vit.preprocess, or use a data module", MaskedPatch(vit), vit, Batch.of(torch.zeros(1, 3, 32, 32)), 0
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_show_what_is_corrupted_and_predicted(channels: int) -> None:
    vit = ViT(**{**TINY, "image_size": (32, 16)}, in_channels=channels)
    objective = MaskedPatch(vit)
    vit.preprocess = Preprocess((32, 16), mean=(0.4,) * channels, std=(0.3,) * channels)
    images, draws = torch.randn(5, channels, 32, 16), torch.arange(5) + 3
    batch = Batch([images], torch.full((5,), -1), draws, draws)
    _, mask, source = corruption(draws, 8)
    number = 8**channels - 7  # the lowest red and green, and one level more of blue; of grey the lowest but one
    with torch.no_grad():
        objective.head.weight.zero_()
        objective.head.bias.zero_()
        objective.head.bias[number] = 1
    shown = objective.pictures(vit, batch)
    seen, predicted = shown.values()
    assert seen.shape == images.shape
    assert (seen.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3)[mask[:, None].expand(-1, channels, -1)] == 0).all()
    own = (~mask & (source == torch.arange(8)))[:, None].expand(-1, channels, -1)
    as_patches = [part.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3) for part in (seen, images)]
    assert torch.equal(as_patches[0][own], as_patches[1][own])
    assert predicted.shape == (5, channels, 4, 2)
    colours = predicted * 0.3 + 0.4
    levels = [(number >> 3 * (channels - 1 - channel)) & 7 for channel in range(channels)]
    for channel, level in enumerate(levels):
        torch.testing.assert_close(colours[:, channel], torch.full((5, 4, 2), (level + 0.5) / 8))
    again = mean_colours(
        predicted.repeat_interleave(8, 2).repeat_interleave(8, 3), 8, (0.4,) * channels, (0.3,) * channels
    )
    assert (again == number).all()
