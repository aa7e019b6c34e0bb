"""What a scan of a large folder found, kept in ROOT/.vitlit: train.npz of ROOT/train, root.npz of ROOT/CLASS.

Adding, removing or renaming a file changes the time of its folder, and a folder's time is all that must be asked:
a thousand for ImageNet, not 1.28 million.
"""

import os
from pathlib import Path

import numpy as np

from vitlit.data.index import Names
from vitlit.data.manifest import SPLITS
from vitlit.files import load_arrays, save_arrays

WORTH = 50_000  # fewer images are scanned in a blink, and nobody's folder is written to
TICK = 2.0  # seconds: a change so shortly before the scan could leave the folder's time as it is


def kept_at(folder: Path) -> Path:
    """Where the scan of a folder is kept: beside a split's, and in any other, where hidden folders are no classes."""
    if folder.name in SPLITS:
        return folder.parent / ".vitlit" / f"{folder.name}.npz"
    return folder / ".vitlit" / "root.npz"


def load(folder: Path, classes: list[str], endings: tuple[bytes, ...]) -> tuple[Names, np.ndarray] | None:
    """The names of a folder's images and how many each class has; None where they are not known, or have changed.

    Args:
        folder: the split's.
        classes: the names of its class folders now.
        endings: of the file names that count as images.
    """
    try:
        known = load_arrays(kept_at(folder))
        if known["key"].tobytes() != _key(classes, endings):
            return None
        folders = Names.check(known["folders"], known["folder_ends"])
        if not np.array_equal(known["times"], _times(folder, [folders[row] for row in range(len(folders))])):
            return None
        names, counts = Names.check(known["names"], known["name_ends"]), known["counts"]
        sound = counts.dtype == np.int64 and counts.shape == (len(classes),) and counts.min(initial=0) >= 0
        return (names, counts) if sound and counts.sum() == len(names) else None
    except (OSError, ValueError, KeyError):  # none, or of no use: the scan says it anew
        return None


def save(
    folder: Path,
    classes: list[str],
    endings: tuple[bytes, ...],
    found: tuple[Names, np.ndarray],
    folders: list[bytes],
    scanned: float,
) -> None:
    """Keep what a scan found, where it is large and the place is writable.

    Args:
        folder: the split's.
        classes: the names of its class folders.
        endings: of the file names that count as images.
        found: the images' names and how many each class has.
        folders: all that were searched, relative to `folder`, which comes first.
        scanned: when the scan began, seconds since the epoch.
    """
    names, counts = found
    target = kept_at(folder)
    if len(names) < WORTH:
        return
    try:
        times = _times(folder, folders)
        if times.max() > (scanned - TICK) * 1e9:
            return
        target.parent.mkdir(exist_ok=True)
        times[0] = _times(folder, folders[:1])[0]  # which changes where it is made in this very folder
        searched = Names.pack(folders)
        arrays = {"key": np.frombuffer(_key(classes, endings), np.uint8), "counts": counts, "times": times}
        arrays |= {"names": names.packed, "name_ends": names.ends}
        save_arrays(target, {**arrays, "folders": searched.packed, "folder_ends": searched.ends})
    except OSError:
        return  # read-only data is scanned each time


def _key(classes: list[str], endings: tuple[bytes, ...]) -> bytes:
    return b"1\0" + b" ".join(endings) + b"\0" + "\0".join(classes).encode(errors="surrogateescape")


def _times(folder: Path, folders: list[bytes]) -> np.ndarray:
    """When each folder last changed, nanoseconds."""
    root = os.fsencode(folder)
    return np.array([os.stat(os.path.join(root, below)).st_mtime_ns for below in folders], np.int64)
