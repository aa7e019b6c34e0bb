"""What `vitlit data check` sees: an image, the facts about a split, the findings; and these in words and as JSON."""

import hashlib
import io
import json
import os
import warnings
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape

from vitlit.errors import UserError
from vitlit.files import read_file
from vitlit.images.decode import FORMATS, decode_bytes

Paths: TypeAlias = "list[str | list[str]]"  # files; or lists of files that have the same pixels

SHOWN = 10  # paths of a finding on the screen
SIDES = (0, 32, 64, 128, 224, 384, 512, 1024)  # where the bins of shorter sides begin
ORIENTATION = 0x0112  # EXIF

# What a finding is, and its remedy, after the number of paths in brackets.
FAULTS = {
    "split_name": "is not read under this name: rename it to {}",
    "no_split": "is missing: lay images out as {}/CLASS/*, or give --holdout 10% to cut val off train",
    "empty_split": "has no image: put images into {}",
    "outside_class": "images outside of class folders are ignored: move them into one",
    "empty_class": "class folders without an image: fill or remove them",
    "unknown_class": "classes that train lacks: add training images, or rename or remove them",
    "unreadable": "files that cannot be read as images: restore or remove them",
    "truncated": "images whose end is missing, which decoders fill up with grey: restore or remove them",
    "too_large": "images of more than {} pixels, which are not decoded: scale them down",
    "leakage": "images of another split with the same pixels as one of train: remove one of each pair",
    "contradiction": "sets of images with the same pixels but several labels: keep them in one class",
}
WARNINGS = {
    "missing_class": "classes of train have no image in {}, which will not measure them: add some if you can",
    "similar_class": "sets of class names that differ in case or spaces alone: merge or rename them",
    "imbalance": "is rare, with {}: --data.balanced true draws every class equally often",
    "ignored_file": "other files are ignored ({}): convert them if they are images",
    "small": "images with a side under {} pixels: remove them unless all of yours are so small",
    "corrupt": "images of damaged JPEG data, which decoders get over: look at them",
    "overlap": "images of test with the same pixels as one of val: remove one of each pair",
    "duplicate": "sets of images with the same pixels and the same label: keep one of each",
}


class Look(NamedTuple):
    """What an image file is; `kind` is that of the finding where it is not well."""

    kind: str = ""
    reason: str = ""
    digest: bytes = b""  # of shape and pixels, where it can be decoded
    side: int = 0  # the shorter one
    format: str = "unknown"  # by its content
    mode: str = "unknown"  # the channels, as stored
    turned: bool = False  # by its EXIF orientation
    misnamed: bool = False  # its ending is another format's


def look(path: str) -> Look:
    """Decode an image file. Whatever is wrong with it is told by the Look, never raised."""
    with warnings.catch_warnings(), _stderr() as complaints:
        warnings.simplefilter("ignore")  # Pillow's, of what is looked for here
        try:
            data = read_file(path)
            image = decode_bytes(data, path).permute(1, 2, 0).contiguous()
        except Exception as error:  # a decoder's bug in one file must not end the check
            if isinstance(error.__cause__, Image.DecompressionBombError):
                return Look("too_large")
            reason = str(error).removeprefix(f"cannot read the image {path}: ") or type(error).__name__
            return Look("unreadable", reason)
        complaints.seek(0)
        said = complaints.read().lower()
        seen = _header(path, data)
    digest = hashlib.blake2b(repr(tuple(image.shape)).encode(), digest_size=16)
    digest.update(image.numpy().data)
    kind = "truncated" if b"premature end of" in said else "corrupt" if b"corrupt jpeg data" in said else ""
    return seen._replace(kind=kind, digest=digest.digest(), side=min(image.shape[:2]))


def _header(path: str, data: bytes) -> Look:
    """What is known without the pixels."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            mode = picture.mode
            format = str(picture.format).replace("MPO", "JPEG")  # a camera's, with a preview behind the photograph
            orientation = Image.Image.getexif(picture).get(ORIENTATION)  # that of PNG would decode
    except Exception:  # it was decoded all the same
        return Look()
    misnamed = Image.registered_extensions().get(os.path.splitext(path)[1].lower()) != format
    return Look(format=format, mode=mode, turned=orientation in range(2, 9), misnamed=misnamed)


@contextmanager
def _stderr() -> Iterator[IO[bytes]]:
    """What C libraries print: libjpeg tells only so that it filled up an image."""
    with TemporaryFile() as file:
        own = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            os.dup2(own, 2)
            os.close(own)


class Facts:
    """What the images of a split are."""

    def __init__(self) -> None:
        self.formats: Counter[str] = Counter()
        self.modes: Counter[str] = Counter()
        self.sides = array("l")
        self.turned = 0
        self.misnamed: list[str] = []

    def add(self, seen: Look, path: str) -> None:
        """Count an image that was decoded."""
        self.formats[seen.format] += 1
        self.modes[seen.mode] += 1
        self.sides.append(seen.side)
        self.turned += seen.turned
        if seen.misnamed:
            self.misnamed.append(path)

    def plain(self, counts: dict[str, int]) -> dict[str, Any]:
        """All as plain values, with how many images each class has; "" is none."""
        facts: dict[str, Any] = {"images": sum(counts.values())}
        counts = {name: images for name, images in counts.items() if name}
        facts["classes"] = len(counts)
        if counts:
            ends = {"smallest": min(counts, key=counts.__getitem__), "largest": max(counts, key=counts.__getitem__)}
            facts["class_sizes"] = {end: {"class": name, "images": counts[name]} for end, name in ends.items()}
            facts["class_sizes"]["median"] = float(np.median(list(counts.values())))
        if self.sides:
            sides = np.array(self.sides)
            bins = np.histogram(sides, [*SIDES, np.inf])[0].tolist()
            names = [f"{low}-{high - 1}" for low, high in pairwise(SIDES)] + [f"{SIDES[-1]}-"]
            facts["shorter_side"] = {
                "min": int(sides.min()),
                "median": float(np.median(sides)),
                "max": int(sides.max()),
                "histogram": {name: images for name, images in zip(names, bins, strict=True) if images},
            }
        facts |= {"formats": dict(self.formats.most_common()), "modes": dict(self.modes.most_common())}
        return facts | {"turned": self.turned, "misnamed": self.misnamed}


@dataclass
class Finding:
    """Something wrong.

    Attributes:
        kind: a key of `FAULTS` or `WARNINGS`.
        message: what it is, with the remedy.
        paths: where it is, relative to the root.
        reasons: what is wrong with each path, by path, where that differs among them.
    """

    kind: str
    message: str
    paths: Paths
    reasons: dict[str, str] = field(default_factory=dict)

    def line(self, path: str | list[str]) -> str:
        """One of the paths, in words."""
        if isinstance(path, list):
            return " = ".join(path[:3]) + (f" = {len(path) - 3:,} more" if len(path) > 3 else "")
        return f"{path}: {self.reasons[path]}" if path in self.reasons else path


@dataclass
class Report:
    """All that was found in a folder.

    Attributes:
        root: the folder.
        faults: findings that make training, or its numbers, wrong.
        warnings: findings that may be meant.
        splits: facts about each split.
    """

    root: Path
    faults: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.faults

    def add(self, kind: str, paths: Paths, detail: str = "", reasons: dict[str, str] | None = None) -> None:
        """Note what is wrong with these paths, if there are any."""
        if paths:
            message = {**FAULTS, **WARNINGS}[kind].format(detail)
            (self.faults if kind in FAULTS else self.warnings).append(Finding(kind, message, paths, reasons or {}))

    def write(self, file: Path) -> None:
        """Write all as JSON.

        Raises:
            UserError: the file cannot be written.
        """
        found = {name: [asdict(one) for one in getattr(self, name)] for name in ("faults", "warnings")}
        content = {"root": str(self.root), "ok": self.ok, **found, "splits": self.splits}
        try:
            file.write_text(json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {file} ({error.strerror}): give --json another file") from error

    def print(self) -> None:
        """Print facts, warnings, faults and the verdict, the first few paths of each finding."""
        console = Console(soft_wrap=True, highlight=False)
        for split, facts in self.splits.items():
            console.print(f"[bold]{split}[/bold]")
            for name, value in _rows(facts).items():
                console.print(f"  [dim]{name:<14}[/dim] {_text(value)}")
        for word, style, findings in (("warning", "yellow", self.warnings), ("FAULT", "bold red", self.faults)):
            for finding in findings:
                count = f"{len(finding.paths):,}"
                console.print(f"\n[{style}]{word} {finding.kind} ({count})[/{style}]: {_text(finding.message)}")
                for path in finding.paths[:SHOWN]:
                    console.print(f"  {_text(finding.line(path))}")
                if len(finding.paths) > SHOWN:
                    console.print(f"  and {len(finding.paths) - SHOWN:,} more; --json FILE lists all")
        verdict = f"faults of {len(self.faults)} kinds, warnings of {len(self.warnings)}"
        console.print(
            f"\n[bold]{_text(str(self.root))}: {verdict if self.faults or self.warnings else 'all is well'}[/]"
        )


def _text(text: str) -> str:
    """Text for rich on one line; a name that is not UTF-8 cannot be printed as it is."""
    return escape(os.fsencode(text).decode(errors="replace").replace("\n", "\\n"))


def _rows(facts: dict[str, Any]) -> dict[str, str]:
    """The facts about a split in words by name."""
    unlabelled = facts["images"] and not facts["classes"]
    kinds = "without labels" if unlabelled else f"in {facts['classes']:,} classes"
    rows = {"images": f"{facts['images']:,} {kinds}"}
    if sizes := facts.get("class_sizes"):
        ends = [f"{sizes[end]['images']:,} ({sizes[end]['class']})" for end in ("smallest", "largest")]
        rows["a class has"] = f"{ends[0]} to {ends[1]}, median {sizes['median']:,.0f}"
    if sides := facts.get("shorter_side"):
        rows["shorter side"] = f"{sides['min']:,} to {sides['max']:,} pixels, median {sides['median']:,.0f}"
        rows[""] = _counts(sides["histogram"])
    rows["formats"] = _counts(facts["formats"])
    if facts["misnamed"]:
        rows["formats"] += f"; the ending of {len(facts['misnamed']):,} tells another; --json FILE lists them"
    rows["channels"] = _counts(facts["modes"])
    if facts["turned"]:
        rows["EXIF"] = f"{facts['turned']:,} are turned by their orientation"
    return {name: value for name, value in rows.items() if value}


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items())
