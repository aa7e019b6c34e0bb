"""Sets of images in tars (shards), as WebDataset has them: index.npz next to them says where each image lies.

`vitlit data shard` writes it; for a set made elsewhere it is made at first use and kept there, or in the user's cache.
"""

import fcntl
import hashlib
import os
from contextlib import ExitStack, suppress
from pathlib import Path

from vitlit.data.manifest import Manifest
from vitlit.data.shard_index import INDEX, ShardIndex, load_index, save_index
from vitlit.data.storage import Folder, connect, join, reason
from vitlit.data.webdataset import list_tars, search
from vitlit.errors import UserError


def is_shards(root: str) -> bool:
    """Whether a data root is a URL, or a folder with index.npz, or with tars in it or in its folder train."""
    folder = Path(root)
    if "://" in root or (folder / INDEX).is_file():
        return True
    if any(path.is_dir() for path in folder.glob("train/[!.]*")):  # which the tars may be an archive of
        return False
    return any((*folder.glob("*.tar"), *folder.glob("train/*.tar")))


def read_shards(root: str) -> Manifest:
    """The classes and splits of the shards at a path or URL; a set made elsewhere may lack the split train."""
    folder = connect(root)
    try:
        served = folder.filesystem.cat_file(join(folder.path, INDEX))
    except FileNotFoundError:
        served = None
    except Exception as error:  # each filesystem raises its own
        raise UserError(f"cannot read {join(root, INDEX)}: {reason(error)}") from error
    index = None if served is None else load_index(served, root, join(root, INDEX))
    if index is None or index.key:
        return _index_made_here(folder, index).manifest
    for shard, size in zip(index.shards, index.sizes.tolist(), strict=True) if "://" not in root else ():
        file = Path(root) / shard
        if (found := file.stat().st_size if file.is_file() else "no") != size:
            raise UserError(f"{file} has {found} bytes, {size} by {INDEX}; write both anew with `vitlit data shard`")
    return index.manifest


def _index_made_here(folder: Folder, served: ShardIndex | None) -> ShardIndex:
    """The index of tars made elsewhere: as served or kept, or made now and kept."""
    tars, classes, key = list_tars(folder)
    root, remote = folder.root, "://" in folder.root
    location = root if remote else os.path.abspath(root)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vitlit"
    cached = cache / f"{hashlib.sha256(location.encode(errors='surrogateescape')).hexdigest()[:16]}.npz"
    files = (cached,) if remote else (Path(root) / INDEX, cached)

    def fresh(index: ShardIndex) -> bool:
        # Times of modification follow the \0; a copy on a server has its own.
        return index.key.partition(b"\0")[0] == key.partition(b"\0")[0] if remote else index.key == key

    def kept() -> ShardIndex | None:
        indices = (load_index(file.read_bytes(), root, str(file)) for file in files if file.is_file())
        return next(filter(fresh, indices), None)

    index = served if served and fresh(served) else kept()
    if index is not None:
        return index
    with ExitStack() as stack:
        with suppress(OSError):  # without a writable cache each process searches
            cache.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(cached.with_suffix(".lock").open("w")), fcntl.LOCK_EX)
        index = kept()  # by the process that had the lock
        if index is None:
            index = search(folder, tars, classes)._replace(key=key)
            for file in files:  # the first that can be written
                with suppress(OSError):
                    save_index(file, index)
                    break
    return index
