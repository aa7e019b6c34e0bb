"""DINO, iBOT, KoLeo and Sinkhorn against the papers' equations in float64 numpy, and what masks and teachers are."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomized, user_error
from torch import Tensor

from vitlit.model import ViT
from vitlit.objectives import DINO, Batch
from vitlit.objectives.dino import block_masks, koleo, masked_views, sinkhorn

TINY: dict[str, Any] = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 2, "heads": 2, "mlp_dim": 32}
HEAD: dict[str, Any] = {"prototypes": 12, "hidden_dim": 10, "bottleneck": 6}
IMAGES = 5


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def made(options: dict[str, Any] | None = None, **of_dino: Any) -> tuple[ViT, DINO]:
    """A student and another teacher, in float64."""
    vit = ViT(**TINY, **(options or {}))
    dino = DINO(vit, **{**HEAD, **of_dino})
    for part in (vit, dino):
        randomized(part, 0.3)
    return vit.double().train(), dino.double().train()


def batch_of(*sizes: int, first: int = 7) -> Batch:
    numbers = torch.arange(first, first + IMAGES)
    views = [torch.randn(IMAGES, 3, size, size, dtype=torch.float64) for size in sizes]
    return Batch(views, torch.full((IMAGES,), -1), numbers, numbers)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def as_numpy(x: Tensor) -> np.ndarray:
    return np.asarray(x.detach())


def cross_entropy(targets: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    return -(targets * np.log(softmax(outputs / 0.1))).sum(-1)


def assigned(outputs: np.ndarray, temperature: float) -> np.ndarray:
    """SwAV's listing: of a matrix of prototypes x samples, rows to 1 / K and columns to 1 / B, three times."""
    q = np.exp(outputs.T / temperature)
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdims=True) * len(q)
        q /= q.sum(0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T


@pytest.mark.parametrize("centring", ["mean", "sinkhorn"])
@pytest.mark.parametrize("sizes", [(16, 16), (16, 16, 8, 8, 8), (16, 8, 16, 8)])
def test_the_loss_is_dinos(centring: str, sizes: tuple[int, ...]) -> None:
    vit, dino = made(centring=centring)
    batch, temperature = batch_of(*sizes), 0.04 + 0.03 * 0.15 / 0.3
    centre = as_numpy(dino.centres[0].copy_(torch.randn(12) / 10)).copy()
    step = dino(vit, batch, 0.15)
    student, teacher = (
        {v: as_numpy(head(net.pool(net.features(view)))) for v, view in enumerate(batch.views)}
        for net, head in ((vit, dino.heads[0]), (dino.teacher_vit, dino.teacher_heads[0]))
    )
    seen = [v for v, size in enumerate(sizes) if size == 16]
    outputs = np.concatenate([teacher[v] for v in seen])
    shares = softmax((outputs - centre) / temperature) if centring == "mean" else assigned(outputs, temperature)
    targets = dict(zip(seen, shares.reshape(len(seen), IMAGES, -1), strict=True))
    terms = [cross_entropy(targets[g], student[v]).mean() for g in seen for v in student if v != g]
    assert step.loss.item() == pytest.approx(np.mean(terms), rel=1e-10)
    expected = 0.9 * centre + 0.1 * outputs.mean(0) if centring == "mean" else centre
    assert as_numpy(dino.centres[0]) == pytest.approx(expected, rel=1e-10)
    assert not any(p.requires_grad for p in (*dino.teacher_vit.parameters(), *dino.teacher_heads.parameters()))


@pytest.mark.parametrize("centring", ["mean", "sinkhorn"])
@pytest.mark.parametrize("shared", [False, True])
def test_the_loss_of_masked_patches_is_ibots(centring: str, shared: bool) -> None:
    vit, dino = made({"registers": 1}, centring=centring, masked=0.5, shared_head=shared, koleo=0.2)
    assert len(dino.heads) == (1 if shared else 2)
    batch = batch_of(16, 16, 8)
    centre = as_numpy(dino.centres[1].copy_(torch.randn(12) / 10)).copy()
    step = dino(vit, batch, 0.5)
    rows, masks = masked_views(batch.draws, 2, (4, 4))
    assert sorted(rows % IMAGES) == list(range(IMAGES))  # of each image one view
    views = torch.cat(batch.views[:2])
    outputs, weights, found, where = [], [], [], []
    for row, mask in zip(rows, masks, strict=True):
        teacher = dino.teacher_vit.features(views[row : row + 1])[:, 2:]
        student = vit.encode(vit.embed(views[row : row + 1], mask[None]))[:, 2:]
        outputs.append(as_numpy(dino.teacher_heads[-1](teacher[:, mask]))[0])
        found.append(as_numpy(dino.heads[-1](student[:, mask]))[0])
        weights += [1 / int(mask.sum())] * int(mask.sum())
        where.append(int(mask.sum()))
    teacher_outputs = np.concatenate(outputs)
    shares = softmax((teacher_outputs - centre) / 0.07) if centring == "mean" else assigned(teacher_outputs, 0.07)
    errors = cross_entropy(shares, np.concatenate(found))
    assert step.logs["loss_patch"].item() == pytest.approx((errors * weights).sum() / (2 * IMAGES), rel=1e-10)
    assert len(set(where)) > 1
    total = step.logs["loss_image"] + 0.5 * step.logs["loss_patch"] + 0.2 * step.logs["loss_koleo"]
    assert step.loss.item() == pytest.approx(total.item(), rel=1e-12)
    if centring == "mean":
        expected = 0.9 * centre + 0.1 * teacher_outputs.mean(0)
        assert as_numpy(dino.centres[1]) == pytest.approx(expected, rel=1e-10)


def test_koleo_is_the_mean_log_distance_of_nearest_neighbours() -> None:
    features = torch.randn(9, 4, dtype=torch.float64)
    x = as_numpy(features / features.norm(dim=1, keepdim=True))
    nearest = [min(np.linalg.norm(x[i] - x[j]) for j in range(9) if j != i) for i in range(9)]
    assert koleo(features).item() == pytest.approx(-np.log(nearest).mean(), rel=1e-6)
    assert koleo(torch.ones(3, 4)).isfinite()


def test_sinkhorn_uses_prototypes_equally_and_ignores_what_is_not_used() -> None:
    outputs = torch.rand(40, 6, dtype=torch.float64) * 2 - 1
    used = torch.arange(40) % 4 > 0
    shares = sinkhorn(outputs, 0.1, used.double())
    assert as_numpy(shares[used]) == pytest.approx(assigned(as_numpy(outputs[used]), 0.1), rel=1e-10)
    assert not shares[~used].any()
    uneven = [(x.sum(0) - 5).abs().max() for x in (shares, (outputs[used] / 0.1).softmax(-1))]
    assert uneven[0] < uneven[1] / 2
    assert sinkhorn(outputs.float() / 2, 0.002, used.float()).isfinite().all()


def test_the_teacher_follows_by_the_cosine_of_the_momentum() -> None:
    vit, dino = made(momentum=0.9, freeze_prototypes=0.3)
    for progress in (0.0, 0.29, 0.3, 0.75):
        randomized(vit, 0.5)
        randomized(dino.heads, 0.5)
        pairs = [(dino.teacher_vit, vit), (dino.teacher_heads, dino.heads)]
        before = [{name: as_numpy(p).copy() for name, p in teacher.named_parameters()} for teacher, _ in pairs]
        students = [{name: as_numpy(p).copy() for name, p in student.named_parameters()} for _, student in pairs]
        dino.after_step(vit, progress)
        momentum = 1 - 0.1 * (math.cos(math.pi * progress) + 1) / 2
        for (teacher, student), old, new in zip(pairs, before, students, strict=True):
            for name, parameter in teacher.named_parameters():
                kept = progress < 0.3 and name.endswith("last.weight")
                expected = old[name] if kept else momentum * old[name] + (1 - momentum) * new[name]
                assert as_numpy(parameter) == pytest.approx(expected, rel=1e-12, abs=1e-14)
                if kept:  # the student's too
                    assert np.array_equal(as_numpy(student.get_parameter(name)), old[name])


def test_outputs_are_cosines_and_a_view_of_its_own_is_compared_in_validation() -> None:
    vit, dino = made(masked=1.0)
    assert dino.heads[0](torch.randn(50, 16, dtype=torch.float64)).abs().max() <= 1
    dino.eval()
    vit.eval()
    batch = batch_of(16)
    step = dino(vit, batch, 0.5)
    before = dino.centres.clone()
    assert step.loss == dino(vit, batch, 0.5).loss
    assert torch.equal(dino.centres, before)
    features = dino.teacher_vit.pool(dino.teacher_vit.features(batch.views[0]))
    assert step.features is not None
    assert torch.equal(step.features, features)


def test_a_teacher_has_no_dropout() -> None:
    vit, dino = made({"dropout": 0.5})
    batch = batch_of(16, 16)
    first, second = dino(vit, batch, 0.0), dino(vit, batch, 0.0)
    assert torch.equal(first.logs["teacher_entropy"], dino(vit, batch, 0.0).logs["teacher_entropy"]) is False  # centres
    assert first.features is not None
    assert second.features is not None
    assert torch.equal(first.features, second.features)
    assert first.loss != second.loss


@pytest.mark.parametrize("grid", [(14, 14), (4, 4), (16, 8)])
def test_masks_are_blocks_of_a_tenth_to_a_half(grid: tuple[int, int]) -> None:
    count, patches = 3000, math.prod(grid)
    masks = block_masks(torch.arange(count), grid)
    shares = masks.double().mean(1)
    assert masks.shape == (count, patches)
    assert shares.max() <= 0.5
    assert shares.min() >= int(patches * 0.1) / patches * 0.5
    assert abs(shares.mean() - 0.3) < 0.04  # rounded down
    assert shares.std() > 0.08
    alike = (masks.unflatten(1, grid)[:, :, 1:] == masks.unflatten(1, grid)[:, :, :-1]).double().mean()
    together = (shares**2 + (1 - shares) ** 2).mean()  # if patches were drawn one by one
    assert alike > together + 0.05
    assert masks.double().mean(0).min() > 0.02  # a corner's


def test_every_second_global_view_is_masked() -> None:
    for views, expected in ((1, 1), (2, 1), (4, 2)):
        rows, masks = masked_views(torch.arange(1000), views, (4, 4))
        assert len(rows) == len(rows.unique()) == len(masks) == 1000 * expected
        assert ((rows // 1000).bincount() / len(rows) - 1 / views).abs().max() < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"centring": "median"}, r"centring is 'median' \(str\); give Literal\['mean', 'sinkhorn'\]"),
        ({"momentum": 1.1}, "DINO: momentum is 1.1; give from 0 to 1"),
        ({"freeze_prototypes": -0.1}, "DINO: freeze_prototypes is -0.1; give from 0 to 1"),
        ({"temperature_start": 0.0}, "DINO: temperature_start is 0.0; give at least 1e-06"),
        ({"koleo": -1.0}, "DINO: koleo is -1.0; give at least 0"),
        ({"bottleneck": 0}, "DINO: bottleneck is 0; give at least 1"),
        ({"shared_head": True}, "shared_head is for masked patches"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    user_error(message, lambda: DINO(ViT(**TINY), **{**HEAD, **options}))


def test_half_precision_weights_are_refused() -> None:
    vit, dino = made()
    user_error("use precision bf16-mixed", dino.bfloat16(), vit.bfloat16(), batch_of(16, 16), 0.0)
