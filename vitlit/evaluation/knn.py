"""Classification by nearest neighbours."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SIMILARITIES = 2**25  # at a time: 128 MiB


def knn(
    train_features: Any, train_labels: Any, features: Any, labels: Any, k: int = 20, temperature: float = 0.07
) -> float:
    """The accuracy of nearest neighbours on features (M, D) with class numbers (M,), arrays or tensors on any device.

    The k of the training features (N, D) with the highest cosine similarity s vote for their classes, each with weight
    exp(s / temperature) (1805.01978, section 3.4; k as in 2104.14294). Memory is that of the features, and 128 MiB.
    """
    bank, features = normalised(torch.as_tensor(train_features)), torch.as_tensor(features)
    bank_labels, labels = (torch.as_tensor(part, device=bank.device) for part in (train_labels, labels))
    found = nearest(bank, bank_labels, features.to(bank.device), [k], temperature)[0]
    return float((found == labels).double().mean())


def nearest(
    bank: Tensor, bank_labels: Tensor, features: Tensor, ks: Sequence[int] = (20,), temperature: float = 0.07
) -> Tensor:
    """The classes (K, M) that for each k a `normalised` bank (N, D) with labels (N,) gives to features (M, D)."""
    classes, most, found = int(bank_labels.max()) + 1, min(max(ks), len(bank)), []
    for part in normalised(features).to(bank).split(max(1, SIMILARITIES // len(bank))):
        similarity, neighbours = (part @ bank.T).topk(most)
        weights, labels = ((similarity - 1) / temperature).exp(), bank_labels[neighbours]
        votes = (weights.new_zeros(len(part), classes).scatter_add(1, labels[:, :k], weights[:, :k]) for k in ks)
        found.append(torch.stack([each.argmax(1) for each in votes]))
    return torch.cat(found, 1)


def normalised(features: Tensor) -> Tensor:
    """Features (N, D) of length 1, at least float32."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
