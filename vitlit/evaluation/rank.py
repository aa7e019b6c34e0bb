"""How much of their space features take, which falls when a network collapses."""

import torch
from torch import Tensor
from torch.nn import functional as F


def effective_rank(features: Tensor) -> Tensor:
    """exp of the entropy of the shares of the singular values of features (N, D), a scalar (RankMe, 2210.02885).

    It is at least 1 and at most N and D; NaN if a feature is not finite.
    """
    if not features.isfinite().all():
        return features.new_full((), torch.nan)
    values = torch.linalg.svdvals(features)
    return torch.special.entr(values / values.sum()).sum().exp()


def deviation(features: Tensor) -> Tensor:
    """sqrt(D) x the standard deviation of features (N, D) of length 1, a scalar (2011.10566, section 4.1).

    It is 1 if they point in all directions alike, and 0 if all are the same.
    """
    return F.normalize(features, dim=-1).std(0, correction=0).mean() * features.shape[-1] ** 0.5
