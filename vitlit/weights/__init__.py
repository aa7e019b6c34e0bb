"""The door for weights: into a ViT, with a report."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch

from vitlit.data.transforms import Preprocess
from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.model.position import resample
from vitlit.weights.checkpoint import Weights, locate, read

__all__ = ["LoadReport", "Weights", "load", "load_weights", "locate", "read"]


class LoadReport(NamedTuple):
    """What `load_weights` did, by tensor names.

    Attributes:
        matched: taken over as they are.
        resampled: taken over at another resolution.
        new: in the ViT alone and skipped: left as they were.
        skipped: in the file alone and skipped, or skipped in both.
    """

    matched: list[str]
    resampled: list[str]
    new: list[str]
    skipped: list[str]

    def __str__(self) -> str:
        return ", ".join(f"{len(names)} {kind}" for kind, names in self._asdict().items() if names)


def load_weights(vit: ViT, path: str | Path, skip: str | Sequence[str] = ()) -> LoadReport:
    """Load weights into a ViT. Whatever is not allowed by `skip` must match.

    A position table of another grid is resampled (2010.11929, section 3.2).

    Args:
        vit: changed in place, unless an error is raised.
        path: a run folder or a checkpoint file.
        skip: shell patterns of tensor names that are left alone, one or several, such as `head*`.

    Raises:
        UserError: the file cannot be read, or a tensor is missing, unexpected or of another shape; the first is named
            with both shapes.
    """
    weights = read(path)
    own = vit.state_dict()
    globs = [skip] if isinstance(skip, str) else skip
    skipped = {name for name in own.keys() | weights.state if any(fnmatchcase(name, glob) for glob in globs)}
    state = {name: tensor for name, tensor in weights.state.items() if name not in skipped}
    resampled = []
    with torch.device("meta"):
        source = ViT(**weights.config).grid
    if "pos_embed" in state and source != vit.grid:  # 2 x 8 and 4 x 4 patches make tables of one shape
        state["pos_embed"] = resample(state["pos_embed"], source, vit.grid)
        resampled = ["pos_embed"]

    wanted = own.keys() - skipped
    problems = [
        f"{name} is {list(state[name].shape)} in the file and {list(own[name].shape)} in the model"
        for name in own
        if name in state and name in wanted and state[name].shape != own[name].shape
    ]
    problems += [
        f"{name} {list(own[name].shape)} is missing from the file" for name in own if name in wanted - state.keys()
    ]
    problems += [f"the model has no {name} {list(tensor.shape)}" for name, tensor in state.items() if name not in own]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{weights.path} does not fit the model: {problems[0]}{more}")

    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
    return LoadReport(
        matched=[name for name in state if name not in resampled],
        resampled=resampled,
        new=sorted(skipped & own.keys() - weights.state.keys()),
        skipped=sorted(skipped & weights.state.keys()),
    )


def load(source: str | Path) -> ViT:
    """The ViT of a run (its best checkpoint) or a checkpoint file, in evaluation mode.

    `vit.classes` are the class names in the order of the logits; `vit.preprocess(paths)` makes its input.

        vit = vitlit.load("runs/finetune")
        probabilities = vit(vit.preprocess(["a.png", "b.png"])).softmax(-1)
        names = [vit.classes[i] for i in probabilities.argmax(-1)]

    Raises:
        UserError: there is no such run or file, or it cannot be read.
    """
    weights = read(source)
    vit = ViT(**weights.config)
    load_weights(vit, weights.path)
    vit.classes = weights.classes
    vit.preprocess = Preprocess(**weights.preprocess) if weights.preprocess else None
    return vit.eval()
