"""A ViT into a file of any main format."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vitlit.errors import UserError
from vitlit.files import whole_file
from vitlit.images.preprocess import Preprocess
from vitlit.model import ViT
from vitlit.weights import checkpoint, google, hf, timm, torchvision
from vitlit.weights.files import CONFIG, PREPROCESSOR
from vitlit.weights.weights import tensors

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
        with writing(path) as partial:
            google.save(arrays, partial)
    elif format == "timm":
        write_tensors(timm.write(vit, path), path)
    elif format == "torchvision":
        write_tensors(torchvision.write(vit, path), path)
    elif path.suffix == ".safetensors":
        write_tensors(tensors(vit), path, checkpoint.metadata(vit))
    else:
        state = {f"vit.{name}": tensor for name, tensor in detached(tensors(vit)).items()}
        content = {"vitlit": checkpoint.about(vit, vit.classes, vit.preprocess), "state_dict": state}
        with writing(path) as partial:
            torch.save(content, partial)
    return path


def save_folder(vit: ViT, path: Path) -> Path:
    """A folder for from_pretrained; or a .safetensors file, with config.json beside it."""
    state, about = hf.write(vit, path)
    file = path if path.suffix == ".safetensors" else path / "model.safetensors"
    write_tensors(state, file)
    with writing(file.parent / CONFIG) as partial:
        hf.save_json(partial, about)
    if isinstance(vit.preprocess, Preprocess):
        known = hf.processor(vit.preprocess)
        with writing(file.parent / PREPROCESSOR) as partial:
            hf.save_json(partial, known)
    return file


def detached(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that share no memory, as safetensors wants them."""
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


def write_tensors(state: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    state = detached(state)
    with writing(path) as partial:
        if path.suffix == ".safetensors":
            save_file(state, partial, metadata or {"format": "pt"})
        else:
            torch.save(state, partial)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Write a file, and its folder, whole or not at all; UserError where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            yield partial
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {' '.join(str(error).split())}") from error
