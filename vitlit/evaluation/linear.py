"""Classification by a linear layer, as DINOv2 measures it."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitlit.evaluation.resampling import tenth

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
BATCH, EPOCHS, STEPS = 128, 10, 1000  # at least so many steps
Named = Mapping[str, Tensor]


def linear(train: Named, labels: Any, features: Named, seed: int = 0, groups: Any = None) -> Tensor:
    """The classes (M,) that the best of many linear layers gives to features (M, D), of one or more names.

    For each name and learning rate a layer is trained as DINOv2's 52 are (facebookresearch/dinov2, eval/linear.py; see
    `probe_inputs`): SGD, momentum 0.9, no decay, cosine to 0, the rate in proportion to batch / 256, here for ten
    epochs and at least 1,000 steps of 128 images. DINOv2 trains on random crops and reports the best layer of the test
    images; here features are fixed, and it is the best on a tenth of the training images, which trains none.
    """
    numbers, best, found = torch.as_tensor(labels), -1, torch.empty(0)
    held = torch.from_numpy(tenth(labels, groups, seed))
    for name, inputs in train.items():
        layers = train_layers(inputs[~held], numbers[~held], int(numbers.max()) + 1, seed)
        right = (logits(layers, inputs[held]).argmax(2) == numbers[held, None]).sum(0)
        if right.max() > best:
            best, layer = int(right.max()), layers[:, right.argmax()][:, None]
            found = logits(layer, features[name]).argmax(2)[:, 0]
    return found


def train_layers(inputs: Tensor, labels: Tensor, classes: int, seed: int) -> Tensor:
    """A layer for each learning rate, (D + 1, rates, classes) with the bias last; they begin alike and see the same."""
    draw, batch, order = torch.Generator().manual_seed(seed), min(BATCH, len(inputs)), torch.arange(0)
    steps = max(STEPS, EPOCHS * len(inputs) // batch)
    first = 0.01 * torch.randn(inputs.shape[1], 1, classes, generator=draw)
    layers = F.pad(first, (0, 0, 0, 0, 0, 1)).repeat(1, len(RATES), 1)
    speeds, momentum = torch.tensor(RATES)[:, None] * batch / 256, torch.zeros_like(layers)
    for step in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(inputs), generator=draw)
        rows, order = order[:batch], order[batch:]
        slopes = logits(layers, inputs[rows]).softmax(2) - F.one_hot(labels[rows, None], classes)  # of the loss
        momentum = 0.9 * momentum + torch.tensordot(F.pad(inputs[rows], (0, 1), value=1).T, slopes, 1) / batch
        layers -= speeds * momentum * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    return layers


def logits(layers: Tensor, inputs: Tensor) -> Tensor:
    """Those that layers give to inputs (B, D): (B, layers, classes)."""
    return torch.tensordot(F.pad(inputs, (0, 1), value=1), layers, 1)
