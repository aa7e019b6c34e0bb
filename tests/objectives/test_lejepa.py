"""SIGReg against numerical integration of the Epps-Pulley statistic, and LeJEPA's loss against the paper's."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import user_error
from scipy.integrate import quad  # type: ignore[import-untyped]

from vitlit.model import ViT
from vitlit.objectives import Batch, LeJEPA
from vitlit.objectives.lejepa import epps_pulley

TINY = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "heads": 2, "mlp_dim": 32}


def integrated(samples: np.ndarray) -> float:
    """N times the integral of |f(t) - g(t)|^2 g(t) over all t."""

    def integrand(t: float) -> float:
        g = math.exp(-t * t / 2)
        return float(abs(np.exp(1j * t * samples).mean() - g) ** 2 * g)

    return len(samples) * quad(integrand, -12, 12, epsabs=1e-11, limit=500)[0]


@pytest.mark.parametrize(
    "draw",
    [
        lambda g: g.standard_normal(200),
        lambda g: 0.3 * g.standard_normal(200),
        lambda g: g.standard_normal(200) + 1.5,
        lambda g: g.uniform(-2, 2, 200),
        lambda g: np.zeros(200),
    ],
    ids=["normal", "narrow", "shifted", "uniform", "collapsed"],
)
def test_the_statistic_is_its_integral(draw: Callable[[np.random.Generator], np.ndarray]) -> None:
    samples = draw(np.random.default_rng(0))
    found = epps_pulley(torch.from_numpy(samples)[:, None])
    assert found.item() == pytest.approx(integrated(samples), rel=1e-5, abs=1e-5)


def test_of_standard_normal_samples_it_is_as_expected() -> None:
    """E N|f - g|^2 = 1 - g^2, so the expectation is sqrt(2 pi) - sqrt(2 pi / 3), whatever N."""
    generator = torch.Generator().manual_seed(0)
    found = epps_pulley(torch.randn(64, 20_000, generator=generator, dtype=torch.float64))
    expected = math.sqrt(2 * math.pi) - math.sqrt(2 * math.pi / 3)
    assert abs(found.mean() - expected) < 3 * found.std() / math.sqrt(found.numel())


def test_every_direction_is_finite() -> None:
    """In step 830 the largest of the uniform numbers is drawn, 1 - 2^-24."""
    objective = LeJEPA(ViT(**TINY))
    objective.step.fill_(830)
    directions = objective.directions(torch.zeros(1, 128))
    assert directions.isfinite().all()
    assert directions.norm(dim=0) == pytest.approx(1)


def test_the_loss_is_the_papers() -> None:
    torch.manual_seed(0)
    vit = ViT(**TINY).double()
    objective = LeJEPA(vit, weight=0.3, width=5, hidden_dim=7, slices=11).double()
    sizes = (16, 16, 8, 8, 8)
    views, numbers = [torch.randn(6, 3, size, size, dtype=torch.float64) for size in sizes], torch.arange(6)
    step = objective(vit, Batch(views, torch.full((6,), -1), numbers, numbers), 0.5)
    step.loss.backward()
    z = objective.projector(torch.cat([vit.pool(vit.features(view)) for view in views]))  # batch norm sees all views
    z = z.detach().numpy().reshape(5, 6, 5)
    invariance = ((z - z[:2].mean(0)) ** 2).mean()
    objective.step.zero_()  # the directions of the step
    directions = objective.directions(torch.zeros(5, dtype=torch.float64)).numpy()
    assert np.linalg.norm(directions, axis=0) == pytest.approx(1)
    statistics = [integrated(view @ direction) for view in z for direction in directions.T]
    assert step.logs["invariance"].item() == pytest.approx(invariance, rel=1e-9)
    assert step.logs["sigreg"].item() == pytest.approx(np.mean(statistics), rel=1e-5)
    assert step.loss.item() == pytest.approx(0.7 * invariance + 0.3 * np.mean(statistics), rel=1e-5)


def test_directions_change_with_the_steps_of_training_alone_and_are_isotropic() -> None:
    objective = LeJEPA(ViT(**TINY), hidden_dim=4, slices=4000)
    drawn = [objective.directions(torch.zeros(4)) for _ in range(2)]
    assert not torch.equal(*drawn)
    assert (drawn[0] @ drawn[0].T / 4000 - torch.eye(4) / 4).abs().max() < 0.02
    objective.eval()
    assert torch.equal(objective.directions(torch.zeros(4)), objective.directions(torch.zeros(4)))


def test_options_out_of_range_are_refused() -> None:
    user_error("LeJEPA: weight is 2; give from 0 to 1", lambda: LeJEPA(ViT(**TINY), weight=2))
    user_error("LeJEPA: slices is 0; give at least 1", lambda: LeJEPA(ViT(**TINY), slices=0))
