"""A temperature, stored with the weights whose logits it was fitted on."""

import json
from pathlib import Path

from vitlit.errors import UserError
from vitlit.weights.checkpoint import checksum, open_checkpoint
from vitlit.weights.files import locate, open_file
from vitlit.weights.save import write


def check_storable(source: str) -> None:
    """UserError unless the weights at `source` are in a file that can hold a temperature."""
    path = locate(source)
    contents = open_file(path)
    remedy = f"`vitlit weights convert {source} FILE.safetensors --format vitlit` makes a file that can"
    if source.startswith("hf:") or "vitlit" not in contents.rest:
        raise UserError(f"{source} is no file of vitlit's, and cannot hold a temperature; {remedy}")
    if "optimizer_states" in contents.rest:
        raise UserError(f"{path} is to continue a training, and does not hold a temperature; {remedy}")


def store_temperature(source: str, temperature: float) -> Path:
    """Write a temperature into a file of vitlit's, whose weights stay as they are, and return its path."""
    path = locate(source)
    if path.suffix == ".ckpt":
        checkpoint = open_checkpoint(path)
        checkpoint["vitlit"]["temperature"] = temperature
        write(path, checkpoint)
    else:
        contents = open_file(path)
        text = json.dumps(json.loads(contents.rest["vitlit"]) | {"temperature": temperature})
        known = {"vitlit": text, "crc32": str(checksum(text, contents.tensors))}
        write(path, contents.tensors, contents.rest | known)
    return path
