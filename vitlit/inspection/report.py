"""Numbers and pictures of runs as one HTML page, which opens without a network."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

POINTS = 500  # of a curve; of more steps, the means
BESIDE = ("step", "epoch", "unix_seconds")  # in metrics.csv, what is no curve


class Picture(NamedTuple):
    source: str
    alt: str
    caption: str = ""


@dataclass
class Section:
    """A part of the page: a heading, and what there is of a text, a table, pictures, and a text to fold out.

    Of a `matrix`, classes are the names and counts (label, prediction, images), with the numbers of the classes.
    """

    title: str
    text: str = ""
    head: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    pictures: Sequence[Picture] = ()
    small: bool = False  # the pictures
    matrix: Mapping[str, Any] | None = None
    folded: str = ""


def page(title: str, about: str, sections: Sequence[Section]) -> str:
    template = Path(__file__).with_name("report.html").read_text()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(template).render(title=title, about=about, sections=sections)
    return text.encode(errors="replace").decode()  # a name may be no text


def encode(drawn: Figure | Image.Image, dpi: int = 110) -> str:
    """A figure as PNG, or a photograph as JPEG, in a URI."""
    file = BytesIO()
    kind = "png" if isinstance(drawn, Figure) or max(drawn.size) < 64 else "jpeg"
    if isinstance(drawn, Figure):
        drawn.savefig(file, format="png", dpi=dpi)
    else:
        drawn.save(file, kind, quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def curves(runs: Mapping[str, list[dict[str, float]]]) -> list[Picture]:
    """Each metric by step, of one run or of several over each other, from the rows of their metrics.csv.

    Train and val are drawn together, train of several runs dashed.
    """
    columns = dict.fromkeys(name for rows in runs.values() for row in rows for name in row if name not in BESIDE)
    metrics = dict.fromkeys(name.partition("/")[2] for name in sorted(columns, key=lambda name: name[:3] != "val"))
    drawn = []
    for metric in metrics:
        figure, said = Figure((5, 3.2), layout="constrained"), []
        axes, splits = figure.subplots(), [split for split in ("train", "val") if f"{split}/{metric}" in columns]
        for number, (run, rows) in enumerate(runs.items()):
            for place, split in enumerate(splits):
                found = [(row["step"] + 1, row[name]) for row in rows if (name := f"{split}/{metric}") in row]
                if not found:
                    continue
                parts = np.array_split(np.array(found), min(POINTS, len(found)))
                steps, values = np.array([part.mean(0) for part in parts]).T
                few, alone = len(found) < 50, len(runs) == 1
                style: dict[str, Any] = {
                    "marker": "." if few else "",
                    "alpha": 0.8,
                    "color": f"C{place if alone else number}",
                }
                style["linestyle"] = "--" if len(splits) > 1 and split == "train" and not alone else "-"
                axes.plot(steps, values, label=split if alone else f"{run}, {split}", **style)
                said.append(f"{run}, {split}: {found[-1][1]:.4g} after step {found[-1][0]:,.0f}")
        axes.set(title=metric, xlabel="Step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        drawn.append(Picture(encode(figure), f"Curve of {metric} by step. {'; '.join(said)}."))
    return drawn
