"""Parameter groups: the learning rate and the weight decay of each parameter."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from vitlit.errors import UserError, check_range, check_types
from vitlit.optim.muon import Muon

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
Layers = Mapping[str, Mapping[str, nn.Parameter]]


@dataclass(frozen=True)
class Groups:
    """How learning rate and weight decay differ between parameters. Numbers out of range raise UserError.

    Patterns are shell globs of parameter names, such as `blocks.*.attn.*`. An objective's own parameters are named
    `objective.NAME`. If several patterns match a parameter, their multiples multiply; a pattern must match one.

    Args:
        layer_decay: a layer's learning rate as a multiple of the next one's: 1 for norm and head, layer_decay for the
            last block, layer_decay ^ (depth + 1) for the embedding (2106.08254, appendix A.2; MAE's lr_decay.py).
        lr: further multiples of the learning rate, by pattern.
        weight_decay: multiples of the weight decay, by pattern. The default is 1 for kernels (weights of linear layers
            and convolutions) and 0 for all other parameters (big_vision, configs/vit_s16_i1k.py).
    """

    layer_decay: float = 1.0
    lr: dict[str, float] = field(default_factory=dict)
    weight_decay: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(type(self), vars(self), "model.groups.")
        check_range("model.groups", 1e-6, 1, layer_decay=self.layer_decay)
        for name in ("lr", "weight_decay"):
            check_range(f"model.groups.{name}", 0, **getattr(self, name))


def build_optimizer(
    make: OptimizerFactory, layers: Layers, module: nn.Module, groups: Groups = Groups(), lr_scale: float = 1.0
) -> Optimizer:
    """An optimizer over the trainable parameters of a module, in groups with their own lr and weight_decay.

    Each must be in a layer (`ViT.layers`), of which layer decay acts on embed and blocks.N. `lr_scale` is a factor of
    every learning rate. On a GPU, Adam, AdamW and SGD are torch's fused ones unless `make` says foreach or fused.
    `Muon` gets the matrices of the blocks in groups of their own.
    """
    try:
        probe = make([{"params": [torch.zeros(1, 1)], "layers": ["head"]}])
        members = group_members(layers, module, groups, split=isinstance(probe, Muon))
        keys = ("params", "layers", *(["matrices"] if isinstance(probe, Muon) else []))
        optimizer = make([{key: group[key] for key in keys} for group in members])
    except ValueError as error:
        instead = "; give vitlit.optim.Muon, which has AdamW for those" if "Muon only" in str(error) else ""
        raise UserError(f"model.optimizer: {error}{instead}") from error
    for group, multiples in zip(optimizer.param_groups, members, strict=True):
        unsaid = isinstance(optimizer, Adam | SGD | Muon) and group.get("fused", 0) is group.get("foreach") is None
        if unsaid and all(p.is_cuda for p in group["params"]):
            group["fused"] = True
        group["lr"] *= multiples["lr"] * lr_scale
        if "weight_decay" in group:
            group["weight_decay"] *= multiples["weight_decay"]
    if not any(group["lr"] for group in optimizer.param_groups):
        raise UserError("every learning rate is 0, which trains nothing; give --model.optimizer.init_args.lr more")
    return optimizer


def group_members(layers: Layers, module: nn.Module, groups: Groups, split: bool = False) -> list[dict[str, Any]]:
    """The groups in the order of the layers, with their multiples; `split` keeps the matrices of the blocks apart."""
    trainable = {name: (layer, p) for layer in layers for name, p in layers[layer].items() if p.requires_grad}
    in_layers = {id(parameter) for _, parameter in trainable.values()}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in in_layers:
            raise UserError(f"the parameter {name} is in no layer of the ViT, so no group would train it")
    if not trainable:
        raise UserError("no parameter is trainable; leave something out of model.freeze")
    for kind in ("lr", "weight_decay"):
        for pattern in getattr(groups, kind):
            if not any(fnmatchcase(name, pattern) for name in trainable):
                example = next(reversed(trainable))
                raise UserError(f"model.groups.{kind} {pattern!r} matches no trainable parameter, such as {example}")
    linear = [part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    kernels = {id(parameter) for part in linear for parameter in part.parameters(recurse=False) if parameter.ndim > 1}
    depth = sum(layer.startswith("blocks.") for layer in layers)
    below_norm = {"embed": depth + 1, **{f"blocks.{i}": depth - i for i in range(depth)}}
    members: dict[tuple[float, ...], dict[str, Any]] = {}
    for name, (layer, parameter) in trainable.items():
        lr = groups.layer_decay ** below_norm.get(layer, 0) * multiple(groups.lr, name, default=1.0)
        decay = multiple(groups.weight_decay, name, default=float(id(parameter) in kernels))
        own = {"lr": lr, "weight_decay": decay} | ({"matrices": stacked(name, parameter)} if split else {})
        group = members.setdefault((*own.values(),), {"params": [], "layers": [], **own})
        group["params"].append(parameter)
        if layer not in group["layers"]:
            group["layers"].append(layer)
    return list(members.values())


def stacked(name: str, parameter: nn.Parameter) -> int:
    """How many matrices of a block a weight stacks: 3 of queries, keys and values, 0 if it is in no block."""
    in_block = re.search(r"blocks\.\d+\.(?!.*lora_)", name) is not None and parameter.ndim == 2
    return in_block * (3 if name.endswith("qkv.weight") else 1)


def multiple(multiples: Mapping[str, float], name: str, default: float) -> float:
    """The product of the multiples with a pattern that matches a name, or the default."""
    matching = [value for pattern, value in multiples.items() if fnmatchcase(name, pattern)]
    return math.prod(matching) if matching else default


def table(optimizer: Optimizer) -> str:
    """The groups of an optimizer as lines: layers, tensors, parameters, peak learning rate, weight decay."""
    rows = [("layers", "tensors", "parameters", "peak lr", "weight decay")]
    for group in optimizer.param_groups:
        first, last = group["layers"][0], group["layers"][-1]
        layers = first if first == last else f"{first} to {last}"
        size, lr = sum(p.numel() for p in group["params"]), group.get("initial_lr", group["lr"])
        decay = group.get("weight_decay", 0)
        rows.append((layers, f"{len(group['params']):,}", f"{size:,}", f"{lr:.4g}", f"{decay:g}"))
    left, *right = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join("  ".join([row[0].ljust(left), *map(str.rjust, row[1:], right)]) for row in rows)
