"""`vitlit validate`, `test` and `predict`: the numbers of a run, and predictions of photos."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, SMALL, Result, done, refused
from PIL import Image
from test_fit import columns, table

from vitlit import load
from vitlit.images.decode import decode

Command = Callable[..., Result]


def measured(out: str) -> dict[str, float]:
    """The numbers in the table that an evaluation prints, by the metric's name without its split."""
    return {name: float(value) for name, value in re.findall(r"(?:val|test)/(\w+)\W+?([\d.]+)", out)}


def test_validation_of_a_run_gives_the_numbers_of_its_best_epoch(vitlit: Command, work: Path) -> None:
    run = work / "runs" / "pretrain"
    rows = [row for row in table(run / "metrics.csv") if row["val/top1"]]
    best = max(rows, key=lambda row: float(row["val/top1"]))  # the first of them, where several are
    (run / "checkpoints" / "last.ckpt").write_text("not needed")
    numbers = measured(done(vitlit("validate", "runs/pretrain")))
    assert numbers == pytest.approx({name: float(best[f"val/{name}"]) for name in ("loss", "top1", "top1_macro")})
    assert measured(done(vitlit("validate", "--config", run / "config.yaml", "--data.batch_size", 4))) == pytest.approx(
        numbers
    )


def test_testing_a_run_reads_its_test_folder(vitlit: Command, few: Path, work: Path) -> None:
    refused(vitlit("test", "runs/pretrain"), "no folder test")
    shutil.copytree(few, work / "tested")
    shutil.copytree(few / "val", work / "tested" / "test")
    shutil.rmtree(work / "tested" / "val")
    assert measured(done(vitlit("test", "runs/pretrain", "--data.root", "tested"))) == pytest.approx(
        measured(done(vitlit("validate", "runs/pretrain")))
    )


def test_what_is_no_run_cannot_be_evaluated(vitlit: Command, work: Path) -> None:
    refused(vitlit("validate", "nowhere"), "nowhere is not the folder of a run")
    refused(vitlit("predict", "runs", "a.png"), "runs is not the folder of a run")
    photo, said = work / "a.png", "runs/pretrain has no best.ckpt: its last.ckpt is used\n"
    Image.new("RGB", (16, 16)).save(photo)
    assert "best.ckpt" not in done(vitlit("predict", "runs/pretrain", photo))
    (work / "runs" / "pretrain" / "checkpoints" / "best.ckpt").unlink()
    assert done(vitlit("predict", "runs/pretrain", photo)).count(said) == 1
    assert done(vitlit("weights", "show", "runs/pretrain")).count(said) == 1
    shutil.rmtree(work / "runs" / "pretrain" / "checkpoints")
    refused(vitlit("validate", "runs/pretrain"), "holds no checkpoints/best.ckpt")


def test_predictions_are_those_of_the_loaded_network_in_the_order_given(vitlit: Command, few: Path, work: Path) -> None:
    photos = [*sorted((few / "val").glob("*/*"))[::-3], few / "train" / "0" / "00000.png"]
    done(vitlit("predict", "runs/pretrain", *photos, "--out", "out/classes.csv", "--data.batch_size", 2))
    rows = table(work / "out" / "classes.csv")
    assert [row["path"] for row in rows] == [str(photo) for photo in photos]

    vit = load(work / "runs" / "pretrain")
    assert vit.preprocess is not None
    with torch.no_grad():
        probabilities, order = vit(vit.preprocess(photos)).softmax(-1).sort(descending=True)
    for row, expected, classes in zip(rows, probabilities.tolist(), order.tolist(), strict=True):
        found = [float(row[f"probability{end}"]) for end in ("", "_2", "_3", "_4")]
        assert found == pytest.approx(expected, abs=1e-5)
        assert [row[f"class{end}"] for end in ("", "_2", "_3", "_4")] == [vit.classes[i] for i in classes]


def test_photos_are_files_flat_folders_and_trees(vitlit: Command, few: Path, work: Path) -> None:
    flat = sorted((few / "val" / "1").iterdir())
    tree = sorted((few / "val").glob("*/*"))
    odd = work / os.fsdecode(b"caf\xe9.png")  # which is not UTF-8
    odd.write_bytes(flat[0].read_bytes())
    assert "12 images" in done(vitlit("predict", "runs/pretrain", odd, few / "val" / "1", few / "val"))
    rows = table(work / "runs" / "pretrain" / "predictions.csv")
    assert [row["path"] for row in rows] == [str(photo) for photo in dict.fromkeys((odd, *flat, *tree))]  # each once
    names = "path class probability class_2 probability_2 class_3 probability_3 class_4 probability_4"
    assert " ".join(rows[0]) == names  # there are 4 classes


def test_the_ground_of_transparent_images_goes_with_the_weights(vitlit: Command, few: Path, work: Path) -> None:
    drawings = sorted((few / "train").glob("*/*.png"))
    for path in drawings:  # the digit is in the transparency alone
        drawing = Image.new("RGBA", (8, 8), "white")
        drawing.putalpha(Image.open(path).convert("L"))
        copy = work / "drawings" / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        drawing.save(copy)
    photos = sorted((work / "drawings" / "1").iterdir())
    fit = ("fit", *SMALL, "--data.root", "drawings", "--data.holdout", "20%")
    done(vitlit(*fit, "--data.ground", "black", "--run.name", "black"))
    tuned = ("fit", "--config", REPOSITORY / "configs" / "finetune.yaml", *SMALL[-16:], "--data.holdout", "20%")
    done(vitlit(*tuned, "--model.init_from", "runs/black", "--data.root", "drawings", "--run.name", "tuned"))
    for run in ("black", "tuned"):
        vit = load(work / "runs" / run)
        assert vit.preprocess is not None
        images = vit.preprocess(photos)
        assert images.mean(dim=(1, 2, 3)).max() < 0.9  # on white there would be nothing
        assert torch.equal(images, vit.preprocess([decode(few / "train" / "1" / photo.name) for photo in photos]))
        done(vitlit("predict", f"runs/{run}", *photos))
        rows = table(work / "runs" / run / "predictions.csv")
        with torch.no_grad():
            likely = vit(images).softmax(-1).max(-1).values.tolist()
        assert [float(row["probability"]) for row in rows] == pytest.approx(likely, abs=1e-5)
    refused(vitlit(*fit, "--data.ground", "blak", "--run.name", "x"), "data.ground 'blak' is no colour")


def test_five_of_ten_classes_are_predicted(vitlit: Command, digits: Path, tmp_path: Path) -> None:
    done(vitlit("fit", *SMALL, "--data.root", digits, "--trainer.max_steps", 3))
    done(vitlit("predict", "--out", "five.csv", "runs/pretrain", digits / "val" / "7"))
    for row in table(tmp_path / "five.csv"):
        likely = [float(row[f"probability{end}"]) for end in ("", "_2", "_3", "_4", "_5")]
        assert likely == sorted(likely, reverse=True)
        assert sum(likely) <= 1
    assert len(row) == 11


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.png"], "missing.png does not exist"),
        (["empty"], "no image under empty"),
        (["notes.txt"], "cannot read the image notes.txt"),
        (["empty", "--out", "notes.txt/a.csv"], ""),
    ],
)
def test_photos_that_cannot_be_read_are_refused(vitlit: Command, work: Path, arguments: list[str], words: str) -> None:
    (work / "empty").mkdir()
    (work / "notes.txt").write_text("text")
    refused(vitlit("predict", "runs/pretrain", *arguments), words)
    assert not (work / "runs" / "pretrain" / "predictions.csv").exists()


@pytest.mark.parametrize("out", ["notes.txt/a.csv", "runs", "."])
def test_predictions_that_cannot_be_written_are_refused_before_any_is_made(
    vitlit: Command, few: Path, work: Path, out: str
) -> None:
    (work / "notes.txt").write_text("text")
    refused(vitlit("predict", "runs/pretrain", few / "val", "--out", out), f"cannot write {out}: ", "another --out")
    refused(vitlit("predict", "runs/pretrain", few / "val", "--out", "notes.txt"), "notes.txt exists: name another")
    assert not list(work.glob("*.partial"))


def manifest(few: Path, folder: Path, several: bool) -> Path:
    rows = [(path, path.parent.name, path.parent.parent.name) for path in sorted(few.rglob("*.png"))]
    more = ["|even" if several and int(label) % 2 == 0 else "" for _, label, _ in rows]
    lines = [
        f"{path.relative_to(few)},{label}{also},{split}" for (path, label, split), also in zip(rows, more, strict=True)
    ]
    (folder / "labels.csv").write_text("\n".join(["path,label,split", *lines]))
    return folder / "labels.csv"


@pytest.mark.parametrize("several", [False, True])
def test_a_run_on_a_manifest_is_evaluated_and_predicts_without_it(
    several: bool, vitlit: Command, few: Path, tmp_path: Path
) -> None:
    labels = manifest(few, tmp_path, several)
    flags = ["--data.root", few, "--data.manifest", labels]
    flags += ["--model.objective.init_args.loss", "bce"] if several else []
    said = done(vitlit("fit", *SMALL, *flags))
    assert ("best val/map" if several else "best val/top1") in said
    assert f"--data.manifest {labels}" in said
    metrics = {"val/loss", "val/map"} if several else {"val/loss", "val/top1", "val/top1_macro"}
    assert {name for name in columns(tmp_path / "runs/pretrain") if name.startswith("val/")} == metrics
    assert ("map" if several else "top1") in measured(done(vitlit("validate", "runs/pretrain")))
    labels.unlink()
    done(vitlit("predict", "runs/pretrain", few / "val", "--out", "out.csv"))
    assert len(table(tmp_path / "out.csv")) == 11
