"""Features of a folder's images by any weights, computed by one process or by several, and kept in the user's cache."""

import hashlib
import os
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, distributed

from vitlit.data.dataset import REMOVE, Images
from vitlit.data.index import Index
from vitlit.data.workers import count, loader
from vitlit.evaluation.features import BLOCK, features
from vitlit.files import load_arrays, save_arrays
from vitlit.weights.door import load_prepared


def ready(source: str, image_size: int | None = None) -> Any:
    """`load_prepared`, on this process's GPU if it has one."""
    return load_prepared(source, image_size).to(
        f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    )


def ranks() -> tuple[int, int]:
    """The number of this process, and of how many that torchrun started."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def extract(vit: Any, index: Index, names: list[str]) -> dict[str, Tensor]:
    """`features` of images, kept in the user's cache by weights, preprocessing, and the files' paths, sizes, times.

    Each of several processes computes those of a share of the images, of whole blocks, and gets all; each must call it.
    """
    device, preprocess = next(vit.parameters()).device, vit.preprocess
    key = hashlib.blake2b(save(dict(vit.state_dict())), digest_size=16)
    key.update(repr([torch.__version__, device.type, vit.config, preprocess, names, index.digest()]).encode())
    key.update(index.files.stamp(index.rows))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vitlit" / "features"
    file = cache / f"{key.hexdigest()}.npz"
    rank, processes = ranks()
    cached: list[Any] = [None]
    if rank == 0:
        with suppress(OSError, ValueError):  # missing or damaged
            cached = [load_arrays(file)]
    if processes > 1:
        if not distributed.is_initialized():  # the others wait while the first one measures
            distributed.init_process_group("gloo", timeout=timedelta(days=1))
        distributed.broadcast_object_list(cached)
    if cached[0] is not None:
        return {name: torch.from_numpy(array) for name, array in cached[0].items()}
    share = -(-len(index) // (BLOCK * processes)) * BLOCK
    rows = range(rank * share, len(index))[:share]
    images = Images(index, preprocess.crop, preprocess=preprocess, remedy=REMOVE)
    batches = loader(images, rows, BLOCK, count(max(torch.cuda.device_count(), processes)))
    inputs = (preprocess.normalise(batch[0].to(device).permute(0, 3, 1, 2)) for batch in batches)
    found = features(vit, inputs, names) if rows else {}
    if processes > 1:
        parts: list[Any] = [None] * processes
        distributed.all_gather_object(parts, found)
        found = {name: torch.cat([part[name] for part in parts if part]) for name in names}
    if rank == 0:
        with suppress(OSError):  # without a writable cache they are extracted each time
            cache.mkdir(parents=True, exist_ok=True)
            save_arrays(file, {name: part.numpy() for name, part in found.items()})
    return found
