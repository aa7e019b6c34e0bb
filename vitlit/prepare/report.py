"""The parts of `vitlit data check`: a look at one image, the facts about a split, and the report of all findings."""

import hashlib
import json
import os
import warnings
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from operator import sub
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from vitlit.files import read_file, writing
from vitlit.images import raw
from vitlit.images.decode import FORMATS, GROUND, MOST_PIXELS, captured_stderr, decode, naming
from vitlit.images.decode import reason as why_unread
from vitlit.prepare.channels import Channels, in_words, measure, summary

Paths: TypeAlias = "list[str | list[str]]"  # files, or sets of files with the same pixels

SHOWN = 10  # paths of a finding on the screen
SMALL = 16  # pixels
UNIFORM = 3  # levels of 255 that all pixels of an image lie within
DARK = 16  # likewise, of an image with transparency

# What is wrong, with the remedy. The number of paths comes before it.
FAULTS = {
    "split_name": "is not read under this name: rename it to {}",
    "no_split": "is missing: lay images out as {}/CLASS/*, or give --holdout 10% to cut val off train",
    "empty_split": "has no image: put images into {}",
    "dead_link": "links to nothing, which are passed over: restore what they point to, or remove them",
    "archive": "archives where class folders belong, which are not read: unpack them, or move them away",
    "outside_class": "images outside class folders are ignored: move them into one",
    "empty_class": "class folders without an image: fill or remove them",
    "unread_class": "class folders without an image that is read: convert or unpack what they hold, or remove them",
    "unknown_class": "classes that train lacks: add training images, or rename or remove them",
    "unreadable": "files that cannot be read as images: restore or remove them",
    "channels": "images with another number of channels than the first: convert or remove them",
    "truncated": "images cut short, which decoders fill up with grey: restore or remove them",
    "too_large": f"images of more than {MOST_PIXELS:,} pixels, which are not decoded: scale them down",
    "leakage": "images of another split with the same pixels as one of train: remove one of each pair",
    "contradiction": "sets of images with the same pixels but several labels: keep them in one class",
}
WARNINGS = {
    "missing_class": "classes of train have no image in {}, which will not measure them: add some if you can",
    "similar_class": "sets of class names that differ only in case or spaces: merge or rename them",
    "imbalance": "is rare, with {}: --data.balanced true draws every class equally often",
    "ignored_file": "other files are ignored ({}): convert them if they are images",
    "small": f"images with a side under {SMALL} pixels: remove them unless all of yours are so small",
    "uniform": "images are nearly of one colour once decoded, for the reason given: mend those that should not be",
    "beyond": "images with values beyond the range, which become less than 0 or more than 1: widen it if they matter",
    "corrupt": "images of damaged JPEG data, which still decode: look at them",
    "overlap": "images of test with the same pixels as one of val: remove one of each pair",
    "near_duplicate": "pairs {} that show one picture, perhaps resized, compressed or mirrored: keep one of each",
    "label_error": "labels that are likely wrong, judged by features, with what may be right: look at them",
    "duplicate": "sets of images with the same pixels and the same label: keep one of each",
}


class Look(NamedTuple):
    """One image file."""

    kind: str = ""  # of finding, if any
    reason: str = ""  # why it is unreadable
    digest: bytes = b""  # of shape and pixels, if it can be decoded
    side: int = 0  # the shorter one, pixels
    channels: Channels | None = None  # where it is read with a range


def look(path: str, ground: str = GROUND, levels: tuple[float, float] | None = None) -> Look:
    """Decode an image file, with `levels` as a range reads it. Never raises: whatever is wrong is in the Look."""
    channels = None
    with warnings.catch_warnings(), captured_stderr() as said:
        warnings.simplefilter("ignore")  # Pillow's, about what is found here anyway
        try:
            if levels is None:
                image = decode(path, ground).permute(1, 2, 0).contiguous().numpy()
            else:
                data = read_file(path)
                with naming(path):
                    image = np.ascontiguousarray(raw.read(data))
                    channels = measure(image, levels)
        except Exception as error:  # a decoder's bug in one file must not end the check
            if isinstance(error.__cause__, Image.DecompressionBombError):
                return Look("too_large")
            reason = why_unread(error, path) or type(error).__name__
            return Look("unreadable", reason.split(";")[0].rstrip("."))  # without the remedy
    complaint = " ".join(said).lower()
    kind = "truncated" if "premature end of" in complaint else "corrupt" if "corrupt jpeg data" in complaint else ""
    digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
    digest.update(image.data)
    why = ""
    if channels and not kind:
        kind, why = channels.finding, f"{channels.least:,g} to {channels.most:,g}"
    elif not kind and (why := _why_uniform(path, torch.from_numpy(image), ground)):
        kind = "uniform"
    return Look(kind, why, digest.digest(), min(image.shape[:2]), channels)


def _why_uniform(path: str, image: Tensor, ground: str) -> str:
    """Why all pixels of an image (H, W, 3) are nearly the same; empty if they are not."""
    pixels = image.view(-1, 3)
    for some in (pixels[::16], pixels):  # a part is enough for most
        low, high = (levels.tolist() for levels in torch.aminmax(some, dim=0))
        if (levels := max(map(sub, high, low))) > DARK:
            return ""
    with suppress(OSError), Image.open(path, formats=FORMATS) as picture:
        if picture.has_transparency_data:
            return f"it is drawn in the colour of the ground, {ground}; give another data.ground"
    return f"every pixel is nearly {low}" if levels <= UNIFORM else ""


def describe(counts: dict[str, int], sides: "array[int]", seen: Sequence[Channels] = ()) -> dict[str, Any]:
    """The facts about a split as JSON values, from its images by class, their shorter sides in pixels and channels."""
    images = sum(counts.values())
    counts = {name: number for name, number in counts.items() if name}  # "" is no label
    facts: dict[str, Any] = {"images": images, "classes": len(counts)}
    if counts:
        ends = {"smallest": min(counts, key=counts.__getitem__), "largest": max(counts, key=counts.__getitem__)}
        facts["class_sizes"] = {end: {"class": name, "images": counts[name]} for end, name in ends.items()}
        facts["class_sizes"]["median"] = float(np.median(list(counts.values())))
    if sides:
        facts["shorter_side"] = {"min": min(sides), "median": float(np.median(sides)), "max": max(sides)}
    if seen:
        facts["channels"] = summary(seen)
    return facts


@dataclass
class Finding:
    kind: str  # a key of `FAULTS` or `WARNINGS`
    message: str
    paths: Paths  # relative to the root
    reasons: dict[str, str]  # by path, where they differ


@dataclass
class Report:
    """Everything found in a folder, and the facts about each split."""

    root: Path
    faults: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.faults

    def add(
        self, kind: str, paths: Sequence[str | list[str]], detail: str = "", reasons: Mapping[str, str] = {}
    ) -> None:
        if paths:
            message = {**FAULTS, **WARNINGS}[kind].format(detail)
            findings = self.faults if kind in FAULTS else self.warnings
            finding = next((one for one in findings if (one.kind, one.message) == (kind, message)), None)
            if finding is None:
                findings.append(finding := Finding(kind, message, [], {}))
            finding.paths += paths
            finding.reasons |= {path: why for path, why in reasons.items() if why}

    def write(self, file: Path) -> None:
        content = {**asdict(self), "root": str(self.root), "ok": self.ok}
        with writing(file, "give --json another file"):
            file.write_text(json.dumps(content, indent=1) + "\n")

    def print(self) -> None:
        console = Console(soft_wrap=True, highlight=False, markup=False)

        def show(text: str, style: str = "") -> None:  # on one line; not all names are UTF-8
            console.print(os.fsencode(text).decode(errors="replace").replace("\n", "\\n"), style=style)

        for split, facts in self.splits.items():
            show(split, "bold")
            for name, value in _rows(facts).items():
                show(f"  {name:<14} {value}")
        for word, style, findings in (("warning", "yellow", self.warnings), ("FAULT", "bold red", self.faults)):
            for finding in findings:
                console.print()
                show(f"{word} {finding.kind} ({len(finding.paths):,}): {finding.message}", style)
                for path in finding.paths[:SHOWN]:
                    show(f"  {_line(path, finding.reasons)}")
                if len(finding.paths) > SHOWN:
                    show(f"  and {len(finding.paths) - SHOWN:,} more; --json FILE lists all")
        verdict = f"faults of {len(self.faults)} kinds, warnings of {len(self.warnings)}"
        console.print()
        show(f"{self.root}: {verdict if self.faults or self.warnings else 'all is well'}", "bold")


def _line(path: str | list[str], reasons: dict[str, str]) -> str:
    """A path with its reason, or paths of the same pixels."""
    if isinstance(path, list):
        return " = ".join(path[:3]) + (f" = {len(path) - 3:,} more" if len(path) > 3 else "")
    return f"{path}: {reasons[path]}" if path in reasons else path


def _rows(facts: dict[str, Any]) -> dict[str, str]:
    unlabelled = facts["images"] and not facts["classes"]
    kinds = "without labels" if unlabelled else f"in {facts['classes']:,} classes"
    rows = {"images": f"{facts['images']:,} {kinds}"}
    if sizes := facts.get("class_sizes"):
        ends = [f"{sizes[end]['images']:,} ({sizes[end]['class']})" for end in ("smallest", "largest")]
        rows["a class has"] = f"{ends[0]} to {ends[1]}, median {sizes['median']:,.0f}"
    if sides := facts.get("shorter_side"):
        rows["shorter side"] = f"{sides['min']:,} to {sides['max']:,} pixels, median {sides['median']:,.0f}"
    return rows | (in_words(facts["channels"]) if "channels" in facts else {})
