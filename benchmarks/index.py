"""As many empty files as ImageNet has: how long a scan takes, and how much a worker's memory grows by reading.

    python benchmarks/index.py --out benchmarks/results/index.json

It writes 1,281,000 empty files in 1,000 folders to a temporary folder, and removes them at the end.
"""

import argparse
import os
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from runs import write

from vitlit.data import folder
from vitlit.data.cache import TICK
from vitlit.data.index import Index
from vitlit.data.stream import TrainStream

CLASSES, IMAGES = 1000, 1281
READS = 250_000
START = 1_000_000  # images into an epoch


def make(root: Path) -> None:
    for label in range(CLASSES):
        own = root / "train" / f"n{label:08d}"
        own.mkdir(parents=True)
        for image in range(IMAGES):
            os.close(os.open(own / f"n{label:08d}_{image}.JPEG", os.O_CREAT | os.O_WRONLY))


def seconds(function: Any, *given: Any) -> float:
    start = time.perf_counter()
    function(*given)
    return time.perf_counter() - start


def private_memory() -> int:
    """Bytes of this process that are shared with no other."""
    rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(row.split()[1]) for row in rows if row.startswith(("Private_Clean", "Private_Dirty")))


def grown(index: Index, queue: Any) -> None:
    """Put the growth of a forked worker's private memory while it reads, in bytes, into the queue."""
    before = private_memory()
    draw = np.random.default_rng(0)
    for _ in range(READS):
        index.read(int(draw.integers(len(index))))
    queue.put(private_memory() - before)


def growth(index: Index) -> int:
    context = get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=grown, args=(index, queue))
    worker.start()
    size: int = queue.get()
    worker.join()
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def row(name: str, value: float, unit: str) -> None:
        rows.append({"name": name, "value": round(value, 3), "unit": unit})
        print(f"{name:<60} {value:.3f} {unit}", flush=True)

    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "data"
        make(root)
        time.sleep(TICK + 1)
        folder.scan_train(root)
        kept = root / ".vitlit" / "train.npz"
        row("size of the kept scan", kept.stat().st_size / 2**20, "MiB")
        row("scan that is kept", min(seconds(folder.scan_train, root) for _ in range(3)), "s")
        kept.unlink()
        row("scan from scratch, warm", seconds(folder.scan_train, root), "s")
        _, index, _ = folder.scan_train(root)
        assert len(index) == CLASSES * IMAGES
        steps = START // 1000

        def enter() -> None:
            next(iter(TrainStream(len(index), 1000, 0, lambda: steps)))

        row("beginning at position 1,000,000 of an epoch", min(seconds(enter) for _ in range(3)), "s")
        row(f"private memory that {READS:,} reads add to a worker", growth(index) / 2**20, "MiB")
    write(given.out, (__doc__ or "").splitlines()[0], rows, images=CLASSES * IMAGES)


if __name__ == "__main__":
    main()
