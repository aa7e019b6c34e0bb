"""What the channels of images hold, read as `data.range` reads them, and the options that follow."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vitlit.images.raw import scaled


class Channels(NamedTuple):
    """Of an image of C channels."""

    kind: str  # of the file's values
    least: float  # of them
    most: float
    levels: tuple[float, float]  # black and white
    pixels: int
    sums: np.ndarray  # of values scaled to 0 for black and 1 for white, float64 (C,)
    squares: np.ndarray

    @property
    def finding(self) -> str:
        """The kind of what is to be said of it, or ""."""
        inside = self.levels[0] <= self.least and self.most <= self.levels[1]
        return "uniform" if self.least == self.most else "" if inside else "beyond"


def measure(values: np.ndarray, levels: tuple[float, float]) -> Channels:
    """Of the values (H, W, C) of an image; ValueError if not all are finite."""
    found = scaled(values, levels).double().flatten(1)
    ends, moments = (float(values.min()), float(values.max())), (found.sum(1).numpy(), found.square().sum(1).numpy())
    return Channels(str(values.dtype), *ends, levels, found.shape[1], *moments)


def summary(images: Sequence[Channels]) -> dict[str, Any]:
    """The facts about images of equally many channels, as JSON values; each pixel counts once."""
    pixels = sum(image.pixels for image in images)
    mean = np.sum([image.sums for image in images], 0) / pixels
    std = np.sqrt(np.maximum(np.sum([image.squares for image in images], 0) / pixels - mean**2, 0))
    return {
        "count": len(mean),
        "kinds": sorted({image.kind for image in images}),
        "values": [min(image.least for image in images), max(image.most for image in images)],
        "range": images[0].levels,
        "mean": [float(f"{number:.4g}") for number in mean],
        "std": [float(f"{number:.4g}") for number in std],
    }


def in_words(facts: dict[str, Any]) -> dict[str, str]:
    """A `summary` as rows, with the options of a training."""
    options = [f"--data.{name} '[{','.join(map('{:g}'.format, facts[name]))}]'" for name in ("range", "mean", "std")]
    values = "{:,g} to {:,g}".format(*facts["values"])
    return {"channels": f"{facts['count']}, {' '.join(facts['kinds'])}, {values}", "train with": " ".join(options)}
