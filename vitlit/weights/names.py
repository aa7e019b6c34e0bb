"""Tensor names of other formats to the ViT's and back; parts of a fused layer to one tensor and back."""

import re
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from vitlit.errors import UserError
from vitlit.weights.files import Contents, skips

# (theirs, ours): whole names, or their beginnings up to a dot; {} is the number of a block.
Table = Sequence[tuple[str, str]]


def translate(state: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Rename tensors by a table of (from, to); names that are not in it stay."""
    patterns = [(re.compile(re.escape(old).replace(r"\{\}", r"(\d+)") + r"(|\..+)"), new + "{}") for old, new in table]

    def renamed(name: str) -> str:
        matches = ((pattern.fullmatch(name), new) for pattern, new in patterns)
        return next((new.format(*match.groups()) for match, new in matches if match), name)

    return {renamed(name): tensor for name, tensor in state.items()}


def blocks(theirs: str, *parts: tuple[str, str]) -> Table:
    """The rows of every block's parts; in `theirs`, how the names of a block begin, {} is its number."""
    return [(f"{theirs}.{part}", f"blocks.{{}}.{ours}") for part, ours in parts]


def backwards(table: Table) -> Table:
    """The table of the other direction; the first of several names for one of ours wins."""
    return list({ours: theirs for theirs, ours in reversed(table)}.items())


def prefix_of(contents: Contents, anchor: str) -> str | None:
    """What precedes `anchor` in the first name that ends with it, if possible one not to skip; None if no name does."""
    names = [name for name in contents.tensors if name.endswith(anchor)]
    first = min(names, key=lambda name: skips(contents.skip, name), default=None)
    return None if first is None else first.removesuffix(anchor)


def strip(contents: Contents, prefix: str, unused: str = "") -> tuple[dict[str, Tensor], list[str]]:
    """Take a prefix off the ViT's names; also returns the full names of what to skip, or is `unused` by short name."""
    kept, left = {}, []
    for name, tensor in contents.tensors.items():
        short = name.removeprefix(prefix)
        if re.fullmatch(unused, short) or (prefix and skips(contents.skip, name)):  # else it may be the ViT's
            left.append(name)
        elif name.startswith(prefix):
            kept[short] = tensor
        else:
            hint = how_to_skip(name, [other for other in contents.tensors if other.startswith(prefix)])
            raise UserError(f"{name} {list(tensor.shape)} lies outside the ViT in {prefix.rstrip('./')}; {hint}")
    return kept, left


def how_to_skip(name: str, vit: Collection[str]) -> str:
    """How to leave out a tensor, and what is beside it, that is none of the names of a ViT."""
    parts = name.split(".")
    roots = (".".join(parts[:i]) + "." for i in range(1, len(parts)))
    pattern = next((f"{root}*" for root in roots if not any(other.startswith(root) for other in vit)), name)
    return f"skip=['{pattern}'] leaves it out, and so does `vitlit weights convert --skip '{pattern}'`"


def fuse(state: Mapping[str, Tensor], parts: Sequence[str], whole: str) -> dict[str, Tensor]:
    """Concatenate the parts of a layer, such as attn.q, attn.k and attn.v of every block into attn.qkv."""
    pattern = re.compile(rf"(.+\.)(?:{'|'.join(map(re.escape, parts))})\.(weight|bias)")
    fused = {}
    for name, tensor in state.items():
        match = pattern.fullmatch(name)
        if not match:
            fused[name] = tensor
        elif (new := f"{match[1]}{whole}.{match[2]}") not in fused:
            names = [f"{match[1]}{part}.{match[2]}" for part in parts]
            # Stack, unlike cat, refuses parts of different sizes.
            fused[new] = torch.stack([state[part] for part in names]).flatten(0, 1)
    return fused


def split(state: Mapping[str, Tensor], whole: str, parts: Sequence[str]) -> dict[str, Tensor]:
    pattern = re.compile(rf"(.+\.){re.escape(whole)}\.(weight|bias)")
    apart: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if match := pattern.fullmatch(name):
            pieces = zip(parts, tensor.chunk(len(parts)), strict=True)
            apart |= {f"{match[1]}{part}.{match[2]}": piece for part, piece in pieces}
        else:
            apart[name] = tensor
    return apart
