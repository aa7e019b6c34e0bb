"""How much of their space features take: what falls when a network collapses."""

import torch
from torch import Tensor
from torch.nn import functional as F


def effective_rank(features: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of features (N, D), from 1 to min(N, D), a scalar.

    It is RankMe (2210.02885) of these N images; NaN if a feature is not finite.
    """
    if not features.isfinite().all():
        return features.new_full((), torch.nan)
    values = torch.linalg.svdvals(features)
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp()


def deviation(features: Tensor) -> Tensor:
    """sqrt(D) x the standard deviation over images of features (N, D) of length 1, a mean over D; a scalar.

    It is 1 if features point in all directions alike, and 0 if they are the same for all images (2011.10566, section
    4.1).
    """
    return F.normalize(features, dim=-1).std(0, correction=0).mean() * features.shape[-1] ** 0.5
