"""`vitlit data check ROOT`: decode every image, and find what would make training or its numbers wrong."""

import os
import re
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from os.path import join
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from vitlit.data.folder import SPELLINGS, Tree, alike, folders_in, hold_out, parse_share, unread, walk
from vitlit.data.index import Index
from vitlit.data.progress import Progress
from vitlit.data.shards import is_shards
from vitlit.data.workers import count, loader
from vitlit.errors import CommandParser, UserError
from vitlit.files import check_new, read_file, writing
from vitlit.images.decode import GROUND, colour
from vitlit.images.preprocess import Preprocess
from vitlit.images.raw import as_picture
from vitlit.inspection.sheet import Cell, draw_sheet
from vitlit.prepare.channels import Channels
from vitlit.prepare.report import SMALL, WARNINGS, Look, Paths, Report, describe, look

HELP = """\
Decode every image of ROOT/{train,val[,test]}/CLASS/* and report what would make training, or its numbers, wrong:
damaged files, copies between splits, labels that contradict each other, folders that do not fit. The exit code is 1
where there is such a fault; warnings alone leave it 0. A class that train lacks is a fault, as no run can begin; one of
train that val or test lacks is a warning.
"""

ARCHIVE = re.compile(r"(.+?)(\.tar)?\.(zip|tar|tgz|gz|bz2|xz|zst|7z|rar)", re.IGNORECASE)
DRAWN = 40  # images on a sheet
RARE = 100  # times fewer images than the largest class


@dataclass(frozen=True)
class Layout:
    folder: str  # relative to the root; its subfolders are the classes
    classes: list[str]  # sorted; [""] for images without labels
    index: Index  # labels are positions in classes

    def image(self, row: int) -> str:
        return join(self.folder, self.index.files.names.text(int(self.index.rows[row])))

    @property
    def counts(self) -> dict[str, int]:
        images = np.bincount(self.index.labels, minlength=len(self.classes))
        return dict(zip(self.classes, images.tolist(), strict=True))


def run(arguments: list[str]) -> int:
    parser = CommandParser("vitlit data check", HELP)
    parser.add_argument("root", metavar="ROOT", type=Path)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the report here, with every path")
    parser.add_argument("--holdout", metavar="SHARE", default="0", help="cut val off train, as --data.holdout does")
    parser.add_argument("--ground", metavar="COLOUR", default=GROUND, help="under transparency, as --data.ground")
    about = "read values as they are, as --data.range, and measure the channels' mean and std"
    parser.add_argument("--range", metavar=("BLACK", "WHITE"), type=float, nargs=2, help=about)
    parser.add_argument(
        "--workers", metavar="N", type=int, default=count(1), help="processes; default one a core, 0 for none"
    )
    parser.add_argument(
        "--weights", metavar="FILE", help="a ViT's, by whose features labels are judged; and near-copies"
    )
    parser.add_argument("--image_size", type=int, metavar="N", help="with --weights; by default theirs")
    parser.add_argument("--sheets", metavar="DIR", type=Path, help="with --weights: show the first of both lists here")
    given = parser.parse_args(arguments or ["--help"])
    if (given.sheets or given.image_size) and not given.weights:
        parser.error("--sheets and --image_size are about what --weights finds; give it too")
    check_new(given.json, given.sheets)
    if given.json and not given.json.parent.is_dir():
        raise UserError(f"{given.json.parent} is not a folder: give --json another file")
    if is_shards(str(given.root)):
        raise UserError(f"{given.root} holds shards; check the folder that they were made of")
    colour(given.ground)
    levels, further = Preprocess((1, 1), range=given.range and tuple(given.range)).range, None
    if given.weights:
        from vitlit.prepare.features import ready  # takes seconds to import, for which other checks need not wait

        vit = ready(given.weights, given.image_size)
        levels, further = levels or vit.preprocess.range, partial(_suspect, vit=vit, sheets=given.sheets)
    each = partial(look, ground=given.ground, levels=levels)
    report = check(given.root, parse_share(given.holdout), given.workers, each, further)
    if given.json:
        report.write(given.json)
    report.print()
    return 0 if report.ok else 1


def check(
    root: Path,
    holdout: float = 0.0,
    workers: int = 1,
    look: Callable[[str], Look] = look,
    further: Callable[[Report, dict[str, Layout]], object] | None = None,
) -> Report:
    """Decode every image of a folder and compare its splits; with a holdout, a val folder is ignored.

    `look` looks at an image file. A `further` check gets the report and the images of each split that can be read.
    """
    report = Report(root)
    try:
        folders = _find_splits(report, bool(holdout))
        labelled = any(folders_in(root / folder) for folder in folders.values())
        if "" not in folders.values():
            report.add("dead_link", [os.fsdecode(name) for name in walk(os.fsencode(root), deep=False).dead])
        layouts = {split: _scan(report, folder, labelled) for split, folder in folders.items()}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be listed ({error.strerror}); give a folder of images") from error
    if holdout and "train" in layouts:
        whole = layouts.pop("train")
        train, val = hold_out(whole.index, holdout, whole.classes)
        layouts = {"train": replace(whole, index=train), "val": replace(whole, index=val), **layouts}
    _compare_classes(report, layouts)
    layouts = _decode_images(report, layouts, workers, look)
    if further and layouts:
        further(report, layouts)
    return report


def _find_splits(report: Report, holdout: bool) -> dict[str, str]:
    """The folders of the splits. A misspelt name is a fault, and read as the split it means."""
    names = folders_in(report.root)
    split_of = {spelling: split for split, spellings in SPELLINGS.items() for spelling in spellings}
    meanings = {name: split_of.get(name.strip().lower()) for name in names}
    if holdout and "train" not in names and not (names and all(meanings.values())):  # "valid" may be a class
        return {"train": ""}
    folders = {}
    for split in [name for name in SPELLINGS if not (holdout and name == "val")]:
        spellings = sorted((name for name in names if meanings[name] == split), key=lambda name: name != split)
        for name in spellings:
            if name != split:
                report.add("split_name", [name], split)
        if spellings:
            folders[split] = spellings[0]
        elif split != "test":
            report.add("no_split", [split], split)
    return folders


def _scan(report: Report, folder: str, labelled: bool) -> Layout:
    """The images of a split; what is not read is reported. OSError where a folder cannot be listed."""
    root = os.fsencode(report.root / folder)
    classes, top = folders_in(report.root / folder) if labelled else [""], walk(root, deep=False)
    trees = {name: walk(root, os.fsencode(name)) for name in classes}

    def add(kind: str, names: Iterable[bytes], detail: str = "") -> None:
        report.add(kind, [join(folder, os.fsdecode(name)) for name in sorted(names)], detail)

    packed = {
        name for name in top.others if (match := ARCHIVE.fullmatch(os.fsdecode(name))) and match[1] not in classes
    }
    add("archive", packed)
    add("outside_class", top.images if labelled else ())
    holds = {join(folder, name): unread([tree]) for name, tree in trees.items() if name and not tree.images}
    report.add("empty_class", [path for path, other in holds.items() if not other])
    report.add("unread_class", [path for path, other in holds.items() if other], reasons=holds)
    read = [top, *(tree for name, tree in trees.items() if tree.images or not name)]
    add("dead_link", {name for tree in read for name in tree.dead})
    others = {name for tree in read for name in tree.others} - packed
    add("ignored_file", others, unread([Tree([], list(others), [], [])]))
    labels = np.repeat(np.arange(len(trees)), [len(tree.images) for tree in trees.values()])
    return Layout(folder, classes, Index.of(os.fsdecode(root), [i for t in trees.values() for i in t.images], labels))


def _compare_classes(report: Report, layouts: dict[str, Layout]) -> None:
    """Report splits without images and classes that do not fit together."""
    counts = {split: layout.counts for split, layout in layouts.items()}
    for split, layout in layouts.items():
        if not len(layout.index):
            report.add("empty_split", [split], join(layout.folder, "CLASS/"))
    train = {name: images for name, images in counts.get("train", {}).items() if name}
    filled = {name: images for name, images in train.items() if images}
    for split, layout in layouts.items():
        if split != "train" and train:
            report.add("unknown_class", [join(layout.folder, name) for name in layout.classes if name not in train])
            missing = [join(layouts["train"].folder, name) for name in filled if not counts[split].get(name)]
            report.add("missing_class", missing, split)
    similar = defaultdict(list)
    for name in sorted(set().union(*counts.values())):
        similar[alike(name)].append(name)
    report.add("similar_class", [names for names in similar.values() if len(names) > 1])
    if filled and max(filled.values()) > RARE * min(filled.values()):
        rarest, largest = min(filled, key=filled.__getitem__), max(filled, key=filled.__getitem__)
        detail = f"{filled[rarest]:,} images for {filled[largest]:,} of {largest}"
        report.add("imbalance", [join(layouts["train"].folder, rarest)], detail)


def _decode_images(
    report: Report, layouts: dict[str, Layout], workers: int, look: Callable[[str], Look]
) -> dict[str, Layout]:
    """Decode all images; report the facts about each split, damaged files, and copies. Returns what can be read."""
    readable: dict[str, Layout] = {}
    places: dict[bytes, list[tuple[str, int]]] = defaultdict(list)  # splits and rows of the images with these pixels
    found: dict[str, dict[str, str]] = defaultdict(dict)  # reasons by path, by kind
    wanted = 0  # channels, of the first image
    for split, layout in layouts.items():
        sides, read, channels = array("l"), array("l"), list[Channels]()
        for row, seen in enumerate(_look_all(layout.index, workers, split, look)):
            if seen.channels:
                wanted = wanted or len(seen.channels.sums)
                if len(seen.channels.sums) != wanted:
                    found["channels"][layout.image(row)] = f"{len(seen.channels.sums)} instead of {wanted}"
                    continue
                channels.append(seen.channels)
            if seen.kind or seen.side < SMALL:
                found[seen.kind or "small"][layout.image(row)] = seen.reason
            if seen.digest:
                sides.append(seen.side)
                read.append(row)
            if seen.digest and seen.kind != "uniform":  # which may be equal for that reason
                places[seen.digest].append((split, row))
        # The options of a training are measured on train alone.
        report.splits[split] = describe(layout.counts, sides, channels if split == next(iter(layouts)) else ())
        if read:
            readable[split] = replace(layout, index=layout.index.take(np.array(read)))
    for kind, reasons in found.items():
        report.add(kind, list(reasons), reasons=reasons)
    _compare_copies(report, layouts, [copies for copies in places.values() if len(copies) > 1])
    return readable


def _suspect(report: Report, layouts: dict[str, Layout], vit: Any, sheets: Path | None) -> None:
    """Report images that show the same picture, and labels that are likely wrong; draw the first of each."""
    from vitlit.prepare.suspects import embed, suspects

    root = report.root
    classes = sorted({name for layout in layouts.values() for name in layout.classes if name})
    numbers = {"": -1} | {name: number for number, name in enumerate(classes)}
    splits = {
        split: replace(each.index, labels=np.array([numbers[name] for name in each.classes])[each.index.labels])
        for split, each in layouts.items()
    }
    table = embed(vit, splits, classes, str(root))
    found, shown = suspects(table, splits, classes, vit.preprocess), defaultdict[str, list[Any]](list)
    for one, split, other, other_split, _ in found["near_duplicates"]:
        where = f"of {split} and {other_split}" if split != other_split else f"within {split}"
        report.add("near_duplicate", [[one, other]], where)
        shown["near_duplicate"] += [(one, (split, Path(one).name)), (other, (other_split, Path(other).name))]
    for path, _, label, guess, _, probability in found.get("label_errors", ()):
        rather = f"{guess}  {100 * probability:.0f} %"
        report.add("label_error", [path], reasons={path: f"rather {rather}"})
        shown["label_error"].append((path, (rather, f"({label})")))
    for kind, images in shown.items():
        if sheets:
            pictures = (as_picture(vit.preprocess.decode(read_file(root / path), path)) for path, _ in images[:DRAWN])
            cells: list[Cell] = [(each, lines, "black") for each, (_, lines) in zip(pictures, images, strict=False)]
            title = WARNINGS[kind].partition(":")[0].replace(" {}", "")
            with writing(sheets, "give --sheets another folder"):
                sheets.mkdir(parents=True, exist_ok=True)
                draw_sheet(f"{title}; the likeliest first", cells).save(sheets / f"{kind}.png")


@dataclass(eq=False)
class _Looks(Dataset[Any]):
    index: Index
    look: Callable[[str], Look]

    def __getitems__(self, rows: list[int]) -> list[Look]:
        return [self.look(self.index.path(row)) for row in rows]


def _look_all(index: Index, workers: int, split: str, look: Callable[[str], Look]) -> Iterator[Look]:
    done, show = 0, Progress()
    try:
        for looks in loader(_Looks(index, look), range(len(index)), 16, workers):
            done += len(looks)
            yield from looks
            show(f"{split}: {done:,} of {len(index):,} images")
    except RuntimeError as error:  # look never fails, but its process may
        where = f"from {index.path(min(done, len(index) - 1))} on ({error})"
        raise UserError(f"a process died while it read images {where}: if memory ran out, fewer --workers") from error


def _compare_copies(report: Report, layouts: dict[str, Layout], copies: list[list[tuple[str, int]]]) -> None:
    """Report sets of images with the same pixels: between splits, and within one."""
    found: dict[str, Paths] = defaultdict(list)
    for places in copies:
        paths: dict[str, list[str]] = defaultdict(list)
        labels: dict[str, set[int]] = defaultdict(set)
        for split, row in places:
            paths[split].append(layouts[split].image(row))
            labels[split].add(int(layouts[split].index.labels[row]))
        for split in paths:
            if len(paths[split]) > 1:
                found["contradiction" if len(labels[split]) > 1 else "duplicate"].append(paths[split])
        for one, other in combinations(paths, 2):
            found["leakage" if one == "train" else "overlap"] += [[paths[one][0], path] for path in paths[other]]
    for kind, sets in found.items():
        report.add(kind, sets)
