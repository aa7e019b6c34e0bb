"""LeJEPA (2511.08544): views agree, and their projections are an isotropic Gaussian. No teacher, no stop-gradient."""

import torch
from torch import Tensor, nn

from vitlit.errors import check_range
from vitlit.model import ViT
from vitlit.objectives.global_batch import BatchNorm, device_count, device_mean
from vitlit.objectives.objective import Batch, Objective, Step, at_least_float32, grouped, without_autocast
from vitlit.seeds import image_noise, uniform

KNOTS, END = 17, 5.0  # of the integral
ALIKE = 3e-3  # of a variance of 1: views that agree so well say nothing


class LeJEPA(Objective):
    """(1 - weight) x invariance + weight x SIGReg (2511.08544, equation 9), of projections of the pooled features.

    The invariance is the mean squared distance of the views' projections from the mean of the global views', those of
    the first view's size. SIGReg is the Epps-Pulley statistic of each view's global batch, averaged over directions
    that each step draws anew. Validation has one view, so only SIGReg, of a device's batch. Both are logged.
    Options out of range raise UserError.

    Args:
        vit: the encoder; its head is removed.
        weight: the paper's lambda, from 0 to 1.
        width: outputs of the projector, an MLP of three layers with batch normalisation.
        hidden_dim: its hidden units.
        slices: the number of directions.
    """

    views, whole_batch, loss_ranks = 2, True, False

    def __init__(
        self, vit: ViT, weight: float = 0.05, width: int = 128, hidden_dim: int = 2048, slices: int = 256
    ) -> None:
        super().__init__(vit)
        check_range("LeJEPA", 0, 1, weight=weight)
        check_range("LeJEPA", 1, width=width, hidden_dim=hidden_dim, slices=slices)
        vit.set_head("finetune", 0)
        self.weight, self.slices = weight, slices
        first = nn.Linear(vit.width, hidden_dim), BatchNorm(hidden_dim), nn.ReLU()
        second = nn.Linear(hidden_dim, hidden_dim), BatchNorm(hidden_dim), nn.ReLU()
        self.projector = nn.Sequential(*first, *second, nn.Linear(hidden_dim, width))
        self.step: Tensor = nn.Buffer(torch.zeros(1, dtype=torch.long))

    def forward(self, vit: ViT, batch: Batch, progress: float) -> Step:
        by_size = grouped(batch.views)
        pooled = torch.cat([vit.pool(vit.features(torch.cat(views), pooled=True)) for views in by_size])
        projections = at_least_float32(self.projector(pooled)).unflatten(0, (len(batch.views), -1))
        invariance = (projections - projections[: len(by_size[0])].mean(0)).square().mean()
        with without_autocast(projections):
            sigreg = epps_pulley(projections @ self.directions(projections), self.training).mean()
        loss = (1 - self.weight) * invariance + self.weight * sigreg
        return Step(loss, None, {"invariance": invariance, "sigreg": sigreg}, pooled[: len(batch.indices)].detach())

    def collapse(self, logs: dict[str, float]) -> str:
        same = logs.get("invariance", 1.0) < ALIKE
        return "all views have the same projections; raise LeJEPA's weight, or lower the learning rate" if same else ""

    @torch.no_grad()
    def directions(self, like: Tensor) -> Tensor:
        """The step's random unit vectors, (width, slices), the same on every device."""
        share = uniform(image_noise(self.step, like.shape[-1] * self.slices)).clamp(min=2.0**-25)  # of 0, -inf
        self.step.add_(int(self.training))
        return nn.functional.normalize(torch.erfinv(2 * share - 1).view(-1, self.slices), dim=0).to(like)


def epps_pulley(samples: Tensor, of_all_devices: bool = False) -> Tensor:
    """The Epps-Pulley statistic of samples (..., B, slices) against N(0, 1): (..., slices).

    It is B x the integral over t of |f(t) - g(t)|^2 g(t), f being the samples' characteristic function and g that of
    N(0, 1), exp(-t^2 / 2). By symmetry it is twice that from 0 to END, by the trapezoidal rule.
    """
    t = torch.linspace(0, END, KNOTS, dtype=samples.dtype, device=samples.device)
    angles, normal = samples[..., None] * t, (-t.square() / 2).exp()
    f, count = torch.stack([angles.cos().mean(-3), angles.sin().mean(-3)]), samples.shape[-2]
    if of_all_devices:
        f, count = device_mean(f), count * device_count()
    apart = (f[0] - normal).square() + f[1].square()
    return 2 * count * torch.trapezoid(apart * normal, dx=END / (KNOTS - 1))
