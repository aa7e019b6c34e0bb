"""Foreign names to the ViT's and back, by a table; queries, keys and values to one tensor and back."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vitlit.errors import UserError

# (theirs, ours): whole names or their beginnings up to a dot, {} for the number of a block.
Table = Sequence[tuple[str, str]]


def translate(state: Mapping[str, Tensor], table: Table) -> tuple[dict[str, Tensor], list[str]]:
    """Rename tensors by a table of (from, to).

    Returns:
        the tensors that the table knows, under their new names, and the names of the others.
    """
    patterns = [(re.compile(re.escape(old).replace(r"\{\}", r"(\d+)") + r"(\..+)?"), new) for old, new in table]
    renamed, others = {}, []
    for name, tensor in state.items():
        for pattern, new in patterns:
            if match := pattern.fullmatch(name):
                *block, rest = match.groups()
                renamed[new.format(*block) + (rest or "")] = tensor
                break
        else:
            others.append(name)
    return renamed, others


def backwards(table: Table) -> Table:
    """The table of the other direction; where several names lead to one of ours, the first counts."""
    found: dict[str, str] = {}
    for theirs, ours in table:
        found.setdefault(ours, theirs)
    return list(found.items())


def fuse(
    state: dict[str, Tensor], parts: Sequence[str], whole: str, path: Path, optional: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Concatenate the parts of a layer, such as attn.q, attn.k and attn.v of every block to attn.qkv.

    Args:
        state: tensors by name.
        parts: of a layer, without the block.
        whole: the layer.
        path: their file.
        optional: tensors of a part, such as attn.k.bias, that are zero where they are missing and the others are not.

    Raises:
        UserError: a part is missing, or the shapes do not go together.
    """
    first = re.compile(rf"((?:blocks\.\d+|attn_pool)\.)(?:{'|'.join(map(re.escape, parts))})\.(weight|bias)")
    fused = {}
    for name, tensor in state.items():
        match = first.fullmatch(name)
        if not match:
            fused[name] = tensor
            continue
        block, kind = match.groups()
        target = f"{block}{whole}.{kind}"
        if target in fused:
            continue
        pieces = []
        for part in parts:
            piece = state.get(f"{block}{part}.{kind}")
            if piece is None and f"{part}.{kind}" not in optional:
                raise UserError(f"{path} is no whole ViT: {block}{part}.{kind} is missing from the file")
            pieces.append(torch.zeros_like(tensor) if piece is None else piece)
        like = pieces[0].shape
        for part, piece in zip(parts, pieces, strict=True):
            if piece.shape != like:
                raise UserError(
                    f"{path}: {block}{part}.{kind} is {list(piece.shape)} in the file, and {parts[0]}'s {list(like)}"
                )
        fused[target] = torch.cat(pieces)
    return fused


def split(state: Mapping[str, Tensor], whole: str, parts: Sequence[str]) -> dict[str, Tensor]:
    """The inverse of `fuse`."""
    fused = re.compile(rf"((?:blocks\.\d+|attn_pool)\.){re.escape(whole)}\.(weight|bias)")
    apart = {}
    for name, tensor in state.items():
        if match := fused.fullmatch(name):
            for part, piece in zip(parts, tensor.chunk(len(parts)), strict=True):
                apart[f"{match[1]}{part}.{match[2]}"] = piece.contiguous()
        else:
            apart[name] = tensor
    return apart
