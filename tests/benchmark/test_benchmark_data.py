"""`vitlit benchmark data`: its measurements and advice."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import refused
from PIL import Image
from sklearn.datasets import load_sample_images

from vitlit.benchmark import data, model
from vitlit.benchmark.data import advice


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 photographs of 427 x 640 pixels in two classes."""
    root = tmp_path_factory.mktemp("photos")
    for number, image in enumerate(load_sample_images().images):
        for copy in range(12):
            path = root / "train" / f"class{number}" / f"{copy}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path, quality=90)
    return root


def fast() -> None:
    """Time for less long than the command does."""
    data.SECONDS, model.SECONDS = 0.5, 0.01


def test_it_reports_the_stages_the_loader_and_the_model(vitlit: Callable[..., Any], photos: Path) -> None:
    flags = ("--batch_size", 4, "--images", 12, "--image_size", 64, "--model", "Ti/32")
    result = vitlit("benchmark", "data", photos, *flags, before=fast)
    assert result.code == 0, result.err
    assert "24 training images of" in result.out
    rows = dict(re.findall(r"^  (read|decode|crop, resize|transfer) +\d+\.\d+ +(\d+)%", result.out, re.M))
    assert len(rows) == 4
    assert abs(sum(map(int, rows.values())) - 100) <= 2
    marked = re.search(r"^  (\S.*?) +\d+\.\d+ +(\d+)%  slowest$", result.out, re.M)
    assert marked is not None
    assert int(marked[2]) == max(map(int, rows.values()))
    loaded = float(re.search(r"loader +([\d,]+) images/s", result.out)[1].replace(",", ""))  # type: ignore[index]
    assert loaded > 10
    assert "ViT-Ti/32" in result.out
    assert re.search(rf"num_workers \d+ suffice|would wait \d+% of its time, most of it for {marked[1]}", result.out)


def test_shards_and_holdouts_are_measured_alike(vitlit: Callable[..., Any], photos: Path, tmp_path: Path) -> None:
    assert vitlit("data", "shard", photos, "shards").code == 0
    options = ("--batch_size", 4, "--images", 8, "--image_size", 64, "--model", "none")
    result = vitlit("benchmark", "data", "shards", *options, "--holdout", "25%", before=fast)
    assert result.code == 0, result.err
    assert "18 training images" in result.out
    assert "ViT" not in result.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data"], "ROOT"),
        (["speed"], "no command 'benchmark'; did you mean benchmark data?"),
        (["data", "nowhere"], "nowhere is not a folder"),
        (["data", "{photos}", "--batch_size", "64"], "24 training images; give a smaller --batch_size"),
        (["data", "{photos}", "--batch_size", "0"], "must be at least 1"),
        (["data", "{photos}", "--model", "X/16"], "X/16"),
        (["data", "{photos}", "--batches", "1"], "--batches"),
    ],
)
def test_mistakes_are_one_line(vitlit: Callable[..., Any], photos: Path, arguments: list[str], words: str) -> None:
    result = vitlit("benchmark", *(part.format(photos=photos) for part in arguments))
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert words in result.err


def test_an_image_that_cannot_be_read_is_named_with_the_way_to_all(
    vitlit: Callable[..., Any], photos: Path, tmp_path: Path
) -> None:
    shutil.copytree(photos, tmp_path / "bad")
    (tmp_path / "bad/train/class0/0.jpg").write_bytes(b"?")
    refused(
        vitlit("benchmark", "data", "bad", "--batch_size", 4, "--image_size", 32, "--model", "none"),
        "class0/0.jpg",
        "`vitlit data check bad` lists all that cannot be read",
    )


def test_advice_gives_the_workers_that_the_model_needs() -> None:
    assert "--data.num_workers 2 suffice" in advice(needed=900, one=600, loaded=4000, workers=8, slowest="decode")
    assert "--data.num_workers 1 suffice" in advice(needed=3, one=600, loaded=600, workers=1, slowest="decode")
    assert "--data.num_workers 8 suffice" in advice(needed=3900, one=500, loaded=4000, workers=8, slowest="read")


@pytest.mark.parametrize("slowest", ["read", "decode", "crop, resize", "transfer"])
def test_advice_names_what_the_model_would_wait_for(slowest: str) -> None:
    text = advice(needed=4000, one=600, loaded=1000, workers=2, slowest=slowest)
    assert f"would wait 75% of its time, most of it for {slowest}: " in text
