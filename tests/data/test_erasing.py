"""Random erasing: timm's distributions, and every row's draw its own."""

import math
import random

import pytest
import torch
from scipy import stats  # type: ignore[import-untyped]
from timm.data.random_erasing import RandomErasing

from vitlit.data.erasing import Erasing, boxes, erase
from vitlit.data.mixing import Box
from vitlit.errors import UserError


def timms(count: int, height: int, width: int, erasing: Erasing) -> list[Box | None]:
    """What timm erases of so many images."""
    random.seed(0)
    images = torch.ones(count, 1, height, width)
    RandomErasing(erasing.prob, *erasing.area, erasing.aspect, mode="const", device="cpu")(images)
    found: list[Box | None] = []
    for image in images:
        erased = (image[0] == 0).nonzero()
        if len(erased):
            (top, left), (bottom, right) = erased.min(0).values.tolist(), (erased.max(0).values + 1).tolist()
            found.append(Box(top, bottom, left, right))
        else:
            found.append(None)
    return found


@pytest.mark.parametrize(
    ("erasing", "shape"),
    [
        (Erasing(0.25), (64, 64)),
        (Erasing(1.0), (40, 90)),
        (Erasing(0.7, (0.1, 0.6), 0.5), (48, 48)),
        (Erasing(1.0, (0.8, 1.0), 0.1), (32, 32)),  # 10 attempts often fail
    ],
)
def test_boxes_are_distributed_as_timms(erasing: Erasing, shape: tuple[int, int]) -> None:
    count = 3000
    drawn = [boxes(erasing, 0, step, range(100), *shape) for step in range(count // 100)]
    ours = [box for step in drawn for box in step if box]
    theirs = [box for box in timms(count, *shape, erasing) if box]
    table = [[len(ours), count - len(ours)], [len(theirs), count - len(theirs)]]
    assert table[0] == table[1] or stats.chi2_contingency(table).pvalue > 0.001
    for measure in (
        lambda box: box.area,
        lambda box: (box.bottom - box.top) / (box.right - box.left),
        *(lambda box, side=side: box[side] for side in range(4)),
    ):
        assert (
            stats.ks_2samp([measure(box) for box in ours], [measure(box) for box in theirs], method="asymp").pvalue
            > 0.001
        )


def test_areas_aspects_and_probability_are_those_asked_for() -> None:
    erasing, side = Erasing(0.4, (0.02, 0.1), 0.3), 500  # so large that rounding and the border do not tell
    drawn = boxes(erasing, 0, 0, range(4000), side, side)
    found = [box for box in drawn if box]
    assert stats.binomtest(len(found), 4000, 0.4).pvalue > 0.001
    assert stats.kstest([box.area / side**2 for box in found], stats.uniform(0.02, 0.08).cdf).pvalue > 0.001
    aspects = [math.log((box.bottom - box.top) / (box.right - box.left)) for box in found]
    assert stats.kstest(aspects, stats.uniform(math.log(0.3), -2 * math.log(0.3)).cdf).pvalue > 0.001
    assert all(0 <= b.top < b.bottom <= side and 0 <= b.left < b.right <= side for b in found)


@pytest.mark.parametrize("fill", ["noise", "mean"])
@pytest.mark.parametrize("slices", [2, 4, 8])
def test_slices_are_erased_as_the_whole_is(fill: str, slices: int) -> None:
    erasing = Erasing(0.7, fill=fill)  # type: ignore[arg-type]
    images = torch.randn(8, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    for step in range(5):
        whole = erase(images.clone(), erasing, 3, step, range(8))
        share = 8 // slices
        for first in range(0, 8, share):
            rows = range(first, first + share)
            assert torch.equal(erase(images[first : first + share].clone(), erasing, 3, step, rows), whole[rows])
        picked = [5, 0, 6]
        assert torch.equal(erase(images[picked], erasing, 3, step, picked), whole[picked])


def test_draws_are_a_function_of_seed_step_and_row_alone() -> None:
    erasing = Erasing(1.0)
    first = erase(torch.zeros(4, 3, 32, 32), erasing, 1, 2, range(4))
    random.seed(7)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert torch.equal(erase(torch.zeros(4, 3, 32, 32), erasing, 1, 2, range(4)), first)
    assert torch.equal(torch.get_rng_state(), state)
    drawn = [box for s in range(4) for t in range(4) for box in boxes(erasing, s, t, range(4), 224, 224)]
    assert len(set(drawn)) == 64


def test_noise_is_standard_normal_and_lies_in_the_box_alone() -> None:
    erasing = Erasing(0.6, (0.1, 0.4))
    images = erase(torch.full((400, 3, 32, 32), 9.0), erasing, 0, 0, range(400))
    noise = []
    for image, box in zip(images, boxes(erasing, 0, 0, range(400), 32, 32), strict=True):
        outside = torch.ones(32, 32, dtype=torch.bool)
        if box:
            outside[box.slices] = False
            noise.append(image[:, *box.slices].flatten())
        assert bool((image[:, outside] == 9).all())
    values = torch.cat(noise).numpy()
    assert len(values) > 100_000
    assert stats.kstest(values, stats.norm.cdf).pvalue > 0.001
    assert values.mean() == pytest.approx(0, abs=0.01)
    assert values.std() == pytest.approx(1, abs=0.01)
    assert len({float(part[0]) for part in noise}) == len(noise)  # each row has its own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_happens_in_place_in_any_precision_and_layout(dtype: torch.dtype) -> None:
    images = torch.ones(4, 3, 16, 16, dtype=dtype)
    last = images.clone(memory_format=torch.channels_last)
    assert erase(images, Erasing(1.0), 0, 0, range(4)) is images
    assert (images != 1).any(dim=(1, 2, 3)).all()
    assert torch.equal(erase(last, Erasing(1.0), 0, 0, range(4)), images)


def test_the_mean_is_zero_and_nothing_is_erased_unless_asked() -> None:
    images = erase(torch.ones(20, 3, 16, 16), Erasing(1.0, fill="mean"), 0, 0, range(20))
    areas = [box.area for box in boxes(Erasing(1.0), 0, 0, range(20), 16, 16) if box]
    assert (images == 0).sum() == 3 * sum(areas) > 0
    assert boxes(Erasing(), 0, 0, range(50), 16, 16) == [None] * 50
    assert torch.equal(erase(torch.ones(4, 3, 8, 8), Erasing(), 0, 0, range(4)), torch.ones(4, 3, 8, 8))


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"prob": 1.5}, "prob is 1.5; give from 0 to 1"),
        ({"area": (0.5, 0.1)}, r"area \[0.5, 0.1\] must rise"),
        ({"area": (0.0, 0.1)}, "must rise within"),
        ({"area": (0.1, 1.1)}, "must rise within"),
        ({"aspect": 0.0}, "aspect is 0.0"),
        ({"aspect": 3.0}, "aspect is 3.0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options: dict[str, object], pattern: str) -> None:
    with pytest.raises(UserError, match=pattern):
        Erasing(**options)  # type: ignore[arg-type]
