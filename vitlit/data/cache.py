"""Scans of large folders, kept in ROOT/.vitlit and valid until the modification time of one of its folders changes."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from vitlit.data.index import ENDINGS, Names
from vitlit.data.manifest import SPLITS
from vitlit.files import load_arrays, save_arrays

WORTH = 50_000  # fewer images are scanned quickly enough without writing to the user's folder
TICK = 2.0  # seconds; a change this soon before the scan might leave the folder's time as it is


def kept_at(folder: Path) -> Path:
    """ROOT/.vitlit/train.npz for ROOT/train, FOLDER/.vitlit/root.npz for any other; what is hidden is no class."""
    if folder.name in SPLITS:
        return folder.parent / ".vitlit" / f"{folder.name}.npz"
    return folder / ".vitlit" / "root.npz"


def load(folder: Path, classes: list[str]) -> tuple[Names, np.ndarray, str] | None:
    """The kept names of the images, how many each class has, and what is not read; None if the folder changed."""
    try:
        scan = load_arrays(kept_at(folder))
        times = _times(folder, Names(scan["folders"], scan["folder_ends"]))
        fresh = scan["key"].tobytes() == _key(classes) and np.array_equal(scan["times"], times)
        names = Names(scan["names"], scan["name_ends"])
        return (names, scan["counts"], scan["unread"].tobytes().decode()) if fresh else None
    except (OSError, ValueError, KeyError):  # missing or damaged
        return None


def save(
    folder: Path, classes: list[str], found: tuple[Names, np.ndarray, str], folders: list[bytes], scanned: float
) -> None:
    """Keep what `load` gives, of a scan of `folders`, this one first, that began at `scanned` (s), if it is large."""
    names, counts, unread = found
    if len(names) < WORTH:
        return
    with suppress(OSError):  # read-only data is scanned each time
        times = _times(folder, folders)
        if times.max() > (scanned - TICK) * 1e9:
            return
        file = kept_at(folder)
        file.parent.mkdir(exist_ok=True)
        times[0] = _times(folder, folders[:1])[0]  # a new .vitlit in this folder changes it
        arrays = {"key": np.frombuffer(_key(classes), np.uint8), "counts": counts, "times": times}
        arrays |= {"names": names.packed, "name_ends": names.ends}
        arrays["unread"] = np.frombuffer(unread.encode(), np.uint8)
        searched = Names.pack(folders)
        save_arrays(file, arrays | {"folders": searched.packed, "folder_ends": searched.ends})


def _key(classes: list[str]) -> bytes:
    return b"2\0" + b" ".join(ENDINGS) + b"\0" + "\0".join(classes).encode(errors="surrogateescape")


def _times(folder: Path, folders: Iterable[bytes]) -> np.ndarray:
    root = os.fsencode(folder)
    return np.array([os.stat(os.path.join(root, below)).st_mtime_ns for below in folders], np.int64)
