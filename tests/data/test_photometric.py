"""Colours of training images: torchvision's operations, drawn from (seed, epoch, index, repeat, view) alone."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import SMALL, Result, command, done, refused, user_error
from PIL import Image
from test_decoded import stop_in_step_2
from test_views import batches, folder_data, same
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from vitlit.data import views as module
from vitlit.data.views import PRESETS, Photometric, Views, change_colours
from vitlit.model import ViT
from vitlit.objectives import Batch

pytestmark = pytest.mark.usefixtures("undrawn")

KEYS = np.arange(1000, 1064)
ALL: dict[str, Any] = {"jitter": 0.8, "strength": (0.8, 0.8, 0.8, 0.5), "grey": 0.2, "blur": 0.5, "solarise": 0.3}
CHANGED: dict[str, Any] = {
    "photometric": Photometric(**ALL),
    "views": [Views(1, 16, **ALL), Views(2, 9), Views(1, (8, 13), **ALL)],
}


@pytest.fixture(scope="module")
def images(photos: list[Image.Image]) -> Tensor:
    """64 parts of photographs, uint8 (64, 3, 37, 51)."""
    whole = [torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1) for photo in photos]
    places = torch.randint(370, (64, 2), generator=torch.Generator().manual_seed(0)).tolist()
    parts = [whole[i % 2][:, top : top + 37, left : left + 51] for i, (top, left) in enumerate(places)]
    return torch.stack([part if i % 8 else part // 64 * 64 for i, part in enumerate(parts)])  # with flat areas


def changed(images: Tensor, kind: Photometric, view: int = 0, keys: np.ndarray = KEYS) -> Tensor:
    [made] = change_colours([images], [kind], keys) if view == 0 else change_colours([images] * 2, [kind] * 2, keys)[1:]
    return made


def off(one: Tensor, other: Tensor) -> float:
    """The largest difference of pixels as they would be stored, in levels of 255."""
    return (one.round() - other.float()).abs().max().item()


Peer = Callable[[Tensor, float], Tensor]
PEERS: dict[str, tuple[int, tuple[float, float], Peer]] = {
    "brightness": (0, (0.2, 1.8), F.adjust_brightness),
    "contrast": (1, (0.2, 1.8), F.adjust_contrast),
    "saturation": (2, (0.6, 1.4), F.adjust_saturation),
    "hue": (3, (-0.5, 0.5), F.adjust_hue),
    "grey": (2, (0.0, 0.0), lambda image, _: F.rgb_to_grayscale(image, 3)),
    "blur": (4, (0.1, 2.5), lambda image, sigma: F.gaussian_blur(image, 2 * math.ceil(3 * sigma) + 1, [sigma])),
    "solarise": (5, (0.0, 0.0), lambda image, _: F.solarize(image, 128)),
}


@pytest.mark.parametrize("name", PEERS)
def test_a_step_is_torchvisions_within_a_level(name: str, images: Tensor) -> None:
    step, (low, high), peer = PEERS[name]
    numbers = np.linspace(low, high, len(images))
    ours = images.float()
    module.STEPS[step](ours, numbers)
    expected = [peer(image, number) for image, number in zip(images, numbers.tolist(), strict=True)]
    assert off(ours, torch.stack(expected)) <= 1
    if name != "solarise":  # whose threshold is another in floats
        exact = torch.stack([peer(i.double() / 255, n) for i, n in zip(images, numbers.tolist(), strict=True)])
        assert (ours - 255 * exact).abs().max() < (0.7 if name == "contrast" else 1e-3)  # of a rounded mean


def test_the_jitter_is_torchvisions_in_the_drawn_order_before_grey_blur_and_solarise(images: Tensor) -> None:
    kind = Photometric(**ALL, sigma=(0.5, 0.5))
    ours = changed(images, kind)
    functions = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]
    orders = set()
    for image, made, (steps, numbers) in zip(images, ours, kind.draw(KEYS, 0), strict=True):
        expected = image.double() / 255
        orders.add(tuple(steps[:4]))
        for step, number in zip(steps[:4], numbers[:4], strict=True):
            expected = functions[int(step)](expected, float(number)) if step >= 0 else expected
        grey, blurred, solarised = steps[4:] >= 0
        expected = F.rgb_to_grayscale(expected, 3) if grey else expected
        expected = F.gaussian_blur(expected, 5, [0.5]) if blurred else expected
        expected = F.solarize(expected, 0.5) if solarised else expected
        assert (made - 255 * expected).abs().mean() < 0.3
    assert len(orders) > 20


def test_draws_have_the_probabilities_and_ranges_asked_for() -> None:
    keys = np.arange(100_000)
    kind = Photometric(jitter=0.8, grey=0.2, blur=0.5, sigma=(0.1, 2.0), solarise=0.1)
    steps, numbers = kind.draw(keys, 3).transpose(1, 2, 0)
    drawn = (steps >= 0).mean(1)
    chances = np.array([0.8] * 4 + [0.2, 0.5, 0.1])
    assert np.all(np.abs(drawn - chances) < 4 * np.sqrt(chances * (1 - chances) / len(keys)))
    assert np.array_equal(steps[0] >= 0, steps[3] >= 0)  # all four or none
    jittered = steps[:4, steps[0] >= 0]
    _, counts = np.unique(jittered, axis=1, return_counts=True)
    assert len(counts) == 24
    assert np.abs(counts / counts.mean() - 1).max() < 4 / np.sqrt(counts.mean())
    for number, (low, high) in enumerate(((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1))):
        values = numbers[:4][steps[:4] == number]
        assert low <= values.min() < low + 1e-3 < high - 1e-3 < values.max() < high
        for turn in range(4):  # whatever the order
            mean = numbers[turn][steps[turn] == number].mean()
            assert abs(mean - (low + high) / 2) < 0.02 * (high - low)
    sigmas = numbers[5, steps[5] >= 0]
    assert (sigmas.min() >= 0.1, sigmas.max() < 2.0, abs(sigmas.mean() - 1.05) < 0.01) == (True, True, True)
    assert np.all(numbers[4] == 0)  # grey
    correlations = np.corrcoef(np.concatenate([steps[3:] >= 0, kind.draw(keys, 4).transpose(1, 2, 0)[0, 3:] >= 0]))
    assert np.abs(correlations - np.eye(8)).max() < 0.015


@pytest.mark.parametrize("size", [(37, 51), (7, 5)])
def test_an_image_is_the_same_bits_beside_any_others(
    images: Tensor, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    part, kind = images[..., : size[0], : size[1]], Photometric(**ALL)
    whole = changed(part, kind)
    assert all(
        torch.equal(made, changed(part[i : i + 1], kind, keys=KEYS[i : i + 1])[0]) for i, made in enumerate(whole)
    )
    monkeypatch.setattr(module, "CACHED", 3 * size[0] * size[1])
    assert torch.equal(changed(part.contiguous(memory_format=torch.channels_last), kind), whole)


def test_nothing_is_changed_that_is_not_asked_for(images: Tensor) -> None:
    kinds = [Photometric(), Photometric(jitter=0.5, strength=(0, 0, 0, 0.1)), Photometric(solarise=1.0)]
    views = change_colours([images, images, images], kinds, KEYS)
    assert views[0] is images
    same = [torch.equal(made, image.float()) for made, image in zip(views[1], images, strict=True)]
    assert 16 < sum(same) < 48
    assert torch.equal(views[2], torch.stack([F.solarize(image, 128) for image in images]).float())


def test_views_of_other_colours_leave_the_others_as_they_were(few: Path) -> None:
    plain = batches(few, views=[Views(1, 16), Views(2, 9), Views(1, (8, 13))])
    for one, other in zip(plain, batches(few, **CHANGED), strict=True):
        changes = [not torch.equal(a, b) for a, b in zip(one.views, other.views, strict=True)]
        assert changes == [True, True, False, False, True]
        assert one.views[2].stride() == other.views[2].stride()


def rows(parts: list[Batch]) -> list[Tensor]:
    return [torch.cat(views) for views in zip(*(part.views for part in parts), strict=True)]


def test_colours_are_the_same_however_batches_are_dealt(few: Path) -> None:
    options: dict[str, Any] = {**CHANGED, "repeats": 2}
    whole = batches(few, **options)
    assert len(whole) == 5
    for world in (2, 4):
        ranks = [batches(few, rank=rank, world=world, **options) for rank in range(world)]
        for batch, *parts in zip(whole, *ranks, strict=True):
            assert all(map(torch.equal, rows(parts), batch.views))
    halves = batches(few, **options, micro_batch=4)
    for step, batch in enumerate(whole):
        assert all(map(torch.equal, rows(halves[2 * step : 2 * step + 2]), batch.views))
    assert all(map(same, batches(few, num_workers=2, **options), whole))
    assert all(map(same, folder_data(few, cache="memory", num_workers=2, **options).train_dataloader(), whole))
    assert all(map(same, batches(few, step=2, **options)[:3], whole[2:]))
    assert not any(map(same, batches(few, seed=4, **options), whole))
    assert not any(map(same, batches(few, step=5, **options), whole))


def test_images_kept_on_the_device_get_the_same_colours(few: Path) -> None:
    """A crop may be a level off, and the changes of colours move it a little further."""
    options: dict[str, Any] = {"photometric": Photometric(jitter=0.9, grey=0.5, solarise=0.0), "flip": 0.0}
    plain, kept = (folder_data(few, cache=cache, **options).train_dataloader() for cache in ("none", "device"))
    for one, other in zip(plain, kept, strict=True):
        assert torch.equal(one.indices, other.indices)
        assert all((a - b).abs().max() < 6 / 255 for a, b in zip(one.views, other.views, strict=True))


@pytest.mark.parametrize(
    ("size", "patch", "local"),
    [(224, 16, (96, 96)), (224, 14, (98, 98)), (28, 4, (12, 12)), (64, 8, (24, 24)), ((32, 48), 4, (12, 20))],
)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_two_global_and_some_local_views(
    few: Path, preset: Any, size: Any, patch: int, local: Any
) -> None:
    data = folder_data(few, views=preset, image_size=size)
    data.follow(ViT(image_size=size, patch_size=patch, width=16, depth=1, heads=2, mlp_dim=16))
    views = next(iter(data.train_dataloader())).views
    whole = size if isinstance(size, tuple) else (size, size)
    assert [view.shape[2:] for view in views] == [whole] * 2 + [local] * (6 if preset == "lejepa" else 8)
    assert len(next(iter(data.val_dataloader())).views) == 1


def test_presets_are_those_of_their_sources(few: Path) -> None:
    """main_dino.py, ssl_default_config.yaml and augmentations.py of Meta's DINO and DINOv2, the README of LeJEPA."""

    def kinds(name: Any, **options: Any) -> list[tuple[Any, ...]]:
        data = folder_data(few, views=name, image_size=224, **options)
        assert all(
            (k.jitter, k.strength, k.grey, k.sigma) == (0.8, (0.4, 0.4, 0.2, 0.1), 0.2, (0.1, 2)) for k in data.kinds
        )
        return [(kind.pixels, kind.scale, kind.blur, kind.solarise) for kind in data.kinds]

    big, small = (224, 224), (96, 96)
    dino = [(big, (0.4, 1), 1.0, 0), (big, (0.4, 1), 0.1, 0.2), *[(small, (0.05, 0.4), 0.5, 0)] * 8]
    assert kinds("dino") == dino
    assert kinds("dino", local_views=3) == dino[:5]
    assert kinds("dino", local_views=0) == dino[:2]
    v2 = [(*view[:1], (0.32, 1) if view[0] == big else (0.05, 0.32), *view[2:]) for view in dino]
    assert kinds("dinov2") == kinds("dino", crop_scale=(0.32, 1.0)) == v2
    assert kinds("lejepa") == [*[(big, (0.3, 1), 0.5, 0.2)] * 2, *[(small, (0.05, 0.3), 0.5, 0.2)] * 6]


def test_the_blur_of_a_preset_shrinks_with_small_images(few: Path) -> None:
    sigmas = {size: folder_data(few, views="dino", image_size=size).kinds[0].sigma for size in (8, 56, 112, 448)}
    assert sigmas == {8: (0.1, 0.1), 56: (0.1, 0.5), 112: (0.1, 1.0), 448: (0.1, 2.0)}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: Photometric(jitter=1.5), r"data\.photometric\.jitter 1\.5 is not between 0 and 1"),
        (lambda: Photometric(strength=(0.4, 0.4, 0.2, -0.1)), r"data\.photometric\.strength .* is not between"),
        (lambda: Photometric(sigma=(0.0, 2.0)), r"data\.photometric\.sigma \[0\.0, 2\.0\] is not a range above 0"),
        (lambda: Views(1, 16, solarise=-1.0), r"data\.views: solarise -1\.0 is not between"),
        (lambda: folder_data(Path(), views="swav"), r"data\.views is 'swav'"),
        (lambda: folder_data(Path(), views=None, local_views=4), r"data\.local_views is for data\.views dino, dinov2"),
        (lambda: folder_data(Path(), views="dino", local_views=-1), r"data: local_views is -1"),
        (lambda: folder_data(Path(), views="dino", photometric=Photometric(blur=1.0)), r"leave data\.photometric out"),
    ],
)
def test_colours_that_cannot_be_are_refused(wrong: Callable[[], object], words: str) -> None:
    user_error(words, wrong)


def losses(folder: Path) -> list[list[str]]:
    rows = csv.DictReader((folder / "runs" / "pretrain" / "metrics.csv").open())
    return [[row[name] for name in ("step", "train/loss", "val/loss")] for row in rows]


LEJEPA = ("--data.views", "lejepa", "--data.local_views", "2", "--model.objective", "LeJEPA")
SMALL_LEJEPA = (*SMALL, *LEJEPA, "--model.objective.hidden_dim", "32")


def test_a_run_with_a_preset_continues_bit_for_bit_whatever_loads_it(few: Path, tmp_path: Path) -> None:
    flags = ("fit", *SMALL_LEJEPA, "--data.root", few)
    for name, workers, before in (("whole", "0", int), ("stopped", "2", stop_in_step_2)):
        (tmp_path / name).mkdir()
        code = command(*flags, "--data.num_workers", workers, cwd=tmp_path / name, before=before).code
        assert code == (143 if before is stop_in_step_2 else 0)
    done(command(*flags, cwd=tmp_path / "stopped"))
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_a_config_and_the_help_have_presets(few: Path, vitlit: Callable[..., Result]) -> None:
    printed = yaml.safe_load(done(vitlit("fit", *SMALL_LEJEPA, "--data.root", few, "--print_config")))["data"]
    assert (printed["views"], printed["local_views"], printed["photometric"]["jitter"]) == ("lejepa", 2, 0.0)
    flags = ("--data.views", "[{count: 1, size: 16, blur: 0.5}]", "--data.photometric.blur", "1", "--print_config")
    printed = yaml.safe_load(done(vitlit("fit", *SMALL, "--data.root", few, *flags)))["data"]
    assert (printed["views"][0]["blur"], printed["photometric"]["blur"]) == (0.5, 1.0)
    result = vitlit("fit", *SMALL, "--data.root", few, "--data.views", "swav")
    refused(result, "data.views: expected Sequence or 'dino' or 'dinov2' or 'lejepa', not swav\n")
    text = " ".join(done(vitlit("fit", "--help")).split())
    assert all(f"'{preset}'" in text for preset in PRESETS)
