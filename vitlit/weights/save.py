"""Write a ViT's weights in any of the formats."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vitlit.errors import UserError
from vitlit.files import expand, whole_file
from vitlit.images.preprocess import Preprocess
from vitlit.model import ViT
from vitlit.weights import checkpoint, google, hf, timm, torchvision
from vitlit.weights.hub import CONFIG, PREPROCESSOR
from vitlit.weights.weights import tensors

Format = Literal["vitlit", "timm", "hf", "torchvision", "google"]
ENDINGS = {"vitlit": (".safetensors", ".ckpt"), "google": (".npz",)}  # the others' are .safetensors, .pth and .pt
# Each gives the tensors of the format's model of the same network; UserError if there is none.
WRITERS = {"timm": timm.write, "hf": hf.write, "torchvision": torchvision.write, "google": google.write}


def save_weights(vit: ViT, path: str | Path, format: Format = "vitlit") -> Path:
    """Write a ViT's weights for another tool, or for vitlit itself; returns the file with the weights.

    UserError if the format has no such network or no such file ending, or the file cannot be written.

    Args:
        vit: with `classes` and `preprocess` if they are known.
        path: a .safetensors or .pth file (vitlit: .safetensors or .ckpt; google: .npz). For hf a folder, which gets
            model.safetensors, config.json and preprocessor_config.json.
        format: vitlit, timm, hf, torchvision or google.
    """
    path, endings = Path(expand(path)), ENDINGS.get(format, (".safetensors", ".pth", ".pt"))
    if format not in get_args(Format):
        raise UserError(f"format {format!r} is none of {' '.join(get_args(Format))}")
    if format != "hf" and path.suffix not in endings:
        raise UserError(f"{path} ends in none of {' '.join(endings)}, which the format {format} has")
    try:
        state = WRITERS.get(format, tensors)(vit)
        known = hf.processor(vit.preprocess) if format == "hf" and isinstance(vit.preprocess, Preprocess) else None
    except UserError as error:
        raise UserError(f"{path} was not written: {error}") from error
    if format == "hf":
        write(path / CONFIG, hf.config(vit))
        if known:
            write(path / PREPROCESSOR, known)
        path = path / "model.safetensors"
    # Contiguous copies on the CPU that share no memory, which safetensors demands.
    state = {name: t.cpu().clone(memory_format=torch.contiguous_format) for name, t in state.items()}
    if path.suffix == ".ckpt":
        state = {f"vit.{name}": tensor for name, tensor in state.items()}
        write(path, {"vitlit": checkpoint.about(vit, vit.classes, vit.preprocess), "state_dict": state})
    else:
        write(path, state, checkpoint.metadata(vit, format) if format != "hf" else None)
    return path


def write(path: Path, content: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write a file in the way of its ending, and its folder, whole or not at all; UserError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            if path.suffix == ".safetensors":
                save_file(content, partial, metadata or {"format": "pt"})
            elif path.suffix == ".json":
                partial.write_text(json.dumps(content, indent=2) + "\n")
            elif path.suffix == ".npz":
                with partial.open("wb") as file:
                    np.savez(file, **content)
            else:
                if metadata:  # where Module.state_dict has some; load_state_dict ignores what it does not know
                    content = OrderedDict(content)
                    content._metadata = {"": metadata}  # type: ignore[attr-defined]
                torch.save(content, partial)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {' '.join(str(error).split())}") from error
