"""mixup and cutmix: Beta's distribution, timm's draws and pixels, and the same mix in every slice of a batch."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats  # type: ignore[import-untyped]
from timm.data.mixup import Mixup, cutmix_bbox_and_lam
from torch import Tensor
from torch.nn.functional import one_hot

from vitlit.data.mixing import Box, Mixing, cutmix, mixup, soft_targets
from vitlit.errors import UserError

HEIGHT, WIDTH = 32, 48


def draws(
    mixing: Mixing, count: int, height: int = HEIGHT, width: int = WIDTH, seed: int = 0
) -> list[float | Box | None]:
    return [mixing.draw(seed, step, height, width) for step in range(count)]


def own_share(drawn: float | Box) -> float:
    """The share of an image that mixing leaves to it."""
    return 1 - drawn.area / (HEIGHT * WIDTH) if isinstance(drawn, Box) else drawn


def batch(size: int = 8, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, HEIGHT, WIDTH, generator=generator)
    return images, torch.randint(classes, (size,), generator=generator)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 3.0])
def test_lambda_is_drawn_from_beta(alpha: float) -> None:
    lams = [lam for lam in draws(Mixing(mixup=alpha), 3000) if isinstance(lam, float)]
    assert len(lams) == 3000
    assert stats.kstest(lams, stats.beta(alpha, alpha).cdf).pvalue > 0.001


def test_the_kinds_are_drawn_as_often_as_asked_and_as_timm_draws_them() -> None:
    ours = draws(Mixing(0.8, 1.0, prob=0.6, switch=0.3), 3000)
    cuts, mixes = ([own_share(m) for m in ours if m is not None and isinstance(m, Box) == cut] for cut in (True, False))
    assert stats.binomtest(len(cuts) + len(mixes), 3000, 0.6).pvalue > 0.001
    assert stats.binomtest(len(cuts), len(cuts) + len(mixes), 0.3).pvalue > 0.001

    np.random.seed(0)
    timms = Mixup(0.8, 1.0, prob=0.6, switch_prob=0.3, label_smoothing=0.0, num_classes=2)
    lams: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(3000):
        images = torch.stack([torch.zeros(1, HEIGHT, WIDTH), torch.ones(1, HEIGHT, WIDTH)])
        images, targets = timms(images, torch.tensor([0, 1]))
        if targets[0, 0] < 1:
            lams[bool(((images == 0) | (images == 1)).all())].append(targets[0, 0].item())
    assert stats.ks_2samp(mixes, lams[False], method="asymp").pvalue > 0.001
    assert stats.ks_2samp([lam for lam in cuts if lam < 1], lams[True], method="asymp").pvalue > 0.001
    assert np.mean(mixes) == pytest.approx(np.mean(lams[False]), abs=0.03)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("shape", [(32, 32), (20, 61), (7, 9)])
def test_boxes_are_distributed_as_timms(alpha: float, shape: tuple[int, int]) -> None:
    ours = [box for box in draws(Mixing(cutmix=alpha), 4000, *shape, seed=1) if isinstance(box, Box)]
    assert len(ours) == 4000
    np.random.seed(1)
    timms = []
    for _ in range(4000):
        (top, bottom, left, right), _ = cutmix_bbox_and_lam((3, *shape), np.random.beta(alpha, alpha))
        timms.append(Box(int(top), int(bottom), int(left), int(right)))
    measures: list[Callable[[Box], int]] = [lambda b, i=i: b[i] for i in range(4)]  # type: ignore[misc]
    for measure in (*measures, lambda b: b.area, lambda b: b.bottom - b.top, lambda b: b.right - b.left):
        assert stats.ks_2samp([measure(b) for b in ours], [measure(b) for b in timms], method="asymp").pvalue > 0.001


def test_cutmix_weighs_by_the_pixels_that_are_left() -> None:
    for box in draws(Mixing(cutmix=1.0), 300):
        assert isinstance(box, Box)
        images = torch.stack([torch.zeros(1, HEIGHT, WIDTH), torch.ones(1, HEIGHT, WIDTH)]).double()
        mixed, targets = cutmix(images, torch.eye(2, dtype=torch.float64), box)
        assert targets[0, 1].item() == pytest.approx(mixed[0].mean().item()) == pytest.approx(1 - own_share(box))
        assert targets[1, 0].item() == pytest.approx(1 - mixed[1].mean().item()) == pytest.approx(1 - own_share(box))


def as_timm_pairs(rows: Tensor) -> Tensor:
    """Rows whose partners are i ^ 1 in an order in which timm's, size - 1 - i, are the same."""
    return torch.cat([rows[0::2], rows[1::2].flip(0)])


@pytest.mark.parametrize("seed", range(12))
def test_pixels_and_targets_are_timms(seed: int) -> None:
    images, labels = batch()
    timms = Mixup(0.8, 1.0, label_smoothing=0.0, num_classes=5)
    # What timm draws for the seed is seen on images that tell: one of zeros, one of ones.
    np.random.seed(seed)
    probe, shares = timms(torch.stack([torch.zeros(1, HEIGHT, WIDTH), torch.ones(1, HEIGHT, WIDTH)]), torch.arange(2))
    lam = shares[0, 0].item()
    inside = probe[0, 0].nonzero()
    targets = soft_targets(labels, 5)
    if bool(((probe == 0) | (probe == 1)).all()):
        (top, left), (bottom, right) = inside.min(0).values.tolist(), (inside.max(0).values + 1).tolist()
        mixed, mixed_targets = cutmix(images, targets, Box(top, bottom, left, right))
    else:
        mixed, mixed_targets = mixup(images, targets, lam)
    np.random.seed(seed)
    expected, expected_targets = timms(as_timm_pairs(images).clone(), as_timm_pairs(labels))
    torch.testing.assert_close(as_timm_pairs(mixed), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(as_timm_pairs(mixed_targets), expected_targets, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mixing", [Mixing(mixup=0.8), Mixing(cutmix=1.0), Mixing(0.8, 1.0, 0.7)])
@pytest.mark.parametrize("slices", [2, 4])
def test_slices_are_mixed_as_the_whole_is(mixing: Mixing, slices: int) -> None:
    images, labels = batch(16)
    targets, kept = soft_targets(labels, 5), images.clone()
    for step in range(10):
        whole = mixing(images, targets, 3, step)
        parts = [mixing(*part, 3, step) for part in zip(images.chunk(slices), targets.chunk(slices), strict=True)]
        assert torch.equal(torch.cat([part[0] for part in parts]), whole[0])
        assert torch.equal(torch.cat([part[1] for part in parts]), whole[1])
    assert torch.equal(images, kept)


def test_lambda_and_one_minus_lambda_give_the_same_set_of_images() -> None:
    images, labels = batch()
    (a, targets_a), (b, targets_b) = (mixup(images, soft_targets(labels, 5), lam) for lam in (0.3, 0.7))
    swapped = torch.arange(8) ^ 1
    torch.testing.assert_close(a, b[swapped])
    torch.testing.assert_close(targets_a, targets_b[swapped])


def test_a_draw_is_a_function_of_seed_and_step() -> None:
    mixing = Mixing(0.8, 1.0, prob=0.9)
    first = draws(mixing, 20)
    np.random.seed(5)
    torch.manual_seed(5)
    assert draws(mixing, 20) == first
    assert len({mix for mix in first if mix}) == 20 - first.count(None)
    assert not {mix for mix in first if mix} & {mix for mix in draws(mixing, 20, seed=1) if mix}


def test_nothing_is_mixed_unless_asked() -> None:
    images, labels = batch()
    targets = soft_targets(labels, 5)
    for mixing in (Mixing(), Mixing(0.8, 1.0, prob=0.0)):
        assert not mixing.on
        assert draws(mixing, 20) == [None] * 20
        assert mixing(images, targets, 0, 0)[0] is images
    assert not any(isinstance(drawn, Box) for drawn in draws(Mixing(mixup=0.8, switch=1.0), 50))
    assert all(isinstance(drawn, Box) for drawn in draws(Mixing(cutmix=0.8, switch=0.0), 50))


def test_labels_become_shares_of_classes() -> None:
    labels = torch.tensor([2, 0, 1, 1])
    assert torch.equal(soft_targets(labels, 4), one_hot(labels, 4).float())
    several = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert soft_targets(several, 3) is several


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"mixup": -0.1}, "mixup is -0.1"),
        ({"cutmix": float("nan")}, "cutmix is nan"),
        ({"cutmix": float("inf")}, "cutmix is inf"),
        ({"prob": 1.1}, "prob is 1.1; give from 0 to 1"),
        ({"switch": -0.5}, "switch is -0.5"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options: dict[str, float], pattern: str) -> None:
    with pytest.raises(UserError, match=pattern):
        Mixing(**options)
