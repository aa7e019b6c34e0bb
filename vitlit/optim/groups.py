"""Parameter groups: which parameters weight decay acts on, and how fast each layer learns."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from vitlit.errors import UserError

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
Layers = Mapping[str, Mapping[str, nn.Parameter]]


@dataclass(frozen=True)
class Groups:
    """How learning rate and weight decay differ between parameters.

    Patterns are shell globs of parameter names, such as `blocks.*.attn.*`; an objective's own parameters are called
    `objective.NAME`. One that matches no trainable parameter is an error.

    Args:
        layer_decay: the learning rate of each layer as a multiple of the one above: 1 for norm and head, layer_decay
            for the last block, layer_decay ^ (depth + 1) for the embedding (2106.08254, appendix A.2; MAE's
            util/lr_decay.py).
        lr: further multiples of the learning rate by pattern; where several match, they multiply.
        weight_decay: multiples of the weight decay by pattern, in place of 1 for kernels (matrices of linear layers and
            convolutions) and 0 for all else (big_vision, configs/vit_s16_i1k.py).

    Raises:
        UserError: layer_decay is not in (0, 1], or a multiple is negative.
    """

    layer_decay: float = 1.0
    lr: dict[str, float] = field(default_factory=dict)
    weight_decay: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"model.groups.layer_decay {self.layer_decay} is not above 0 and up to 1")
        for name in ("lr", "weight_decay"):
            for pattern, multiple in getattr(self, name).items():
                if multiple < 0:
                    raise UserError(f"model.groups.{name} of {pattern} is {multiple}, less than 0")


def build_optimizer(
    make: OptimizerFactory, layers: Layers, module: nn.Module, groups: Groups = Groups(), lr_scale: float = 1.0
) -> Optimizer:
    """An optimizer over the trainable parameters of a module, whose groups hold their own lr and weight decay.

    Args:
        make: makes an optimizer of parameter groups; its lr and weight_decay are what the multiples multiply.
        layers: the parameters by layer, in the order of the forward pass (`ViT.layers`). The last two, norm and head,
            learn at the full rate; layers that are not named `blocks.N`, `norm`, `head` or `embed` do, too.
        module: what they belong to; every trainable parameter of it must be in a layer.
        groups: the multiples.
        lr_scale: a factor of every learning rate.

    Raises:
        UserError: a trainable parameter is in no layer, a pattern matches none, or nothing is trainable or trained.
    """
    members = group_members(layers, module, groups)
    settings = [{"params": group["params"], "layers": group["layers"]} for group in members]
    try:
        optimizer = make(settings)
    except ValueError as error:
        raise UserError(f"model.optimizer: {error}") from error
    check_optimizer(optimizer)
    for made, group in zip(optimizer.param_groups, members, strict=True):
        made["lr"] *= group["lr"] * lr_scale
        if "weight_decay" in made:
            made["weight_decay"] *= group["weight_decay"]
        for name in ("lr", "weight_decay"):
            if not abs(made.get(name, 0)) <= torch.finfo(torch.float32).max:
                raise UserError(f"the optimizer's {name} of {made['layers'][0]} is {made[name]:g}, beyond float32")
    if not any(group["lr"] for group in optimizer.param_groups):
        raise UserError("every learning rate is 0, which trains nothing; give --model.optimizer.init_args.lr more")
    return optimizer


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse what fails at the first step: sparse gradients, which a ViT has not, and steps for other loops."""
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise UserError("model.optimizer: SparseAdam is for sparse gradients, which a ViT has not; use AdamW")
    if optimizer.defaults.get("differentiable"):
        raise UserError("model.optimizer.differentiable is for a gradient through the step; leave it out")
    if optimizer.defaults.get("capturable") and optimizer.param_groups[0]["params"][0].device.type == "cpu":
        raise UserError("model.optimizer.capturable is for a GPU; leave it out")


def group_members(layers: Layers, module: nn.Module, groups: Groups) -> list[dict[str, Any]]:
    """The groups with their multiples: {params, layers, lr, weight_decay}, in the order of the layers."""
    known = {id(parameter) for parameters in layers.values() for parameter in parameters.values()}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            raise UserError(f"the parameter {name} is in no layer of the ViT, so that no group would train it")
    trainable = [name for parameters in layers.values() for name, p in parameters.items() if p.requires_grad]
    if not trainable:
        raise UserError("no parameter is trainable; leave something out of model.freeze")
    for kind in ("lr", "weight_decay"):
        for pattern in getattr(groups, kind):
            if not any(fnmatchcase(name, pattern) for name in trainable):
                raise UserError(
                    f"model.groups.{kind} {pattern!r} matches no trainable parameter, such as {trainable[-1]}"
                )
    parts = [part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    kernels = {id(parameter) for part in parts for parameter in part.parameters(recurse=False) if parameter.ndim > 1}
    rates = layer_rates(list(layers), groups.layer_decay)
    found: dict[tuple[float, float], dict[str, Any]] = {}
    for layer, parameters in layers.items():
        for name, parameter in parameters.items():
            if not parameter.requires_grad:
                continue
            decay = product(groups.weight_decay, name, default=float(id(parameter) in kernels))
            rate = rates[layer] * product(groups.lr, name, default=1.0)
            group = found.setdefault((rate, decay), {"params": [], "layers": [], "lr": rate, "weight_decay": decay})
            group["params"].append(parameter)
            if layer not in group["layers"]:
                group["layers"].append(layer)
    return list(found.values())


def layer_rates(layers: list[str], decay: float) -> dict[str, float]:
    """The multiple of the learning rate by layer: the deeper below the norm, the smaller."""
    depth = sum(layer.startswith("blocks.") for layer in layers)
    below = {f"blocks.{i}": depth - i for i in range(depth)} | {"embed": depth + 1}
    return {layer: decay ** below.get(layer, 0) for layer in layers}


def product(multiples: Mapping[str, float], name: str, default: float) -> float:
    """The product of the multiples whose pattern matches a name, the default where none does."""
    matching = [multiple for pattern, multiple in multiples.items() if fnmatchcase(name, pattern)]
    value = matching[0] if matching else default
    for multiple in matching[1:]:
        value *= multiple
    return value


def table(optimizer: Optimizer) -> str:
    """The groups of an optimizer as lines: layers, tensors, parameters, peak learning rate, weight decay."""
    rows = [("layers", "tensors", "parameters", "peak lr", "weight decay")]
    for group in optimizer.param_groups:
        layers = group["layers"]
        rows.append(
            (
                layers[0] if len(layers) == 1 else f"{layers[0]} to {layers[-1]}",
                f"{len(group['params']):,}",
                f"{sum(parameter.numel() for parameter in group['params']):,}",
                f"{group.get('initial_lr', group['lr']):.4g}",
                f"{group.get('weight_decay', 0):g}",
            )
        )
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
