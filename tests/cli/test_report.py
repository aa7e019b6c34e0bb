"""`vitlit report RUN`: one page that tells what the run's files do, and opens without a network."""

import csv
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL, Result, done, refused

from vitlit.cli.main import main

Command = Callable[..., Result]


class Page(HTMLParser):
    """The headings, images, cells by row of each section's tables, and all text of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.source = file.read_text()
        self.headings: list[tuple[str, str]] = []
        self.images: list[dict[str, Any]] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.references: list[str] = []
        self._open: list[str] = []
        self.feed(self.source)
        self.text = " ".join(re.sub("<[^>]*>", " ", self.source).split())

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        given = dict(attributes)
        self.references += [given[name] for name in ("src", "href", "data", "action") if name in given]
        self._open.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.headings.append((tag, ""))
        elif tag == "img":
            self.images.append(given)
        elif tag == "tr":
            self.rows.setdefault(self.headings[-1][1], []).append([])
        elif tag in ("td", "th"):
            self.rows[self.headings[-1][1]][-1].append("")

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside in ("h1", "h2", "h3"):
            self.headings[-1] = (inside, data)
        elif inside in ("td", "th", "span"):
            self.rows[self.headings[-1][1]][-1][-1] += data.strip()

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def opens_without_a_network(self) -> None:
        assert self.references
        assert all(each.startswith(("data:", "#")) for each in self.references)
        assert not re.search(r"https?:|@import|url\(", self.source)
        assert len(self.source) < 5_000_000

    def is_readable_by_ear(self) -> None:
        levels = [int(tag[1]) for tag, _ in self.headings]
        assert levels[0] == 1
        assert set(levels[1:]) == {2}
        assert all(len(image["alt"]) > 10 for image in self.images)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def page(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    out = tmp_path_factory.mktemp("page") / "page.html"
    assert main(["report", str(trained / "runs" / "pretrain"), "--out", str(out)]) == 0
    return Page(out)


def test_it_opens_without_a_network_and_has_headings_and_alternative_texts(page: Page) -> None:
    page.opens_without_a_network()
    page.is_readable_by_ear()
    parts = "Trained Results Curves Confusion matrix Worst mistakes Calibration Attention Environment"
    assert " ".join(heading for _, heading in page.headings[1:]) == parts
    assert "Left out" not in page.text


def test_its_numbers_are_those_of_the_runs_files(page: Page, trained: Path) -> None:
    run = trained / "runs" / "pretrain"
    rows = [row for row in table(run / "metrics.csv") if row["val/top1"]]
    best = max(rows, key=lambda row: float(row["val/top1"]))
    results = {row[0]: row[1:] for row in page.rows["Results"][1:]}
    assert set(results) == {name for name in best if name.startswith("val/")}
    for name, (value, limits, last) in results.items():
        loss = name == "val/loss"
        words = (f"{float(row[name]):.4f}" if loss else f"{100 * float(row[name]):.2f} %" for row in (best, rows[-1]))
        assert (value, last) == tuple(words)
        if not loss:
            low, high = (float(limit.removesuffix(" %")) for limit in limits.split(" to "))
            assert low <= float(value.removesuffix(" %")) <= high
    trained_on = dict(page.rows["Trained"])
    assert trained_on["Images"] == "40 train, 11 val; 4 classes"
    assert trained_on["Command"] == json.loads((run / "run.json").read_text())["commands"][0]["command"]


def test_its_confusion_matrix_counts_the_images(page: Page, trained: Path) -> None:
    images = table(trained / "runs" / "pretrain" / "validation.csv")
    counts = Counter((row["label"], row["prediction"]) for row in images)
    header, *rows = page.rows["Confusion matrix"][:5]
    assert header[1:] == [row[0] for row in rows] == list("0123")
    assert {
        (row[0], guess): int(n) for row in rows for guess, n in zip("0123", row[1:], strict=True) if n != "0"
    } == counts
    wrong = sum(n for (label, guess), n in counts.items() if label != guess)
    assert f"{wrong} of 11 validation images are wrong" in page.text
    assert sum("jpeg" in image["src"] for image in page.images) == wrong


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "runs" / "pretrain", tmp_path / "run"))


def test_many_classes_are_a_picture_whose_cells_are_read_out(copy: Path, few: Path) -> None:
    """And their names are text, whatever they are."""
    names = ["</script><b>", *(f"class {i}" for i in range(60))]
    lines = [f"{i}.png,{name},{names[i * i % 61]},0.5,0.1,1" for i, name in enumerate(names)]
    (copy / "validation.csv").write_text(
        "\n".join(["path,label,prediction,probability,label_probability,above", *lines, ""])
    )
    shutil.rmtree(copy / "checkpoints")
    assert main(["report", str(copy)]) == 0
    page = Page(copy / "report.html")
    page.opens_without_a_network()
    page.is_readable_by_ear()
    assert "<b>" not in page.source
    found = json.loads(re.findall(r'<script type="application/json" id="matrix">(.*?)</script>', page.source, re.S)[0])
    expected = {(name, names[i * i % 61]): 1 for i, name in enumerate(names)}
    assert {(found["classes"][a], found["classes"][b]): n for a, b, n in found["counts"]} == expected
    assert "Left out: " in page.text  # attention, without weights


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (["validation.csv", "metrics.csv", "run.json"], ["no validation.csv", "nothing has been logged"]),
        (
            ["checkpoints", "data"],
            ["checkpoints/best.ckpt", "data.root nowhere is not a folder", "validation images are wrong"],
        ),
    ],
)
def test_what_is_not_there_is_said(copy: Path, gone: list[str], said: list[str]) -> None:
    config = yaml.safe_load((copy / "config.yaml").read_text())
    for name in gone:
        if name == "data":
            config["data"]["root"] = "nowhere"
        elif name == "checkpoints":
            (copy / name / "best.ckpt").unlink()
            (copy / name / "last.ckpt").unlink()
        else:
            (copy / name).unlink()
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["report", str(copy)]) == 0
    page = Page(copy / "report.html")
    page.is_readable_by_ear()
    assert all(words in page.text for words in said)


def test_a_training_ends_by_writing_it_unless_that_fails(vitlit: Command, few: Path, run: Path) -> None:
    def fails() -> None:
        def write(*_: Any) -> None:
            raise OSError("no room")

        setattr(__import__("vitlit.cli.report").cli.report.Report, "write", write)  # noqa: B010

    command = ("fit", *SMALL, "--data.root", few, "--run.report", "true")
    out = done(vitlit(*command, before=fails))
    assert "the report was not written (OSError: no room); vitlit report runs/pretrain tries again" in out
    assert (run / "finished.json").exists()
    assert "runs/pretrain/report.html" in done(vitlit(*command, "--run.overwrite", "true"))
    assert "finished · best val/top1" in Page(run / "report.html").text


def test_mistakes_are_one_line(vitlit: Command, tmp_path: Path, copy: Path) -> None:
    refused(vitlit("report", tmp_path), "is not the folder of a run")
    refused(vitlit("report", copy, "--out", tmp_path / "no" / "page.html"), "cannot write", "give another --out")
    refused(vitlit("report", copy, "--out", copy / "config.yaml"), "config.yaml exists: name another")
