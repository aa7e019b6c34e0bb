"""A ViT into a file of any main format."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vitlit.errors import UserError
from vitlit.images.preprocess import Preprocess
from vitlit.model import ViT
from vitlit.weights import checkpoint, google, hf, timm, torchvision
from vitlit.weights.files import CONFIG, PREPROCESSOR

Format = Literal["vitlit", "timm", "hf", "torchvision", "google"]
ENDINGS = {"vitlit": (".safetensors", ".ckpt"), "google": (".npz",)}  # the others' are .safetensors, .pth and .pt


def save_weights(vit: ViT, path: str | Path, format: Format = "vitlit") -> Path:
    """Write a ViT's weights for another tool, or for vitlit itself.

    Args:
        vit: the ViT, with `classes` and `preprocess` where they are known.
        path: a .safetensors or .pth file (vitlit: .safetensors or .ckpt); .npz for google; for hf a folder, which
            gets model.safetensors, config.json and preprocessor_config.json.
        format: vitlit, timm, hf, torchvision or google.

    Returns:
        the file with the weights.

    Raises:
        UserError: the format has no such network, or the file's ending is not one of its.
    """
    path = Path(path)
    if format not in get_args(Format):
        raise UserError(f"format {format!r} is none of {' '.join(get_args(Format))}")
    if format == "hf":
        return save_folder(vit, path)
    endings = ENDINGS.get(format, (".safetensors", ".pth", ".pt"))
    if path.suffix not in endings:
        raise UserError(f"{path} ends in none of {' '.join(endings)}, which the format {format} has")
    if format == "google":
        arrays = google.write(vit, path)
        replace(path, lambda part: google.save(arrays, part))
    elif format == "timm":
        write_tensors(timm.write(vit, path), path)
    elif format == "torchvision":
        write_tensors(torchvision.write(vit, path), path)
    elif path.suffix == ".safetensors":
        write_tensors(vit.state_dict(), path, checkpoint.metadata(vit))
    else:
        state = {f"vit.{name}": tensor for name, tensor in detached(vit.state_dict()).items()}
        content = {"vitlit": checkpoint.about(vit, vit.classes, vit.preprocess), "state_dict": state}
        replace(path, lambda part: torch.save(content, part))
    return path


def save_folder(vit: ViT, path: Path) -> Path:
    """A folder for from_pretrained; or a .safetensors file, with config.json beside it."""
    state, about = hf.write(vit, path)
    file = path if path.suffix == ".safetensors" else path / "model.safetensors"
    write_tensors(state, file)
    replace(file.parent / CONFIG, lambda part: hf.save_json(part, about))
    if isinstance(vit.preprocess, Preprocess):
        known = hf.processor(vit.preprocess)
        replace(file.parent / PREPROCESSOR, lambda part: hf.save_json(part, known))
    return file


def detached(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that share no memory, as safetensors wants them."""
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


def write_tensors(state: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    state = detached(state)
    if path.suffix == ".safetensors":
        replace(path, lambda part: save_file(state, part, metadata or {"format": "pt"}))
    else:
        replace(path, lambda part: torch.save(state, part))


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {' '.join(str(error).split())}") from error
    finally:
        if part.parent.is_dir():
            part.unlink(missing_ok=True)
