"""Features of a folder's images by any weights, kept in the user's cache."""

import hashlib
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from vitlit.data.dataset import Images
from vitlit.data.index import Index
from vitlit.data.shard_index import ShardFiles
from vitlit.data.workers import count, loader
from vitlit.errors import UserError
from vitlit.evaluation import features
from vitlit.files import load_arrays, save_arrays
from vitlit.weights import load


def ready(source: str, image_size: int) -> Any:
    """A ViT on the GPU if there is one, for images of its own size or another; UserError without preprocessing."""
    vit: Any = load(source)
    if vit.preprocess is None:
        raise UserError(f"{source} does not say how to preprocess images; set vit.preprocess, and save_weights")
    if image_size:
        vit.preprocess = replace(vit.preprocess, image_size=(image_size, image_size))
    return vit.to("cuda" if torch.cuda.is_available() else "cpu")


def extract(vit: Any, index: Index, names: list[str]) -> dict[str, Tensor]:
    """`features` of images, kept in the user's cache by weights, preprocessing, and the files' paths, sizes, times."""
    device, preprocess = next(vit.parameters()).device, vit.preprocess
    key = hashlib.blake2b(save(dict(vit.state_dict())), digest_size=16)
    key.update(repr([torch.__version__, device.type, vit.config, preprocess, names, index.digest()]).encode())
    if isinstance(index.files, ShardFiles):  # whose parts hold checksums of headers
        key.update(repr([index.files.root, index.files.shards]).encode() + index.files.parts.tobytes())
    else:
        status = ((path := index.path(row), os.stat(path)) for row in range(len(index)))
        key.update(repr([(path, each.st_size, each.st_mtime_ns) for path, each in status]).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vitlit" / "features"
    file = cache / f"{key.hexdigest()}.npz"
    with suppress(OSError, ValueError):  # missing or damaged
        return {name: torch.from_numpy(array) for name, array in load_arrays(file).items()}
    images = Images(index, preprocess.crop, ground=preprocess.ground)
    batches = loader(images, range(len(index)), 64, count(torch.cuda.device_count()))
    found = features(vit, (preprocess.normalise(batch[0].to(device).permute(0, 3, 1, 2)) for batch in batches), names)
    with suppress(OSError):  # without a writable cache they are extracted each time
        cache.mkdir(parents=True, exist_ok=True)
        save_arrays(file, {name: part.numpy() for name, part in found.items()})
    return found
