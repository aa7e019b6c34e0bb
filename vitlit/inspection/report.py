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

from vitlit.files import write_text, writing

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
    matrix: Mapping[str, Any] | None = None
    folded: str = ""


def write_page(out: Path, title: str, about: str, sections: Sequence[Section]) -> None:
    """UserError where `out` cannot be written."""
    template = Path(__file__).with_name("report.html").read_text()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(template).render(title=title, about=about, sections=sections)
    with writing(out, "give another --out"):
        write_text(out, text.encode(errors="replace").decode())  # a name may be no text


def encode(drawn: Figure | Image.Image, dpi: int = 110) -> str:
    """A figure as PNG, or a photograph as JPEG, in a URI."""
    file, kind = BytesIO(), "png" if isinstance(drawn, Figure) else "jpeg"
    if isinstance(drawn, Figure):
        drawn.savefig(file, format=kind, dpi=dpi)
    else:
        drawn.save(file, kind, quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def curves(runs: Mapping[str, list[dict[str, float]]]) -> list[Picture]:
    """Each metric by step, of runs over each other, from rows of their metrics.csv; train is pale."""
    columns = sorted({name for rows in runs.values() for row in rows for name in row if name not in BESIDE})
    metrics = dict.fromkeys(name.partition("/")[2] for name in sorted(columns, key=lambda name: name[:3] != "val"))
    drawn = []
    for metric in metrics:
        figure, said = Figure((5, 3.2), layout="constrained"), []
        axes = figure.subplots()
        for number, (run, rows) in enumerate(runs.items()):
            for split, alpha in (("train", 0.4), ("val", 1.0)):
                found = [(row["step"] + 1, row[name]) for row in rows if (name := f"{split}/{metric}") in row]
                if not found:
                    continue
                parts = np.array_split(np.array(found), min(POINTS, len(found)))
                steps, values = np.array([part.mean(0) for part in parts]).T
                label, mark = f"{run}, {split}", "." if len(found) < 50 else ""
                axes.plot(steps, values, color=f"C{number}", alpha=alpha, marker=mark, label=label)
                said.append(f"{label}: {found[-1][1]:.4g} after step {found[-1][0]:,.0f}")
        axes.set(title=metric, xlabel="Step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        drawn.append(Picture(encode(figure), f"Curve of {metric} by step. {'; '.join(said)}."))
    return drawn
