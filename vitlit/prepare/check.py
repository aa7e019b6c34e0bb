"""`vitlit data check ROOT`: every image decoded, and what would make training, or its numbers, wrong."""

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from torch.utils.data import Dataset

from vitlit.data.folder import EXTENSIONS, hold_out, is_folder, parse_share, walk
from vitlit.data.index import Index
from vitlit.data.shards import is_shards
from vitlit.data.workers import Loader, count, end_at_exit, leave_signals
from vitlit.errors import CommandParser, UserError
from vitlit.images.decode import MOST_PIXELS
from vitlit.prepare.report import Facts, Look, Paths, Report, look

HELP = """\
Decode every image of ROOT/{train,val[,test]}/CLASS/* and report what would make training, or its numbers, wrong:
damaged files, copies between splits, labels that contradict each other, folders that do not fit. The exit code is 1
where there is such a fault; warnings alone leave it 0. A class that train lacks is a fault, as no run can begin; one of
train that val or test lacks is a warning.
"""

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
Place = tuple[int, int]  # of an image: the number of its split, and its row there
SMALL = 16  # pixels
RARE = 100  # times fewer images than the largest class


@dataclass(frozen=True)
class Layout:
    """What is in a split's folder.

    Attributes:
        folder: whose subfolders are the classes.
        classes: their names, sorted; [""] of images without labels, which are in the folder itself.
        index: the images in them; labels are positions in classes.
        stray: paths of images outside of class folders.
        ignored: paths of other files in class folders.
    """

    folder: Path
    classes: list[str]
    index: Index
    stray: list[str]
    ignored: list[str]

    @property
    def counts(self) -> dict[str, int]:
        """Images by class."""
        images = np.bincount(self.index.labels, minlength=len(self.classes))
        return dict(zip(self.classes, images.tolist(), strict=True))


class Looks(Dataset[Look]):
    """Each image of an index, looked at."""

    def __init__(self, index: Index) -> None:
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> Look:
        return look(self.index.path(item))


def run(arguments: list[str]) -> int:
    """Run the command with the words after `vitlit data check` and return the exit code."""
    parser = CommandParser("vitlit data check", HELP)
    parser.add_argument("root", metavar="ROOT", type=Path)
    parser.add_argument("--json", metavar="FILE", type=Path, help="the whole report, with every path")
    parser.add_argument("--holdout", metavar="SHARE", default="0", help="as --data.holdout: train is cut in two")
    parser.add_argument("--workers", metavar="N", type=int, default=count(1), help="that decode; one a core by default")
    given = parser.parse_args(arguments or ["--help"])
    if given.workers < 1:
        raise UserError(f"--workers {given.workers} is no number above 0")
    if given.json and not given.json.parent.is_dir():
        raise UserError(f"{given.json.parent} is no folder: give --json another file")
    if is_shards(str(given.root)):
        raise UserError(f"{given.root} holds shards; check the folder that they were made of")
    report = check(given.root, parse_share(given.holdout), given.workers)
    if given.json:
        report.write(given.json)
    report.print()
    return 0 if report.ok else 1


def check(root: Path, holdout: float = 0.0, workers: int = 1) -> Report:
    """Look at every image of a folder.

    Args:
        root: it holds train/CLASS/*, val/CLASS/* and maybe test/CLASS/*, or CLASS/* where a share is held out; or no
            class folders at all, if images have no labels.
        holdout: the share of the training images that is cut off for validation; then a val folder is left alone.
        workers: processes that decode.

    Raises:
        UserError: a folder cannot be listed, or a worker died.
    """
    report = Report(root)
    try:
        folders = _find_splits(report, bool(holdout))
        labelled = any(_list(folder)[0] for folder in folders.values())
        layouts = {split: _scan(folder, labelled) for split, folder in folders.items()}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be listed ({error.strerror}); give a folder of images") from error
    for layout in layouts.values():
        _judge_folder(report, layout)
    if holdout and "train" in layouts:
        train, val = hold_out(layouts["train"].index, holdout, layouts["train"].classes)
        whole = layouts.pop("train")
        layouts = {"train": replace(whole, index=train), "val": replace(whole, index=val), **layouts}
    _judge_classes(report, layouts)
    _judge_images(report, layouts, workers)
    return report


def _find_splits(report: Report, holdout: bool) -> dict[str, Path]:
    """The folders of the splits. One in another spelling is a fault, and taken for what it means."""
    names, _ = _list(report.root)
    split_of = {spelling: split for split, spellings in SPLITS.items() for spelling in spellings}
    meanings = {name: split_of.get(name.strip().lower()) for name in names}
    if holdout and "train" not in names and not (names and all(meanings.values())):  # "valid" may be a class
        return {"train": report.root}
    folders = {}
    for split in [name for name in SPLITS if not (holdout and name == "val")]:
        meant = sorted((name for name in names if meanings[name] == split), key=lambda name: name != split)
        for name in meant:
            if name != split:
                report.add("split_name", [name], split)
        if meant:
            folders[split] = report.root / meant[0]
        elif split != "test":
            report.add("no_split", [split], split)
    return folders


def _list(folder: Path) -> tuple[list[str], list[str]]:
    """The (folders, files) in a folder that are not hidden, sorted."""
    entries = sorted((entry for entry in os.scandir(folder) if entry.name[0] != "."), key=lambda entry: entry.name)
    folders = [entry.name for entry in entries if is_folder(entry)]
    return folders, [entry.name for entry in entries if not is_folder(entry)]


def _scan(folder: Path, labelled: bool) -> Layout:
    """What is in a split's folder; OSError where that cannot be listed."""
    names, files = _list(folder)
    classes, files = (names, files) if labelled else ([""], [])
    trees = [walk(os.fsencode(folder), os.fsencode(name)) for name in classes]
    counts = np.array([len(tree.images) for tree in trees], np.int64)
    index = Index.of(
        folder, [image for tree in trees for image in tree.images], np.repeat(np.arange(len(trees)), counts)
    )
    stray = [str(folder / file) for file in files if file.lower().endswith(EXTENSIONS)]
    ignored = [str(folder / os.fsdecode(other)) for tree in trees for other in tree.others]
    return Layout(folder, classes, index, stray, ignored)


def _judge_folder(report: Report, layout: Layout) -> None:
    """Note files and folders that are in the wrong place."""
    report.add("outside_class", [os.path.relpath(path, report.root) for path in layout.stray])
    empty = [name for name, images in layout.counts.items() if name and not images]
    report.add("empty_class", [os.path.relpath(layout.folder / name, report.root) for name in empty])
    endings = Counter(os.path.splitext(path)[1].lower() or "no ending" for path in layout.ignored)
    detail = ", ".join(f"{ending} {images:,}" for ending, images in endings.most_common(8))
    report.add("ignored_file", [os.path.relpath(path, report.root) for path in layout.ignored], detail)


def _judge_classes(report: Report, layouts: dict[str, Layout]) -> None:
    """Note what does not fit in the classes of the splits."""

    def at(split: str, name: str = "") -> str:
        return os.path.relpath(layouts[split].folder / name, report.root)

    counts = {split: layout.counts for split, layout in layouts.items()}
    for split in layouts:
        if not any(counts[split].values()):
            report.add("empty_split", [split], os.path.join(at(split), "CLASS") + "/")
    train = {name: images for name, images in counts.get("train", {}).items() if name}
    for split in [split for split in layouts if split != "train" and train]:
        report.add("unknown_class", [at(split, name) for name in counts[split] if name not in train])
        missing = [name for name, images in train.items() if images and not counts[split].get(name)]
        report.add("missing_class", [at("train", name) for name in missing], split)
    similar = defaultdict(list)
    for name in sorted({name for classes in counts.values() for name in classes}):
        similar[unicodedata.normalize("NFC", name).strip().casefold()].append(name)
    report.add("similar_class", [names for names in similar.values() if len(names) > 1])
    filled = {name: images for name, images in train.items() if images}
    if filled and max(filled.values()) > RARE * min(filled.values()):
        rarest, largest = min(filled, key=filled.__getitem__), max(filled, key=filled.__getitem__)
        detail = f"{filled[rarest]:,} images for {filled[largest]:,} of {largest}"
        report.add("imbalance", [at("train", rarest)], detail)


def _judge_images(report: Report, layouts: dict[str, Layout], workers: int) -> None:
    """Look at all images, note facts about each split, and what is wrong with files and between them."""
    first: dict[bytes, Place] = {}  # image of these pixels
    copies: dict[Place, list[Place]] = {}  # by the first one, which is among them
    found: dict[str, Paths] = defaultdict(list)
    reasons: dict[str, str] = {}
    for number, (split, layout) in enumerate(layouts.items()):
        facts = Facts()
        for row, seen in enumerate(_look_all(layout.index, workers, split)):
            path = os.path.relpath(layout.index.path(row), report.root)
            if seen.kind or seen.side < SMALL:
                found[seen.kind or "small"].append(path)
            if seen.kind == "unreadable":
                reasons[path] = seen.reason.split(";")[0].rstrip(".")  # the rest is a remedy
            if seen.digest:
                facts.add(seen, path)
                place = first.setdefault(seen.digest, (number, row))
                if place != (number, row):
                    copies.setdefault(place, [place]).append((number, row))
        report.splits[split] = facts.plain(layout.counts)
    details = {"too_large": f"{MOST_PIXELS:,}", "small": str(SMALL)}
    report.add("unreadable", found["unreadable"], reasons=reasons)
    for kind in ("truncated", "corrupt", "too_large", "small"):
        report.add(kind, found[kind], details.get(kind, ""))
    _judge_copies(report, list(layouts.items()), [copies[place] for place in sorted(copies)])


def _look_all(index: Index, workers: int, split: str) -> Iterator[Look]:
    """A Look at each image, in order, while a terminal shows how far it is."""
    end_at_exit()
    loader = Loader(Looks(index), batch_size=16, num_workers=workers, collate_fn=list, worker_init_fn=leave_signals)
    console = Console(stderr=True)
    shown = track(loader, split, console=console, transient=True, disable=not console.is_terminal)
    done = 0
    try:
        for looks in shown if len(index) else ():
            done += len(looks)
            yield from looks
    except RuntimeError as error:  # a Look never fails, its process may
        place = index.path(min(done, len(index) - 1))
        raise UserError(
            f"a process died while it read images from {place} on ({error}): give fewer --workers if memory ran out"
        ) from error


def _judge_copies(report: Report, layouts: list[tuple[str, Layout]], copies: list[list[Place]]) -> None:
    """Note sets of images with the same pixels: between splits, and within one."""
    found: dict[str, Paths] = defaultdict(list)

    def at(split: int, row: int) -> str:
        return os.path.relpath(layouts[split][1].index.path(row), report.root)

    for places in copies:
        group: dict[int, list[int]] = defaultdict(list)  # rows by split
        for split, row in places:
            group[split].append(row)
        for split, rows in group.items():
            labels = {int(layouts[split][1].index.labels[row]) for row in rows}
            if len(rows) > 1:
                found["contradiction" if len(labels) > 1 else "duplicate"].append([at(split, row) for row in rows])
        for one, other in combinations(sorted(group), 2):
            kind = "leakage" if layouts[one][0] == "train" else "overlap"
            found[kind] += [[at(one, group[one][0]), at(other, row)] for row in group[other]]
    for kind in ("leakage", "contradiction", "overlap", "duplicate"):
        report.add(kind, found[kind])
