"""vitlit's own files: a run's checkpoints, and the same weights as safetensors."""

import json
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitlit.errors import UserError
from vitlit.images.preprocess import Preprocess
from vitlit.model import ViT
from vitlit.weights.files import Contents
from vitlit.weights.weights import Weights, tensors


def open_checkpoint(path: Path) -> dict[str, Any]:
    """A vitlit checkpoint's content, tensors mapped from the file. Nothing in the file is executed.

    Raises:
        UserError: the file is missing, damaged, or none that vitlit wrote.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle raises anything; nothing of vitlit's is in the try
        raise UserError(f"{path} is not a checkpoint, or a damaged one: torch.load refuses it") from error
    if not isinstance(checkpoint, dict) or "vitlit" not in checkpoint:
        raise UserError(f"{path} is not a checkpoint that vitlit wrote")
    return checkpoint


def read(contents: Contents) -> Weights | None:
    if not {"vitlit", "crc32"} & contents.rest.keys():  # either: damage to one name must not make it another's file
        return None
    path, about, state = contents.path, contents.rest.get("vitlit", ""), contents.tensors
    if contents.kind == "safetensors":
        if contents.rest.get("crc32") != str(checksum(about, state)):
            raise UserError(f"{path} is damaged: its checksum is wrong")
        about = json.loads(about)
    else:
        state = {name.removeprefix("vit."): t for name, t in state.items() if name.startswith("vit.")}
        state.pop("mask_token", None)
    unused = [name for name in contents.tensors if name == "vit.mask_token"]
    config, preprocess = about["vit"], about["preprocess"]
    return Weights(path, "vitlit", state, config, about["classes"], preprocess, unused, told=frozenset(config))


def about(vit: ViT, classes: list[str], preprocess: Any) -> dict[str, Any]:
    """What a vitlit file says of its weights, as plain values."""
    known = asdict(preprocess) if isinstance(preprocess, Preprocess) else {}
    return {"vit": vit.config.plain(), "classes": list(classes), "preprocess": known}


def metadata(vit: ViT) -> dict[str, str]:
    """The metadata of a safetensors file, with a checksum over it and the tensors."""
    text = json.dumps(about(vit, vit.classes, vit.preprocess))
    return {"format": "pt", "vitlit": text, "crc32": str(checksum(text, tensors(vit)))}


def checksum(text: str, state: dict[str, Tensor]) -> int:
    """CRC-32 of a text and of tensors, names, types and shapes included."""
    crc = zlib.crc32(text.encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), crc)
    return crc
