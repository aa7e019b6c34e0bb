"""Reads the `.wandb` file of an offline run, for which wandb itself has no reader in Python."""

import struct
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK = 32 * 1024


def read_wandb(path: str | Path) -> list[Any]:
    """All `Record`s in order; what follows a half-written one is left out.

    Raises:
        ValueError: This is not a `.wandb` file.
    """
    data = Path(path).read_bytes()
    if len(data) < 7 or struct.unpack_from("<4sH", data) != (b":W&B", 0xBEE1):
        raise ValueError(f"{path} is not a .wandb file")
    records, parts, at = [], b"", 7
    while at + 7 <= len(data):
        if (left := BLOCK - at % BLOCK) < 7:  # the end of a block, too short for a header
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        chunk = data[at + 7 : at + 7 + length]
        at += 7 + length
        if len(chunk) < length or kind == 0:
            break
        parts = chunk if kind in (1, 2) else parts + chunk
        if kind in (1, 4):
            records.append(wandb_internal_pb2.Record.FromString(parts))  # type: ignore[attr-defined]
    return records
