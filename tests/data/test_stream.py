"""The order of samples: published hash values, permutations, and one global batch on any number of devices."""

from collections import Counter

import numpy as np
import pytest
import torch

from vitlit.data.stream import EvalShare, Sample, TrainStream, eval_batch, order, split_batch
from vitlit.errors import UserError
from vitlit.seeds import mix, mix_one, seed_step, seeded_sample

GAMMA = 0x9E3779B97F4A7C15
WORD = 2**64


def splitmix64(state: int) -> int:
    """The reference in Python's integers (Steele, Lea and Flood 2014; Vigna's splitmix64.c)."""
    z = (state + GAMMA) % WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def reference_mix(*values: int) -> int:
    mixed = 0
    for value in values:
        mixed = splitmix64(mixed ^ (value % WORD))
    return mixed


def stream(
    length: int,
    batch_size: int,
    position: int = 0,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 3,
    repeats: int = 1,
    labels: np.ndarray | None = None,
) -> list[Sample]:
    return list(TrainStream(length, batch_size, seed, lambda: position, rank, world_size, repeats, labels))


def test_mix_of_one_number_is_splitmix64s_published_output() -> None:
    assert int(mix(0)[0]) == 0xE220A8397B1DCDAF
    # The first four outputs for the seed 1234567, whose state grows by the golden gamma (Rosetta Code).
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [int(mix((1234567 + i * GAMMA) % WORD)[0]) for i in range(4)] == published


@pytest.mark.parametrize("values", [(0, 0, 0), (1, 2, 3), (3, 2, 1), (0, 2**63, 7, 2**64 - 1), (-1, 5)])
def test_mix_of_several_numbers_is_the_same_in_pythons_integers(values: tuple[int, ...]) -> None:
    assert int(mix(*values)[0]) == mix_one(*values) == reference_mix(*values)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, np.uint64])
def test_mix_broadcasts_over_arrays_of_any_integer_type(kind: type) -> None:
    mixed = mix(7, np.arange(5, dtype=kind), 2)
    assert mixed.dtype == np.uint64
    assert mixed.tolist() == [reference_mix(7, i, 2) for i in range(5)]


def test_the_order_of_a_release_is_that_of_the_next() -> None:
    # A run that is continued with another version must see the same samples: these constants may never change.
    assert order(0, 0, 10).tolist() == [0, 1, 9, 4, 2, 3, 6, 8, 7, 5]
    assert order(0, 1, 10).tolist() == [2, 1, 9, 5, 6, 3, 4, 8, 0, 7]
    assert order(1, 0, 10).tolist() == [1, 6, 5, 4, 8, 3, 7, 9, 2, 0]
    assert order(42, 7, 1_281_167)[:3].tolist() == [521897, 878162, 422210]


@pytest.mark.parametrize("length", [1, 2, 97, 1000])
def test_order_is_a_permutation_that_differs_by_epoch_and_seed(length: int) -> None:
    orders = [order(seed, epoch, length) for seed in range(3) for epoch in range(3)]
    for permutation in orders:
        assert np.array_equal(np.sort(permutation), np.arange(length))
    if length > 2:
        assert len({tuple(permutation) for permutation in orders}) == len(orders)


def test_every_sample_is_as_likely_to_come_first_and_every_pair_to_be_neighbours() -> None:
    orders = np.array([order(0, epoch, 10) for epoch in range(2000)])
    for position in (0, 9):
        counts = np.bincount(orders[:, position], minlength=10)
        assert ((counts - 200) ** 2 / 200).sum() < 27.88  # chi-square, 9 degrees of freedom, p = 0.001
    pairs = np.bincount(orders[:, 0] * 10 + orders[:, 1], minlength=100).reshape(10, 10)
    off_diagonal = pairs[~np.eye(10, dtype=bool)]
    assert ((off_diagonal - 2000 / 90) ** 2 / (2000 / 90)).sum() < 135.98  # 89 degrees of freedom, p = 0.001


def test_the_orders_of_neighbouring_epochs_and_seeds_are_uncorrelated() -> None:
    base = order(0, 0, 5000)
    for other in (order(0, 1, 5000), order(1, 0, 5000), order(1, 1, 5000)):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.05


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_steps_global_batch_is_one_slice_of_the_order_on_any_number_of_devices(world_size: int) -> None:
    length, batch_size = 43, 8
    share = batch_size // world_size
    ranks = [stream(length, batch_size, 0, rank, world_size) for rank in range(world_size)]
    for step in range(length // batch_size):
        together = [sample for rank in ranks for sample in rank[step * share : (step + 1) * share]]
        expected = order(3, 0, length)[step * batch_size : (step + 1) * batch_size]
        assert together == [(0, int(index), 0, step * batch_size + row) for row, index in enumerate(expected)]


def test_a_micro_batch_is_a_slice_of_its_steps_batch() -> None:
    # The loader cuts a rank's stream into micro-batches in order: no window may reach into the next step's batch.
    micro, accumulate = split_batch(12, 4, 1)
    samples = stream(30, 12)
    windows = [samples[i : i + micro * accumulate] for i in range(0, len(samples), micro * accumulate)]
    assert [len(window) for window in windows] == [12, 12]
    assert [[s.index for s in window] for window in windows] == order(3, 0, 30)[:24].reshape(2, 12).tolist()
    assert [[s.position for s in window] for window in windows] == [list(range(12)), list(range(12, 24))]


def test_only_whole_batches_are_dealt_and_no_sample_twice_in_an_epoch() -> None:
    loader = TrainStream(43, 8, 3, lambda: 0)
    samples = list(loader)
    assert len(samples) == len(loader) == 40
    assert len({sample.index for sample in samples}) == 40
    assert len(TrainStream(43, 8, 3, lambda: 0, 1, 2)) == 20


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("position", [0, 1, 4, 5, 7, 12])
@pytest.mark.parametrize(("repeats", "balanced"), [(1, False), (3, False), (1, True), (3, True)])
def test_entering_at_a_step_is_entering_the_endless_stream_there(
    position: int, world_size: int, repeats: int, balanced: bool
) -> None:
    length, batch_size, steps = 43, 8, 5
    labels = np.arange(43) ** 2 % 5 if balanced else None
    for rank in range(world_size):
        share = batch_size // world_size

        def enter(step: int, rank: int = rank) -> list[Sample]:
            return stream(length, batch_size, step, rank, world_size, repeats=repeats, labels=labels)

        endless = [sample for epoch in range(5) for sample in enter(epoch * steps)]
        entered = enter(position)
        assert entered == endless[position * share : (position + steps) * share]
        assert entered[0].epoch == position // steps
        assert entered[0].position == position * batch_size + rank * share


# (length, batch, repeats), among them batches that repeats do not divide, odd ones, and the smallest.
REPEATED = [
    (43, 8, 3),
    (100, 12, 3),
    (40, 6, 3),
    (61, 7, 3),
    (64, 16, 2),
    (50, 4, 2),
    (31, 9, 4),
    (90, 30, 7),
    (8, 8, 4),
]


@pytest.mark.parametrize(("length", "batch_size", "repeats"), REPEATED)
def test_repeats_of_an_image_share_a_batch_and_are_never_partners(length: int, batch_size: int, repeats: int) -> None:
    steps = length // batch_size
    for epoch in range(3):
        samples = stream(length, batch_size, epoch * steps, repeats=repeats)
        batches = [samples[step * batch_size : (step + 1) * batch_size] for step in range(steps)]
        assert len(samples) == steps * batch_size  # an epoch is as long as ever
        assert [sample.position for sample in samples] == list(
            range(epoch * steps * batch_size, (epoch + 1) * len(samples))
        )

        for batch in batches:
            for row, sample in enumerate(batch):
                assert row ^ 1 >= batch_size or sample.index != batch[row ^ 1].index

        copies: dict[int, list[int]] = {}
        for sample in samples:
            copies.setdefault(sample.index, []).append(sample.repeat)
        assert set(copies) == set(order(3, epoch, length)[: -(-len(samples) // repeats)].tolist())
        assert sum(sorted(numbers) != list(range(repeats)) for numbers in copies.values()) <= 1  # the epoch's last
        assert all(len(set(numbers)) == len(numbers) and max(numbers) < repeats for numbers in copies.values())

        seen = [{sample.index for sample in batch} for batch in batches]
        for step, images in enumerate(seen):
            assert all(len(images & later) <= (gap == 0) for gap, later in enumerate(seen[step + 1 :]))


@pytest.mark.parametrize("repeats", range(2, 7))
def test_a_batch_of_any_size_from_twice_the_repeats_on_is_paired(repeats: int) -> None:
    for batch_size in range(2 * repeats, 6 * repeats):
        for length in (batch_size, 7 * batch_size + 3):  # batches that begin at any copy of an image
            indices = np.array([sample.index for sample in stream(length, batch_size, repeats=repeats)])
            pairs = indices.reshape(-1, batch_size)[:, : batch_size // 2 * 2].reshape(-1, 2)
            assert (pairs[:, 0] != pairs[:, 1]).all()
    with pytest.raises(UserError, match=f"give at least {2 * repeats}, or fewer"):
        stream(100, 2 * repeats - 1, repeats=repeats)


def test_repeats_of_an_image_have_different_partners() -> None:
    samples = stream(300, 60, repeats=3)
    partners: dict[int, set[int]] = {}
    for row, sample in enumerate(samples):
        partners.setdefault(sample.index, set()).add(samples[row ^ 1].index)
    assert all(len(met) == 3 for met in partners.values())


def labels_of(*sizes: int) -> np.ndarray:
    """Class numbers of so many images each, mingled."""
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))


@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize(
    ("sizes", "batch_size"),
    [((50, 5, 1), 8), ((10, 10, 10), 6), ((90, 7), 12), ((3, 0, 40, 2), 9), ((200,), 16), ((1,) * 20, 20)],
)
def test_every_class_is_drawn_equally_often(sizes: tuple[int, ...], batch_size: int, repeats: int) -> None:
    labels = labels_of(*sizes)
    steps = len(labels) // batch_size
    total: Counter[int] = Counter()
    for epoch in range(12):
        samples = stream(len(labels), batch_size, epoch * steps, repeats=repeats, labels=labels)
        assert len(samples) == steps * batch_size
        counts = Counter(int(labels[sample.index]) for sample in samples)
        assert set(counts) <= {label for label, size in enumerate(sizes) if size}
        every = [counts[label] for label, size in enumerate(sizes) if size]
        assert max(every) - min(every) <= (1 if repeats == 1 else 2 * repeats - 1)  # a draw, and one that is cut off
        total += counts
        # An image's augmentations differ, and each comes after those before it.
        assert len({(sample.index, sample.repeat) for sample in samples}) == len(samples)
        if repeats > 1:
            continue
        drawn: Counter[int] = Counter()
        for sample in samples:
            assert sample.repeat == drawn[sample.index]
            drawn[sample.index] += 1
            others = [drawn[index] for index in np.flatnonzero(labels == labels[sample.index]).tolist()]
            assert max(others) - min(others) <= 1  # every image of the class before any again
    if repeats == 1:
        assert max(total.values()) - min(total.values()) <= 1  # the odd draw goes round


@pytest.mark.parametrize(("repeats", "balanced"), [(3, False), (1, True), (2, True)])
@pytest.mark.parametrize("world_size", [2, 4])
def test_repeats_and_balance_are_the_same_batches_on_any_number_of_devices(
    repeats: int, balanced: bool, world_size: int
) -> None:
    labels = labels_of(30, 10, 3) if balanced else None
    share = 8 // world_size
    whole = stream(43, 8, repeats=repeats, labels=labels)
    ranks = [stream(43, 8, 0, rank, world_size, repeats=repeats, labels=labels) for rank in range(world_size)]
    together = [s for step in range(5) for rank in ranks for s in rank[step * share : (step + 1) * share]]
    assert together == whole


def test_a_balanced_order_is_drawn_anew_by_epoch_and_seed_and_evenly() -> None:
    labels = labels_of(40, 4)
    first = stream(44, 4, labels=labels)
    assert stream(44, 4, labels=labels) == first
    for other in (stream(44, 4, 11, labels=labels), stream(44, 4, seed=4, labels=labels)):
        assert [s.index for s in other] != [s.index for s in first]
    counts: Counter[int] = Counter()
    for epoch in range(400):
        counts.update(s.index for s in stream(44, 4, 11 * epoch, labels=labels))
    large = np.array(
        [counts[i] for i in np.flatnonzero(labels == 0).tolist()]
    )  # 22 of 40 in an epoch, without replacement
    assert large.sum() == 400 * 22
    assert ((large - 220) ** 2 / (220 * 18 / 40)).sum() < 72.1  # chi-square, 39 degrees of freedom, p = 0.001
    assert {counts[i] for i in np.flatnonzero(labels == 1).tolist()} <= set(range(2100, 2301))


def test_the_position_is_asked_for_at_every_epochs_start() -> None:
    done = 0
    loader = TrainStream(20, 5, 0, lambda: done)
    first = list(loader)
    done = 4
    assert list(loader) != first
    assert {sample.epoch for sample in loader} == {1}


@pytest.mark.parametrize("length", [1, 7, 8, 11, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_sees_every_image_once_on_any_number_of_devices(length: int, world_size: int) -> None:
    shares = [EvalShare(length, rank, world_size) for rank in range(world_size)]
    assert sorted(index for share in shares for index in share) == list(range(length))
    assert [len(share) for share in shares] == [len(list(share)) for share in shares]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_every_device_evaluates_equally_many_batches(world_size: int) -> None:
    for length in range(world_size, 40):
        shards = [EvalShare(length, rank, world_size) for rank in range(world_size)]
        for wanted in range(1, length + 1):
            batch = eval_batch(length, world_size, wanted)
            assert len({-(-len(shard) // batch) for shard in shards}) == 1
            assert world_size > 1 or batch == wanted
    assert [eval_batch(11, 2, wanted) for wanted in (1, 4, 5, 6)] == [2, 4, 4, 6]


@pytest.mark.parametrize(
    ("batch_size", "micro_batch", "world_size", "expected"),
    [
        (256, None, 1, (256, 1)),
        (256, None, 4, (64, 1)),
        (256, 32, 4, (32, 2)),
        (256, 64, 4, (64, 1)),
        (256, 1000, 4, (64, 1)),
        (256, 100, 2, (64, 2)),  # the micro-batch is a bound, not a size
        (30, 7, 2, (5, 3)),
        (6, 1, 2, (1, 3)),
    ],
)
def test_a_batch_is_split_into_equal_parts_within_the_bound(
    batch_size: int, micro_batch: int | None, world_size: int, expected: tuple[int, int]
) -> None:
    micro, accumulate = split_batch(batch_size, micro_batch, world_size)
    assert (micro, accumulate) == expected
    assert micro * accumulate * world_size == batch_size


@pytest.mark.parametrize(
    ("batch_size", "micro_batch", "world_size"),
    [(64, None, 3), (64, 24, 1), (1, None, 4), (7, 2, 1), (10, 3, 2), (10, 3, 1), (33, 8, 1)],
)
def test_a_batch_that_does_not_divide_is_refused_with_the_next_that_does(
    batch_size: int, micro_batch: int | None, world_size: int
) -> None:
    with pytest.raises(UserError, match=rf"data\.batch_size {batch_size} .* the next that does is \d+") as caught:
        split_batch(batch_size, micro_batch, world_size)
    fitting = []
    for size in range(1, 200):
        try:
            split_batch(size, micro_batch, world_size)
            fitting.append(size)
        except UserError:
            pass
    assert int(str(caught.value).rsplit(" ", 1)[-1]) == min(size for size in fitting if size > batch_size)


def test_draws_are_a_function_of_seed_epoch_index_and_repeat() -> None:
    def draw(seed: int, epoch: int, index: int, repeat: int) -> float:
        with seeded_sample(seed, epoch, index, repeat):
            return torch.rand(()).item()

    torch.manual_seed(0)
    first = draw(1, 2, 3, 0)
    torch.manual_seed(99)
    expected = torch.rand(2)
    torch.manual_seed(99)
    assert draw(1, 2, 3, 0) == first
    assert torch.equal(torch.rand(2), expected)  # the generator is left as it was
    assert len({draw(s, e, i, r) for s in range(3) for e in range(3) for i in range(3) for r in range(3)}) == 81


def test_draws_of_the_model_are_a_function_of_step_micro_batch_and_rank_and_not_those_of_a_sample() -> None:
    def draw(seed: int, step: int, micro: int, rank: int) -> float:
        seed_step(seed, step, micro, rank)
        return torch.rand(()).item()

    assert draw(0, 5, 0, 1) == draw(0, 5, 0, 1)
    drawn = {draw(0, step, micro, rank) for step in range(3) for micro in range(3) for rank in range(3)}
    assert len(drawn) == 27
    for index in range(3):
        with seeded_sample(0, 0, index, 0):
            assert torch.rand(()).item() not in drawn
