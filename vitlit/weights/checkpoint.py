"""vitlit's own files, and what it knows of a network in the metadata of the files that it writes in other formats."""

import json
import math
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitlit.errors import UserError
from vitlit.images.preprocess import Preprocess
from vitlit.model import ViT
from vitlit.model.lora import merge
from vitlit.weights.files import Contents, load_torch
from vitlit.weights.weights import Weights, tensors

# A checkpoint's weights are those of the average of the steps' weights, where the run kept one, and so of the teacher
# that an objective moves, where it has one; else the encoder's. EMA's average is under the names of the encoder.
TEACHER = "objective.teacher_vit."
KEY, EXPORTED = "vitlit_export", "the file's metadata"
# The options that no tensor shows.
OPTIONS = (
    *("image_size", "heads", "pool", "pool_prefix", "mlp", "norm_eps"),
    *("position", "class_position", "partial_patches", "resampling"),
)


def open_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a vitlit checkpoint, its tensors mapped from the file; UserError if it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    checkpoint = load_torch(path)
    if not isinstance(checkpoint, dict) or "vitlit" not in checkpoint:
        raise UserError(f"{path} is not a checkpoint of vitlit")
    return checkpoint


def read(contents: Contents) -> Weights | None:
    if not {"vitlit", "crc32"} & contents.rest.keys():  # one may be damaged, and it is still not another's file
        return None
    about, state = contents.rest.get("vitlit", ""), contents.tensors
    if contents.kind == "safetensors":
        if contents.rest.get("crc32") != str(checksum(about, state)):
            raise UserError("the file is damaged: its checksum is wrong")
        about = json.loads(about)
    else:
        state = in_units_of_labels(merge(state)[0])  # the raw weights beside an average have their adapters
        vit = TEACHER if any(name.startswith(TEACHER) for name in state) else "vit."
        state = {name.removeprefix(vit): t for name, t in state.items() if name.startswith(vit)}
    unused = ["vit.mask_token"] if state.pop("mask_token", None) is not None else []
    known = frozenset({*about["vit"], "preprocess"})
    temperature = float(about.get("temperature", 1.0))
    if not 0 < temperature < math.inf:
        raise UserError(f"the temperature {temperature} is not above 0")
    # A run's file tells the loss, since older ones do not tell the activation.
    objective = contents.rest.get("hyper_parameters", {}).get("objective") or {}
    loss = (objective.get("init_args") or {}).get("loss") or about.get("activation")
    said = about["vit"], about["classes"], about["preprocess"]
    activation = "sigmoid" if loss in ("sigmoid", "bce") else "softmax"
    return Weights(contents.path, "vitlit", state, *said, unused, known, {}, temperature, activation)


def in_units_of_labels(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors with a head that gives numbers as `Regression.predictions` does."""
    if "objective.label_std" not in state:
        return state
    mean, std = (state[f"objective.label_{name}"].double() for name in ("mean", "std"))
    scaled = dict(state)
    for head in ("vit.head", "vit.head_dist"):
        if f"{head}.weight" in state:
            weight, bias = state[f"{head}.weight"], state[f"{head}.bias"]
            scaled[f"{head}.weight"] = (weight.double() * std).to(weight.dtype)
            scaled[f"{head}.bias"] = (bias.double() * std + mean).to(bias.dtype)
    return scaled


def about(vit: ViT, classes: list[str], preprocess: Any) -> dict[str, Any]:
    """What a vitlit file holds besides the tensors, as values that JSON can hold."""
    known = asdict(preprocess) if isinstance(preprocess, Preprocess) else {}
    plain = {"vit": vit.config.plain(), "classes": list(classes), "preprocess": known}
    return plain | {"temperature": vit.temperature, "activation": vit.activation}


def metadata(vit: ViT, format: str) -> dict[str, str]:
    """The metadata of a file; of vitlit's own with a checksum over it and the tensors."""
    text = json.dumps(about(vit, vit.classes, vit.preprocess))
    if format != "vitlit":
        return {"format": "pt", KEY: text}
    return {"format": "pt", "vitlit": text, "crc32": str(checksum(text, tensors(vit)))}


def exported(contents: Contents) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """Options, classes and preprocessing that vitlit wrote into a file of another format; empty if it did not."""
    if KEY not in contents.rest:
        return {}, [], {}
    known = json.loads(contents.rest[KEY])
    options = {name: known["vit"][name] for name in OPTIONS if name in known["vit"]}
    return options, [str(name) for name in known["classes"]], dict(known["preprocess"])


def checksum(text: str, state: dict[str, Tensor]) -> int:
    """CRC-32 of a text and of tensors with their names, types and shapes."""
    crc = zlib.crc32(text.encode())
    for name in sorted(state):
        tensor = state[name].cpu().contiguous()
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), crc)
    return crc
