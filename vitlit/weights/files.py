"""Weight files of any container as tensors by name. Nothing in a file is executed."""

import argparse
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitlit.errors import UserError
from vitlit.files import check_archive, damaged, expand, from_here, load_arrays
from vitlit.weights import hub
from vitlit.weights.averaged import RAW, Choice, pick_key, pick_names

# Plain values that training scripts leave in checkpoints and that torch does not allow by itself; the last is
# numpy's scalar.
RECORDS: list[Any] = [argparse.Namespace, np.dtype, np.float64, type(np.dtype(np.float64)), type(np.dtype(np.int64))]
RECORDS += [np.float64(0).__reduce__()[0]]


def skips(patterns: Iterable[str], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


class Contents(NamedTuple):
    path: Path
    kind: str  # of container: torch, safetensors or npz
    tensors: dict[str, Tensor]
    wrapper: str  # the key that the tensors were under, empty for none
    rest: dict[str, Any]  # the other values of a torch file, or the metadata of a safetensors file
    origin: str = ""  # of averaged or raw weights; empty if the file does not tell which it has
    skip: Sequence[str] = ()  # shell patterns of names that the user leaves out

    def beside(self, name: str) -> dict[str, Any]:
        """The content of a JSON file in the same folder, empty if there is none."""
        file = self.path.parent / name
        try:
            return dict(json.loads(file.read_text())) if file.is_file() else {}
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{file} is not JSON, or cannot be read: {error}") from error


def locate(source: str | Path) -> Path:
    """The weight file at `source`: a file, the folder of a run (best checkpoint, else last) or of a model, or hf:..."""
    if str(source).startswith("hf:"):
        return hub.fetch(str(source))
    source = Path(expand(source))
    if source.is_file():
        return source
    for name in ("checkpoints/best.ckpt", "checkpoints/last.ckpt", *hub.FILES, "pytorch_model.bin"):
        if (source / name).is_file():
            if name.endswith("last.ckpt"):
                tell_last(source / name)
            return source / name
    remedy = "name the folder of a run, or a checkpoint file"
    if source.is_dir():
        raise UserError(f"{source} holds no checkpoints/best.ckpt and no model.safetensors; {remedy}")
    if re.fullmatch(r"(?!runs/)[\w.-]+/[\w.-]+", str(source)) and not source.parent.is_dir():
        remedy += f"; for a model of the hub write hf:{source}"
    raise UserError(f"{source} does not exist; {remedy}")


@cache  # a command may locate its weights twice
def tell_last(path: Path) -> None:
    if not any(int(os.environ.get(name, 0)) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK")):
        print(f"{from_here(path.parent.parent)} has no best.ckpt: its last.ckpt is used", flush=True)


def open_file(path: Path, weights: Choice = "averaged", skip: Sequence[str] = ()) -> Contents:
    """Read the averaged or the raw weights of a file; UserError if it is missing, damaged, or does not have those."""
    contents = open_container(path, weights)
    stems = [name for name, tensor in contents.tensors.items() if tensor.ndim == 4]
    if picked := pick_names(stems, weights):
        tensors = {name: tensor for name, tensor in contents.tensors.items() if not name.startswith(picked[0])}
        contents = contents._replace(tensors=tensors, origin=picked[1])
    if weights == "raw" and not contents.origin:
        raise UserError(f"{path} has no raw weights beside averaged ones; those of a run are in last.ckpt")
    return contents._replace(skip=skip)


def open_container(path: Path, weights: Choice) -> Contents:
    """Read a weight file, in whatever container its first bytes show."""
    if path.name.endswith(".index.json"):
        return open_shards(path)
    try:
        with path.open("rb") as file:
            first = file.read(64)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if first.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a git-lfs pointer, not the weights: `git lfs pull` in its repository fetches them")
    if first.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise UserError(f"{path} is an HTML page, not weights: download the file itself")
    if first[:4] == b"PK\x03\x04":
        if any(name.endswith(".npy") for name in check_archive(path)):
            return open_npz(path)
    elif first[8:9] == b"{":
        return open_safetensors(path)
    return open_torch(path, weights)


def load_torch(path: Path) -> Any:
    """Read a file of torch.save and execute nothing in it: of all classes, only tensors and `RECORDS` are built."""
    try:
        with torch.serialization.safe_globals(RECORDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle raises anything
        code, why = re.search(r"GLOBAL ([\w.]+)", str(error)), "torch.load refuses it"
        if code and isinstance(error, pickle.UnpicklingError):
            why = f"it wants to run {code[1]}, and nothing in a file is run; save its state dict alone"
        raise damaged(path, why) from error


def open_torch(path: Path, weights: Choice) -> Contents:
    content = load_torch(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} instead of named tensors")
    rest = {str(key): value for key, value in content.items() if not isinstance(value, Tensor)}
    bare = len(rest) < len(content)
    values = {name: value.values() for name, value in rest.items() if isinstance(value, dict)}
    keys = [name for name in values if any(isinstance(value, Tensor) for value in values[name])]
    wrapper, origin = pick_key(keys, weights)
    wrapper = wrapper or next((name for name in (*RAW, *([] if bare else keys)) if name in keys), "")
    content = rest[wrapper] if wrapper else content
    match getattr(content, "_metadata", None):  # what `exported` may have left there
        case {"": dict(about)}:
            rest |= {name: value for name, value in about.items() if isinstance(value, str)}
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor) and key != "n_averaged"}
    return Contents(path, "torch", tensors, wrapper, rest, origin)


def open_safetensors(path: Path) -> Contents:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Contents(path, "safetensors", tensors, "", dict(file.metadata() or {}))
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise damaged(path, f"safetensors refuses it ({error})") from error


def open_shards(path: Path) -> Contents:
    """Read a model.safetensors.index.json and the files beside it."""
    contents = Contents(path, "safetensors", {}, "", {})
    for name in sorted(set(contents.beside(path.name)["weight_map"].values())):
        if Path(name).name != name or not (path.parent / name).is_file():
            raise UserError(f"{path} names a shard {name} that is missing from its folder")
        contents.tensors.update(open_safetensors(path.parent / name).tensors)
    return contents


def open_npz(path: Path) -> Contents:
    try:
        tensors = {name: to_tensor(array) for name, array in load_arrays(path).items()}
    except (OSError, ValueError, TypeError) as error:  # of pickled objects, or of arrays that are no numbers
        raise damaged(path, f"numpy refuses it ({error})") from error
    return Contents(path, "npz", tensors, "", {})


def to_tensor(array: np.ndarray) -> Tensor:
    if array.dtype == np.dtype("V2"):  # bfloat16, as JAX saves it
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")))
