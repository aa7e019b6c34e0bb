"""`vitlit evaluate`: its numbers are those of the features, whoever reads the images, and are kept."""

import csv
import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Result, done, launched, refused
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier

from vitlit import ViT, load, save_weights
from vitlit.images.preprocess import Preprocess

Command = Callable[..., Result]


def save(path: Path, seed: int = 0, classes: int = 4) -> None:
    torch.manual_seed(seed)
    vit: Any = ViT(16, 8, width=16, depth=2, heads=2, mlp_dim=32, num_classes=classes)
    torch.nn.init.normal_(vit.head.weight)
    vit.classes, vit.preprocess = [str(number) for number in range(classes)], Preprocess((16, 16))
    save_weights(vit, path)


@pytest.fixture
def evaluate(vitlit: Command, tmp_path: Path, few: Path) -> Command:
    """`vitlit evaluate a.safetensors b.safetensors` with flags, on the few digits, with short trainings."""
    save(tmp_path / "a.safetensors")
    save(tmp_path / "b.safetensors", 1)

    def run(*flags: object, workers: int = 0, cache: str = "cache") -> Result:
        def before() -> None:
            os.environ["XDG_CACHE_HOME"] = cache
            importlib.import_module("vitlit.evaluation.linear").STEPS = 10  # type: ignore[attr-defined]
            importlib.import_module("vitlit.prepare.features").count = lambda devices: workers  # type: ignore[attr-defined]

        return vitlit("evaluate", "a.safetensors", "b.safetensors", "--root", few, *flags, before=before)

    return run


def table(folder: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    numbers = [{k: float(v) for k, v in row.items() if v and k not in ("weights", "method", "metric")} for row in rows]
    return {(row["weights"][0], row["method"], row["metric"]): n for row, n in zip(rows, numbers, strict=True)}


def test_the_table_is_what_the_features_give(evaluate: Command, tmp_path: Path, few: Path) -> None:
    out = done(evaluate("--with", "knn,fewshot,linear,classify", "--seeds", 2, "--out", "out"))
    rows = table(tmp_path / "out")
    assert len(rows) == 2 * (2 * 2 + 2 + 2 + 6)
    sure = {metric: row for metric, row in rows.items() if metric[-1] != "ece"}
    assert all(row["low"] <= row["value"] <= row["high"] for row in sure.values() if row["value"] not in (0, 1))
    paths = {split: sorted((few / split).rglob("*.png")) for split in ("train", "val")}
    labels = {split: [int(path.parent.name) for path in found] for split, found in paths.items()}
    for name in "ab":
        vit: Any = load(tmp_path / f"{name}.safetensors")
        with torch.inference_mode():
            (_, train), (logits, val) = (vit.outputs(vit.preprocess(paths[split])) for split in ("train", "val"))
        assert rows[name, "classify", "top1"]["value"] == np.mean(logits.argmax(1).numpy() == labels["val"])
        weights = lambda apart: np.exp((1 - apart) / 0.07)  # noqa: E731
        neighbours = KNeighborsClassifier(10, metric="cosine", algorithm="brute", weights=weights)
        score = neighbours.fit(train, labels["train"]).score(val, labels["val"])
        assert rows[name, "knn 10", "top1"]["value"] == pytest.approx(score)
    first, other = (rows[name, "knn 10", "top1"]["value"] for name in "ab")
    assert rows["b", "knn 10", "top1"]["difference"] == pytest.approx(other - first)
    assert "difference" not in rows["a", "knn 10", "top1"]
    assert all(row["from"] <= row["difference"] <= row["to"] for name, row in sure.items() if name[0] == "b")
    content = json.loads((tmp_path / "out" / "table.json").read_text())
    assert content["table"][0]["weights"] == "a.safetensors"
    assert list(content["classes"]["b.safetensors, classify"]) == ["0", "1", "2", "3"]
    assert "knn: k of at most 20, as there are 40 images to learn from\n" in out
    assert out.count("\n") == 2 + len(rows)


def test_neighbours_of_features_that_are_nearly_alike_are_not_drawn_by_lot(
    vitlit: Command, tmp_path: Path, few: Path
) -> None:
    """Those of a ViT with random weights: float32 knows a handful of cosines among all of them."""
    torch.manual_seed(0)
    vit: Any = ViT(16, 8, width=16, depth=2, heads=2, mlp_dim=32)
    torch.nn.init.constant_(vit.norm.bias, 1000.0)
    vit.preprocess = Preprocess((16, 16))
    save_weights(vit, tmp_path / "a.safetensors")
    flags = ("--root", few, "--with", "knn", "--out", "out")
    done(vitlit("evaluate", "a.safetensors", *flags, before=lambda: os.environ.update(XDG_CACHE_HOME="cache")))
    paths = {split: sorted((few / split).rglob("*.png")) for split in ("train", "val")}
    with torch.inference_mode():
        train, val = (vit.eval()(vit.preprocess(paths[split])).double().numpy() for split in ("train", "val"))
    labels = {split: [int(path.parent.name) for path in found] for split, found in paths.items()}
    weights = lambda apart: np.exp((1 - apart) / 0.07)  # noqa: E731
    neighbours = KNeighborsClassifier(10, metric="cosine", algorithm="brute", weights=weights)
    score = neighbours.fit(train, labels["train"]).score(val, labels["val"])
    assert table(tmp_path / "out")["a", "knn 10", "top1"]["value"] == pytest.approx(score)


def test_the_numbers_do_not_depend_on_the_processes_and_features_are_kept(evaluate: Command, tmp_path: Path) -> None:
    alone, two = (done(evaluate(workers=workers, cache=f"cache{workers}")) for workers in (0, 2))
    assert alone == two
    kept = list((tmp_path / "cache0").rglob("*.npz"))
    assert len(kept) == 4
    for file in kept:
        file.write_bytes((tmp_path / "cache2").joinpath(file.relative_to(tmp_path / "cache0")).read_bytes())
    times = [file.stat().st_mtime_ns for file in kept]
    assert done(evaluate(cache="cache0")) == alone
    assert [file.stat().st_mtime_ns for file in kept] == times
    assert done(evaluate("--image_size", 24, cache="cache0")) != alone
    assert len(list((tmp_path / "cache0").rglob("*.npz"))) == 8


def test_two_processes_share_the_images_and_find_the_same(evaluate: Command, tmp_path: Path, digits: Path) -> None:
    flags = ("--root", digits, "--with", "knn,linear", "--seeds", 1)
    alone = done(evaluate(*flags))

    def before() -> None:
        os.environ["XDG_CACHE_HOME"] = "two"
        importlib.import_module("vitlit.evaluation.linear").STEPS = 10  # type: ignore[attr-defined]
        module: Any = importlib.import_module("vitlit.prepare.features")
        loader = module.loader

        def noted(images: Any, rows: Any, *_: Any) -> Any:
            with Path(f"rows{os.environ['RANK']}").open("a") as file:
                file.write(f"{len(rows)} ")
            return loader(images, rows, 7, 0)

        module.loader = noted

    first, second = launched(2, "evaluate", "a.safetensors", "b.safetensors", *flags, cwd=tmp_path, before=before)
    assert (done(first), done(second)) == (alone, "")
    read = [[int(rows) for rows in (tmp_path / f"rows{rank}").read_text().split()] for rank in range(2)]
    images = [len(list((digits / split).rglob("*.png"))) for split in ("train", "val")]
    assert [sum(rows) for rows in zip(*read, strict=True)][:2] == images
    assert read[1][0] > 0


def test_folds_measure_train(evaluate: Command, tmp_path: Path, few: Path) -> None:
    paths = [path.relative_to(few) for path in sorted((few / "train").rglob("*.png"))]
    rows = [f"{path},{path.parent.name},{number // 2}" for number, path in enumerate(paths)]
    (tmp_path / "groups.csv").write_text("\n".join(["path,label,group", *rows]))
    probes = "knn,fewshot,linear,logistic"
    done(evaluate("--with", probes, "--folds", 2, "--manifest", "groups.csv", "--shots", "1,2", "--out", "out"))
    found = table(tmp_path / "out")
    named = {method for _, method, _ in found}
    assert named == {"1-shot", "2-shot", "linear", "logistic", *(f"knn {k}" for k in (10, 20))}
    assert found["a", "knn 10", "top1"]["value"] * 40 * 3 == pytest.approx(
        round(found["a", "knn 10", "top1"]["value"] * 120)
    )
    assert found["a", "knn 10", "top1"]["deviation"] > 0  # each seed has its folds


def write(folder: Path, few: Path, names: dict[str, str]) -> None:
    """The validation images of the few digits' classes in class folders of other names."""
    for digit, name in names.items():
        shutil.copytree(few / "val" / digit, folder / name)


def top1(path: Path, few: Path, columns: dict[str, int]) -> float:
    """The share of the images of these digits whose output is the highest of those of these numbers."""
    vit: Any = load(path)
    paths = [path for digit in columns for path in sorted((few / "val" / digit).iterdir())]
    with torch.inference_mode():
        found = vit(vit.preprocess(paths))[:, list(columns.values())].argmax(1)
    return float(
        np.mean([list(columns)[number] == path.parent.name for number, path in zip(found, paths, strict=True)])
    )


def test_a_part_of_the_classes_is_measured_among_them(
    evaluate: Command, vitlit: Command, tmp_path: Path, few: Path
) -> None:
    """As on ImageNet-A and -R, whose folders are some of the classes; V2's and Sketch's need a file."""
    write(tmp_path / "some", few, {"1": "1", "3": "3"})
    out = done(evaluate("--root", "some", "--with", "classify", "--out", "one"))
    assert "a.safetensors: top1 among 2 of 4 classes\n" in out
    for name in "ab":
        expected = top1(tmp_path / f"{name}.safetensors", few, {"1": 1, "3": 3})
        assert table(tmp_path / "one")[name, "classify", "top1"]["value"] == expected
    write(tmp_path / "named" / "val", few, {"0": "first", "1": "second", "2": "x", "3": "y"})
    (tmp_path / "classes.csv").write_text("first,2\nsecond,0\nx,1\ny,3\n")
    refused(evaluate("--root", "named", "--with", "classify"), "'first'", "--classes")
    out = done(evaluate("--root", "named", "--with", "classify", "--classes", "classes.csv", "--out", "two"))
    assert "among" not in out
    expected = top1(tmp_path / "a.safetensors", few, {"0": 2, "1": 0, "2": 1, "3": 3})
    assert table(tmp_path / "two")["a", "classify", "top1"]["value"] == expected
    refused(evaluate("--root", "some", "--with", "classify", "--calibrate"), "all 4 classes of a.safetensors")


def test_real_labels_are_a_metric(evaluate: Command, tmp_path: Path, few: Path) -> None:
    """2006.07159: images that no label fits do not count, and each that fits is right."""
    paths = sorted((few / "val").rglob("*.png"))
    for number, path in enumerate(paths):
        name = f"n0000000{path.parent.name}/ILSVRC2012_val_{number + 1:08d}.png"
        (tmp_path / "imagenet" / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "imagenet" / "val" / name)
    (tmp_path / "classes.csv").write_text("".join(f"n0000000{number},{number}\n" for number in range(4)))
    real = [[], *([number % 4, (number + 1) % 4] for number in range(len(paths) - 1))]
    (tmp_path / "real.json").write_text(json.dumps(real))
    flags = ("--root", "imagenet", "--with", "classify", "--classes", "classes.csv", "--real", "real.json")
    done(evaluate(*flags, "--out", "out"))
    vit: Any = load(tmp_path / "a.safetensors")
    with torch.inference_mode():
        found = vit(vit.preprocess(paths)).argmax(1).tolist()
    right = [number in labels for number, labels in zip(found, real, strict=True) if labels]
    assert table(tmp_path / "out")["a", "classify", "real"]["value"] == pytest.approx(np.mean(right))
    refused(evaluate("--with", "classify", "--real", "real.json"), "real.json", "WordNet")


def test_several_classes_an_image_give_the_map(evaluate: Command, tmp_path: Path, few: Path) -> None:
    paths = {split: sorted((few / split).rglob("*.png")) for split in ("train", "val")}
    rows = ["path,label,split"]
    for split, found in paths.items():
        rows += [
            f"{path.relative_to(few)},{path.parent.name}{'|0' if i % 3 else ''},{split}" for i, path in enumerate(found)
        ]
    (tmp_path / "several.csv").write_text("\n".join(rows))
    done(evaluate("--with", "classify", "--manifest", "several.csv", "--out", "out"))
    labels = np.zeros((len(paths["val"]), 4), bool)
    for row, path in enumerate(paths["val"]):
        labels[row, [int(path.parent.name), *([0] if row % 3 else [])]] = True
    content = json.loads((tmp_path / "out" / "table.json").read_text())["classes"]
    for name in "ab":
        vit: Any = load(tmp_path / f"{name}.safetensors")
        with torch.inference_mode():
            logits = vit(vit.preprocess(paths["val"])).numpy()
        expected = average_precision_score(labels, logits, average=None)
        assert table(tmp_path / "out")[name, "classify", "map"]["value"] == pytest.approx(expected.mean())
        assert list(content[f"{name}.safetensors, classify"].values()) == pytest.approx(expected.tolist())
    assert not (tmp_path / "out" / "reliability.png").exists()
    refused(evaluate("--manifest", "several.csv"), "several classes", "classify alone")
    refused(evaluate("--with", "classify", "--calibrate", "--manifest", "several.csv"), "several classes")


def test_mistakes_are_one_line(evaluate: Command, vitlit: Command, tmp_path: Path, few: Path) -> None:
    refused(evaluate("--with", "knn,lda"), "'lda'", "fewshot")
    refused(evaluate("--with", "classify", "--folds", 2), "--folds")
    refused(evaluate("--with", "fewshot", "--shots", 10), "10 training images", "fewer")
    one = tmp_path / "one"
    for split in ("train", "val"):
        shutil.copytree(few / split / "1", one / split / "1")
    refused(evaluate("--root", one, "--with", "knn,logistic"), "one class")
    (tmp_path / "file").touch()
    refused(evaluate("--out", "file"), "file exists: name another")
    refused(evaluate("--seeds", 0), "seeds is 0")
    refused(evaluate("--shots", "1,x"), "'1,x'", "1,5,10,25")
    refused(evaluate("--image_size", 17), "17", "16")
    refused(evaluate("--folds", 500), "500 folds: ", "10")
    refused(evaluate("--root", few / "val"), "--root", "--holdout")
    refused(evaluate("--with", "classify", "--classes", "none.csv"), "none.csv", "No such file")
    shutil.copytree(few, tmp_path / "bad")
    (tmp_path / "bad" / "val" / "0" / "x.png").write_text("no image")
    refused(unread := evaluate("--root", "bad"), "x.png", "remove or replace it")
    assert "on_bad_image" not in unread.err
    refused(evaluate("--holdout", "x"), "--holdout x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "table.csv").touch()
    refused(evaluate("--out", "out"), "out exists and is not empty: name another")
    (tmp_path / "flat" / "train").mkdir(parents=True)
    shutil.copy(next((few / "val" / "0").iterdir()), tmp_path / "flat" / "train")
    refused(evaluate("--root", "flat"), "without classes", "class folders")
    save(tmp_path / "b.safetensors", classes=3)
    refused(evaluate("--with", "classify", cache="none"), "b.safetensors", "'3'")
    assert not (tmp_path / "none").exists()  # the second weights are looked at before the first are measured
    vit = ViT(16, 8, width=16, depth=2, heads=2, mlp_dim=32)
    save_weights(vit, tmp_path / "a.safetensors")
    refused(evaluate(), "a.safetensors", "preprocess")
