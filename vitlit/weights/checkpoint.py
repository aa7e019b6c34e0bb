"""Reading vitlit's own checkpoints."""

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitlit.errors import UserError


class Weights(NamedTuple):
    """A ViT's weights and what belongs to them.

    Attributes:
        path: the file they come from.
        state: tensors by the ViT's parameter names.
        config: the ViT's constructor arguments.
        classes: class names in the order of the head's outputs; none where the head has no classes.
        preprocess: arguments of `vitlit.data.Preprocess`; none where the data came from elsewhere.
    """

    path: Path
    state: dict[str, Tensor]
    config: dict[str, Any]
    classes: list[str]
    preprocess: dict[str, Any]


def locate(source: str | Path) -> Path:
    """The checkpoint of a run folder (its best, else its last), or the file itself.

    Raises:
        UserError: there is none.
    """
    source = Path(source)
    if source.is_file():
        return source
    for name in ("best.ckpt", "last.ckpt"):
        if (source / "checkpoints" / name).is_file():
            return source / "checkpoints" / name
    if source.is_dir():
        raise UserError(f"{source} holds no checkpoints/best.ckpt; name the folder of a run, or a checkpoint file")
    raise UserError(f"{source} does not exist; name the folder of a run, or a checkpoint file")


def open_checkpoint(path: Path) -> dict[str, Any]:
    """A vitlit checkpoint's content, tensors mapped from the file. Nothing in the file is executed.

    Raises:
        UserError: the file is missing, damaged, or none that vitlit wrote.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is not a checkpoint, or a damaged one: torch.load refuses it") from error
    if not isinstance(checkpoint, dict) or "vitlit" not in checkpoint:
        raise UserError(f"{path} is not a checkpoint that vitlit wrote")
    return checkpoint


def read(source: str | Path) -> Weights:
    """The weights in a run folder or checkpoint file; UserError as `locate` and `open_checkpoint`."""
    path = locate(source)
    checkpoint = open_checkpoint(path)
    about = checkpoint["vitlit"]
    state = {name.removeprefix("vit."): t for name, t in checkpoint["state_dict"].items() if name.startswith("vit.")}
    return Weights(path, state, about["vit"], about["classes"], about["preprocess"])
