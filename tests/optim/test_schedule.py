"""Learning rates against computed values."""

import math
from typing import Any

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch.nn import Parameter
from torch.optim import SGD

from vitlit.errors import UserError
from vitlit.optim import Schedule

# 90 epochs of ImageNet at batch 1024, peak 1e-3, 10,000 steps of warm-up (big_vision's vit_s16_i1k).
RATES = {0: 0.0, 1: 1.0e-7, 5_000: 5.0e-4, 10_000: 1.0e-3, 20_000: 9.767e-4, 56_301: 5.763e-4, 100_000: 3.677e-5}


@pytest.mark.parametrize(("step", "rate"), [*RATES.items(), (112_603, 0.0)])
def test_cosine_rates_of_big_visions_90_epochs(step: int, rate: float) -> None:
    computed = 1e-3 * Schedule(warmup=10_000, decay="cosine").over(112_603)(step)
    assert float(f"{computed:.3e}") == pytest.approx(rate, rel=1e-9, abs=1e-18)


def test_linear_rates_rise_to_the_peak_and_fall_to_zero() -> None:
    factor = Schedule(warmup=4, decay="linear").over(12)
    rates = [factor(step) for step in range(13)]
    assert rates == pytest.approx([0, 0.25, 0.5, 0.75, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0])


@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_rates_stay_between_zero_and_the_peak_which_ends_the_warm_up(warmup: int, decay: Any) -> None:
    factor = Schedule(warmup, decay).over(20)
    rates = [factor(step) for step in range(25)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert rates[warmup] == max(rates) == 1
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[20:] == [0.0] * 5


def test_reciprocal_square_root_is_big_visions() -> None:
    # utils.py: lr / sqrt(1 + (step - warmup) / timescale), times min(1, (total - step) / cooldown)
    factor = Schedule(10, "rsqrt", cooldown=20, timescale=30).over(200)
    assert factor(5) == 0.5
    assert factor(10) == 1
    assert factor(40) == pytest.approx(1 / math.sqrt(2))
    assert factor(100) == pytest.approx(0.5)
    assert factor(190) == pytest.approx(0.5 / math.sqrt(7))
    assert factor(200) == 0


def test_a_constant_rate_stays_until_its_cool_down() -> None:
    factor = Schedule(2, "constant", cooldown=4).over(12)
    assert [factor(step) for step in range(13)] == [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    assert Schedule(decay="constant").over(5)(100) == 1


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_a_final_rate_above_zero_is_reached_at_the_end(decay: Any) -> None:
    factor = Schedule(5, decay, final=0.01).over(100)
    assert factor(5) == pytest.approx(1)
    assert factor(99) > factor(100) == pytest.approx(0.01)  # the last step is 99
    assert factor(30) > Schedule(5, decay).over(100)(30)


def deits(epochs: int, peak: float, lowest: float = 1e-5) -> list[float]:
    """The learning rate of each epoch in facebookresearch/deit, main.py, by timm's scheduler."""
    optimizer = SGD([Parameter(torch.zeros(1))], lr=peak)
    scheduler = CosineLRScheduler(optimizer, epochs, lowest, warmup_t=5, warmup_lr_init=1e-6)
    rates = []
    for epoch in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch)
    return rates


@pytest.mark.parametrize(("epochs", "peak"), [(300, 1e-3), (800, 4e-3), (20, 1e-5)])
def test_the_rates_of_epochs_are_deits(epochs: int, peak: float) -> None:
    schedule = Schedule("5 epochs", final=1e-5 / peak, start=1e-6 / peak, interval="epoch")
    factor, expected = schedule.over(7 * epochs, epoch=7), deits(epochs, peak)
    assert [peak * factor(7 * i) for i in range(epochs)] == pytest.approx(expected, rel=1e-9)
    assert all(factor(7 * i) == factor(7 * i + 6) for i in range(epochs))


def test_the_first_rates_of_deit_b() -> None:
    factor = Schedule("5 epochs", final=0.01, start=0.001, interval="epoch").over(375_300, epoch=1251)
    first = [1e-3 * factor(1251 * epoch) for epoch in range(7)]
    assert first == pytest.approx([1e-6, 1e-6, 2.008e-4, 4.006e-4, 6.004e-4, 8.002e-4, 9.993e-4], rel=1e-4)


def test_a_warm_up_may_begin_above_zero() -> None:
    factor = Schedule(4, "linear", start=0.2).over(8)
    assert [factor(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 0.75])


def test_rates_of_epochs_need_a_known_epoch() -> None:
    with pytest.raises(UserError, match=r"interval epoch: the steps of an epoch are not known here; give step"):
        Schedule(interval="epoch").over(100)


@pytest.mark.parametrize(("warmup", "steps"), [(30, 30), ("30", 30), ("5 epochs", 50), ("1 epoch", 10), ("10%", 40)])
def test_lengths_are_steps_epochs_or_shares(warmup: int | str, steps: int) -> None:
    factor = Schedule(warmup).over(400, epoch=10)
    assert factor(steps - 1) < 1
    assert factor(steps) == 1
    assert factor(steps + 1) < 1


@pytest.mark.parametrize("warmup", [-1, "five", "-3 epochs", "5 apples", "0.5", "nan%", "inf", "inf%"])
def test_what_is_no_length_is_refused(warmup: int | str) -> None:
    with pytest.raises(UserError, match=r"model\.schedule\.warmup .* is not a number of steps, nor text such as"):
        Schedule(warmup)


def test_epochs_need_a_known_epoch() -> None:
    with pytest.raises(UserError, match="the steps of an epoch are not known here"):
        Schedule("2 epochs").over(100)


@pytest.mark.parametrize("total", [10, 3])
def test_a_warm_up_that_outlasts_the_training_is_refused_with_both_numbers(total: int) -> None:
    with pytest.raises(UserError, match=rf"warmup is 10 steps but training has only {total}; give less, or more"):
        Schedule(warmup=10).over(total)
    Schedule(warmup=10).over(11)


def test_a_cool_down_that_begins_before_the_warm_up_ends_is_refused() -> None:
    with pytest.raises(UserError, match="warmup and cooldown are 6 and 5 of only 10 steps"):
        Schedule(6, "constant", cooldown=5).over(10)


@pytest.mark.parametrize(
    "wrong",
    [
        {"final": 2.0},
        {"timescale": 0},
        {"lr_per": 0},
        {"final": 0.1, "decay": "constant"},
        {"cooldown": 5},
        {"timescale": 9},
        {"start": 1.5, "warmup": 5},
        {"start": 0.1},
        {"interval": "day"},
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"model\.schedule"):
        Schedule(**wrong)
