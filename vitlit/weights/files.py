"""Weight files as tensors by name, whoever wrote them. Nothing in a file is executed."""

import argparse
import json
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitlit.errors import UserError
from vitlit.files import MOST_UNPACKED, check_archive, damaged

# What may stand between a checkpoint's top and its state dict, the better choice first.
WRAPPERS = ("teacher", "state_dict_ema", "model", "state_dict", "module")
# Plain values that training scripts leave in checkpoints, beside what torch allows.
RECORDS: list[Any] = [argparse.Namespace, np.dtype, np.float64, type(np.dtype(np.float64)), type(np.dtype(np.int64))]
RECORDS += [np.float64(0).__reduce__()[0]]  # numpy's scalar
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"


class Contents(NamedTuple):
    """What is in a weight file.

    Attributes:
        path: the file.
        kind: its container.
        tensors: by name, out of whatever wrapper they were in.
        wrapper: the wrapper's name, empty for none.
        rest: what a torch file holds beside the tensors, or the metadata of a safetensors file.
    """

    path: Path
    kind: str
    tensors: dict[str, Tensor]
    wrapper: str
    rest: dict[str, Any]

    def beside(self, name: str) -> dict[str, Any]:
        """The JSON file of that name in the same folder, empty where there is none."""
        file = self.path.parent / name
        if not file.is_file():
            return {}
        try:
            content = json.loads(file.read_text())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise UserError(f"{file} holds no JSON object")
        return content


def locate(source: str | Path) -> Path:
    """The weight file that is meant by a file, a run's folder (its best checkpoint, else its last) or a model's folder.

    Raises:
        UserError: there is none.
    """
    source = Path(source).expanduser()
    if source.is_file():
        return source
    names = ("checkpoints/best.ckpt", "checkpoints/last.ckpt", "model.safetensors", "model.safetensors.index.json")
    for name in (*names, "pytorch_model.bin"):
        if (source / name).is_file():
            return source / name
    if source.is_dir():
        raise UserError(
            f"{source} holds no checkpoints/best.ckpt and no model.safetensors; name the folder of a run, or a "
            "checkpoint file"
        )
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not source.parent.is_dir()
    hub = f"; for a model of the hub write hf:{source}" if named and source.parts[0] != "runs" else ""
    raise UserError(f"{source} does not exist; name the folder of a run, or a checkpoint file{hub}")


def open_file(path: Path) -> Contents:
    """Read a weight file; which container it is, its first bytes tell.

    Raises:
        UserError: it is missing, damaged, or none of the containers.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    if path.name.endswith(".index.json"):
        return open_shards(path)
    with path.open("rb") as file:
        first = file.read(16)
    if first[:4] == b"PK\x03\x04":
        names = check_archive(path)
        if any(name.endswith(".npy") for name in names):
            return open_npz(path)
    elif first[8:9] == b"{":
        return open_safetensors(path)
    return open_torch(path)


def open_torch(path: Path) -> Contents:
    """A file of torch.save, read with weights_only: no class in it is made but argparse.Namespace, a plain record."""
    try:
        with torch.serialization.safe_globals(RECORDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = "torch.load refuses it"
        if wanted:
            why = f"it wants to run {wanted[1]}, and nothing in a file is run; save its state dict alone"
        raise damaged(path, why) from error
    except Exception as error:  # a damaged pickle raises anything; nothing of vitlit's is in the try
        raise damaged(path, "torch.load refuses it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} in place of named tensors")
    rest, wrapper = {str(key): value for key, value in content.items() if not isinstance(value, Tensor)}, ""
    found = any(isinstance(value, Tensor) for value in content.values())
    for name in WRAPPERS if found else (*WRAPPERS, *rest):
        if isinstance(rest.get(name), dict):
            content, wrapper = rest[name], name
            break
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claimed > MOST_UNPACKED * path.stat().st_size:  # a tensor may repeat one number, or hold none, in any shape
        raise damaged(path, f"its tensors claim {claimed:,} bytes")
    return Contents(path, "torch", tensors, wrapper, rest)


def open_safetensors(path: Path) -> Contents:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Contents(path, "safetensors", tensors, "", dict(file.metadata() or {}))
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise damaged(path, f"safetensors refuses it ({error})") from error


def open_shards(path: Path) -> Contents:
    """A model.safetensors.index.json and the files beside it."""
    contents = Contents(path, "safetensors", {}, "", {})
    shards = contents.beside(path.name).get("weight_map")
    if not isinstance(shards, dict):
        raise UserError(f"{path} has no weight_map")
    for name in sorted({str(name) for name in shards.values()}):
        if "/" in name or name.startswith("."):
            raise UserError(f"{path} names a shard {name} outside its folder")
        if not (path.parent / name).is_file():
            raise UserError(f"{path} names a shard {name} that is missing")
        contents.tensors.update(open_safetensors(path.parent / name).tensors)
    return contents


def to_tensor(array: np.ndarray) -> Tensor:
    if array.dtype == np.dtype("V2"):  # bfloat16, as JAX saves it
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")))


def open_npz(path: Path) -> Contents:
    try:
        with np.load(path, allow_pickle=False) as file:
            tensors = {name: to_tensor(file[name]) for name in file.files}
    except Exception as error:  # a damaged header raises anything; pickled objects are a ValueError
        raise damaged(path, f"numpy refuses it ({error})") from error
    return Contents(path, "npz", tensors, "", {})
