"""Classification by a linear layer, as DINOv2 measures it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitlit.evaluation.resampling import held_part

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
BATCH, EPOCHS, STEPS = 128, 10, 1000  # at least so many steps


def linear(
    train: Mapping[str, Tensor], labels: Any, features: Mapping[str, Tensor], seed: int = 0, groups: Any = None
) -> Tensor:
    """The classes (M,) that the best of many linear layers gives to features (M, D), of one or more names.

    For each name and learning rate a layer is trained as DINOv2's 52 are (facebookresearch/dinov2, eval/linear.py; see
    `probe_inputs`): SGD, momentum 0.9, no decay, cosine to 0, the rate in proportion to batch / 256, here for ten
    epochs and at least 1,000 steps of 128 images. DINOv2 trains on random crops and reports the best layer of the test
    images; here features are fixed, and it is the best on a tenth of the training images, which trains none.
    """
    numbers, best, found = torch.as_tensor(labels), -1, torch.empty(0)
    held = torch.from_numpy(held_part(numbers, groups, seed))
    for name, inputs in train.items():
        for layer in train_layers(inputs[~held], numbers[~held], int(numbers.max()) + 1, seed=seed):
            right = int((layer(inputs[held]).argmax(1) == numbers[held]).sum())
            if right > best:
                best, found = right, layer(features[name]).argmax(1)
    return found


def train_layers(
    inputs: Tensor, labels: Tensor, classes: int, rates: Sequence[float] = RATES, seed: int = 0, steps: int = 0
) -> list[nn.Linear]:
    """A layer for each learning rate; all see the same batches, and begin alike."""
    draw, batch = torch.Generator().manual_seed(seed), min(BATCH, len(inputs))
    steps = steps or max(STEPS, EPOCHS * len(inputs) // batch)
    first = 0.01 * torch.randn(classes, inputs.shape[1], generator=draw)
    layers = [nn.utils.skip_init(nn.Linear, inputs.shape[1], classes) for _ in rates]
    for layer in layers:
        layer.load_state_dict({"weight": first, "bias": torch.zeros(classes)})
    speeds = zip(layers, rates, strict=True)
    groups = [{"params": layer.parameters(), "lr": rate * batch / 256} for layer, rate in speeds]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule, order = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps), torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(inputs), generator=draw)
        rows, order = order[:batch], order[batch:]
        optimizer.zero_grad()
        torch.stack([F.cross_entropy(layer(inputs[rows]), labels[rows]) for layer in layers]).sum().backward()
        optimizer.step()
        schedule.step()
    return layers
