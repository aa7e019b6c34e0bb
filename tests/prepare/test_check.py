"""`vitlit data check ROOT`: every fault that is planted in a clean folder is found, and nothing else."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from vitlit.data.folder import scan_train
from vitlit.errors import UserError
from vitlit.prepare.check import check, run
from vitlit.prepare.report import FAULTS, WARNINGS, Paths, Report, look
from vitlit.prepare.shard import run as write_shards

TAG = 0x0112  # EXIF's orientation


def upside_down() -> Image.Exif:
    exif = Image.Exif()
    exif[TAG] = 3
    return exif


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of two real photographs in two classes, 6 plain JPEGs for training and 2 for validation each, and 7 odd
    images in train/flower, none of which is wrong."""
    root = tmp_path_factory.mktemp("check") / "photos"
    for name, pixels in zip(("temple", "flower"), load_sample_images().images, strict=True):
        photo = Image.fromarray(pixels)
        for split, numbers in (("train", range(6)), ("val", range(6, 8))):
            (root / split / name).mkdir(parents=True)
            for i in numbers:
                crop = photo.crop((70 * i, 100, 70 * i + 60, 150))
                crop.save(root / split / name / f"{i}.jpg", quality=95)
    odd = [photo.crop((70 * i, 200, 70 * i + 60, 250)) for i in range(7)]
    folder = root / "train" / "flower"
    odd[0].convert("L").save(folder / "grey.jpg")
    odd[1].convert("CMYK").save(folder / "print.jpg")
    odd[2].convert("P").save(folder / "palette.png")
    odd[3].convert("RGBA").save(folder / "alpha.png")
    odd[4].convert("1").save(folder / "one bit.png")
    odd[5].save(folder / "turned.jpg", exif=upside_down())
    odd[6].save(folder / "png.JPEG", format="PNG")
    return root


@pytest.fixture
def photos(clean: Path, tmp_path: Path) -> Path:
    """A copy of the clean folder to spoil."""
    return Path(shutil.copytree(clean, tmp_path / "photos"))


def kinds(report: Report) -> dict[str, Paths]:
    """The paths of every finding; FAULTS are where faults belong, and WARNINGS where warnings do."""
    assert {one.kind for one in report.faults} <= set(FAULTS)
    assert {one.kind for one in report.warnings} <= set(WARNINGS)
    found: dict[str, Paths] = {}
    for one in report.faults + report.warnings:
        found.setdefault(one.kind, []).extend(one.paths)
    return found


def test_a_clean_folder_has_no_finding_and_its_facts(
    clean: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    assert run([str(clean), "--json", str(file), "--workers=1"]) == 0
    found = json.loads(file.read_text())
    assert (found["root"], found["ok"], found["faults"], found["warnings"]) == (str(clean), True, [], [])
    assert found["splits"] == {
        "train": {
            "images": 19,
            "classes": 2,
            "class_sizes": {
                "smallest": {"class": "temple", "images": 6},
                "largest": {"class": "flower", "images": 13},
                "median": 9.5,
            },
            "shorter_side": {"min": 50, "median": 50, "max": 50},
        },
        "val": {
            "images": 4,
            "classes": 2,
            "class_sizes": {
                "smallest": {"class": "flower", "images": 2},
                "largest": {"class": "flower", "images": 2},
                "median": 2,
            },
            "shorter_side": {"min": 50, "median": 50, "max": 50},
        },
    }
    out, err = capfd.readouterr()
    assert "19 in 2 classes" in out
    assert "\x1b" not in out
    assert "all is well" in out
    assert err == ""


# Faults and warnings: each plant spoils a folder and returns all that must be found

Found = dict[str, Paths]
Plant = Callable[[Path], Found]
PLANTS: list[Plant] = []


def planted(plant: Plant) -> Plant:
    PLANTS.append(plant)
    return plant


def cut_off(options: dict[str, object], ending: str, share: float) -> Plant:
    def plant(root: Path) -> Found:
        path = root / f"train/flower/cut.{ending}"
        Image.open(root / "train/flower/0.jpg").crop((0, 0, 50, 50)).save(path, **options)  # type: ignore[arg-type]
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        return {"unreadable": [f"train/flower/cut.{ending}"]}

    plant.__name__ = f"cut_{ending}_{share}_{'_'.join(options)}"
    return plant


for options, ending in (
    ({}, "jpg"),
    ({"progressive": True}, "jpg"),
    ({}, "png"),
    ({}, "webp"),
    ({}, "gif"),
    ({}, "bmp"),
):
    for share in (0.5, 0.97):
        planted(cut_off(options, ending, share))  # type: ignore[arg-type]


@planted
def empty_file(root: Path) -> Found:
    (root / "val/temple/empty.png").touch()
    return {"unreadable": ["val/temple/empty.png"]}


@planted
def web_page(root: Path) -> Found:
    (root / "train/temple/404.jpg").write_text("<html>404</html>")
    return {"unreadable": ["train/temple/404.jpg"]}


@planted
def broken_link(root: Path) -> Found:
    (root / "train/temple/link.jpg").symlink_to("nowhere.jpg")
    return {"unreadable": ["train/temple/link.jpg"]}


@planted
def name_that_is_not_utf8(root: Path) -> Found:
    (root / "train/temple" / os.fsdecode(b"caf\xe9.jpg")).touch()
    return {"unreadable": [f"train/temple/{os.fsdecode(b'caf' + bytes([0xE9]) + b'.jpg')}"]}


@planted
def cut_off_and_ended_anew(root: Path) -> Found:
    path = root / "train/flower/1.jpg"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3] + b"\xff\xd9")
    return {"truncated": ["train/flower/1.jpg"]}


@planted
def junk_before_the_end(root: Path) -> Found:
    path = root / "train/flower/1.jpg"
    path.write_bytes(path.read_bytes()[:-2] + bytes(40) + b"\xff\xd9")
    return {"corrupt": ["train/flower/1.jpg"]}


@planted
def more_pixels_than_are_decoded(root: Path) -> Found:
    Image.new("1", (14_000, 13_000)).save(root / "train/flower/large.png")
    return {"too_large": ["train/flower/large.png"]}


@planted
def tiny(root: Path) -> Found:
    Image.open(root / "train/flower/0.jpg").resize((40, 15)).save(root / "train/flower/tiny.png")
    Image.open(root / "train/flower/0.jpg").resize((40, 16)).save(root / "train/flower/large enough.png")
    return {"small": ["train/flower/tiny.png"]}


@planted
def empty_class(root: Path) -> Found:
    (root / "train/tree").mkdir()
    return {"empty_class": ["train/tree"]}


@planted
def class_of_unknown_files(root: Path) -> Found:
    (root / "val/temple/0").mkdir()
    for name in ("a.heic", "b.HEIC", "notes"):
        (root / "val/temple/0" / name).write_text("?")
    return {"ignored_file": ["val/temple/0/a.heic", "val/temple/0/b.HEIC", "val/temple/0/notes"]}


@planted
def class_that_train_lacks(root: Path) -> Found:
    (root / "val/temple").rename(root / "val/pagoda")
    return {"unknown_class": ["val/pagoda"], "missing_class": ["train/temple"]}


@planted
def class_that_val_lacks(root: Path) -> Found:
    shutil.rmtree(root / "val/temple")
    return {"missing_class": ["train/temple"]}


@planted
def class_in_another_case(root: Path) -> Found:
    for name in ("Temple", "temple "):
        (root / "train" / name).mkdir()
        Image.open(root / "train/temple/0.jpg").rotate(90).save(root / "train" / name / f"{name}.png")
        Image.effect_noise((20, 20), 50).save(root / "train" / name / f"{name}.png")
    return {"similar_class": [["Temple", "temple", "temple "]], "missing_class": ["train/Temple", "train/temple "]}


@planted
def image_outside_of_classes(root: Path) -> Found:
    shutil.copy(root / "train/temple/0.jpg", root / "train/0.jpg")
    (root / "train/README.txt").touch()
    return {"outside_class": ["train/0.jpg"], "ignored_file": ["train/README.txt"]}


@planted
def class_that_was_not_unpacked(root: Path) -> Found:
    for name in ("train/tree.tar.gz", "val/temple.zip", "train/temple/more.zip"):  # val/temple was
        (root / name).touch()
    return {"archive": ["train/tree.tar.gz"], "ignored_file": ["train/temple/more.zip", "val/temple.zip"]}


@planted
def class_of_files_that_are_not_read(root: Path) -> Found:
    (root / "train/tree").mkdir()
    for name in ("a.heic", "b.heic", "c.zip"):
        (root / "train/tree" / name).touch()
    return {"unread_class": ["train/tree"]}


@planted
def links_to_nothing(root: Path) -> Found:
    for name in ("train/tree", "val/tree", "train/temple/deep", "test"):
        (root / name).symlink_to("/nowhere")
    return {"dead_link": ["test", "train/temple/deep", "train/tree", "val/tree"]}


@planted
def sixteen_bits(root: Path) -> Found:
    grey = np.asarray(Image.open(root / "train/flower/0.jpg").convert("L")).astype(np.uint16)
    Image.fromarray(grey * 257).save(root / "train/flower/deep.png")
    return {"unreadable": ["train/flower/deep.png"]}


@planted
def white_on_transparent(root: Path) -> Found:
    shape = Image.open(root / "train/flower/0.jpg").convert("L").rotate(180)
    for split, colour in (("train", "white"), ("val", "white"), ("train", "black")):
        drawing = Image.new("RGBA", shape.size, colour)
        drawing.putalpha(shape)
        drawing.save(root / split / "flower" / f"{colour}.png")
    return {"uniform": ["train/flower/white.png", "val/flower/white.png"]}


@planted
def split_in_another_spelling(root: Path) -> Found:
    (root / "val").rename(root / "Validation")
    (root / "Validation/temple/empty.png").touch()
    return {"split_name": ["Validation"], "unreadable": ["Validation/temple/empty.png"]}


@planted
def two_spellings_of_train(root: Path) -> Found:
    (root / "Train").mkdir()
    return {"split_name": ["Train"]}


@planted
def no_val(root: Path) -> Found:
    shutil.rmtree(root / "val")
    return {"no_split": ["val"]}


@planted
def empty_val(root: Path) -> Found:
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    return {"empty_split": ["val"], "missing_class": ["train/flower", "train/temple"]}


@planted
def copy_in_another_format_in_val(root: Path) -> Found:
    Image.open(root / "train/flower/palette.png").convert("RGB").save(root / "val/temple/copy.bmp")
    return {"leakage": [["train/flower/palette.png", "val/temple/copy.bmp"]]}


@planted
def copy_turned_by_exif_in_test(root: Path) -> Found:
    photo = Image.open(root / "train/flower/alpha.png").convert("RGB").rotate(180)
    for name in ("flower", "temple"):
        (root / "test" / name).mkdir(parents=True)
        Image.effect_noise((20, 20), 50).save(root / "test" / name / "noise.png")
    photo.save(root / "test/flower/copy.png", exif=upside_down())
    return {"leakage": [["train/flower/alpha.png", "test/flower/copy.png"]]}


@planted
def copy_of_val_in_test(root: Path) -> Found:
    for name in ("flower", "temple"):
        (root / "test" / name).mkdir(parents=True)
        Image.effect_noise((20, 20), 50).save(root / "test" / name / "noise.png")
    shutil.copy(root / "val/flower/6.jpg", root / "test/flower/copy.jpg")
    return {"overlap": [["val/flower/6.jpg", "test/flower/copy.jpg"]]}


@planted
def two_labels(root: Path) -> Found:
    shutil.copy(root / "train/flower/0.jpg", root / "train/temple/copy.jpg")
    shutil.copy(root / "train/flower/0.jpg", root / "train/flower/copy.jpg")
    return {"contradiction": [["train/flower/0.jpg", "train/flower/copy.jpg", "train/temple/copy.jpg"]]}


@planted
def the_same_twice(root: Path) -> Found:
    shutil.copy(root / "train/flower/0.jpg", root / "train/flower/copy.jpg")
    return {"duplicate": [["train/flower/0.jpg", "train/flower/copy.jpg"]]}


@planted
def link_to_the_classes_from_one(root: Path) -> Found:
    (root / "val/temple/up").symlink_to("../flower")
    return {"contradiction": [[f"val/flower/{i}.jpg", f"val/temple/up/{i}.jpg"] for i in (6, 7)]}


@planted
def images_that_are_no_copies(root: Path) -> Found:
    photo = Image.open(root / "train/flower/palette.png").convert("RGB")
    photo.putpixel((59, 49), (1, 2, 3))  # the last pixel alone
    photo.save(root / "val/flower/other.png")
    Image.new("RGB", (20, 30)).save(root / "train/flower/black.png")
    Image.new("RGB", (30, 20)).save(root / "val/flower/black.png")
    return {"uniform": ["train/flower/black.png", "val/flower/black.png"]}


@planted
def links_in_a_circle(root: Path) -> Found:
    (root / "train/temple/more").mkdir()
    (root / "train/temple/more/round").symlink_to("..")
    (root / "train/temple/more/up").symlink_to("../..")
    return {}


@planted
def class_that_is_a_link_to_all_classes(root: Path) -> Found:
    (root / "train/all").symlink_to(".")
    return {"empty_class": ["train/all"]}


@planted
def link_to_itself(root: Path) -> Found:
    (root / "train/temple/loop.jpg").symlink_to("loop.jpg")
    (root / "train/loop").symlink_to("loop")
    return {"unreadable": ["train/temple/loop.jpg"], "dead_link": ["train/loop"]}


@planted
def hidden(root: Path) -> Found:
    (root / "train/temple/._0.jpg").touch()
    for folder in ("train/.cache", "train/temple/.cache"):
        (root / folder).mkdir()
        (root / folder / "0.jpg").touch()
    (root / ".Val").mkdir()
    return {}


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_what_is_planted_is_found_and_nothing_else(
    plant: Plant, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = plant(photos)
    report = check(photos)
    assert kinds(report) == expected
    report.print()
    report.write(tmp_path / "report.json")
    out, err = capfd.readouterr()
    assert err == ""  # C libraries' complaints, without the name of a file, included
    assert all(kind in out for kind in expected)
    written = json.loads((tmp_path / "report.json").read_text())
    assert {one["kind"]: one["paths"] for one in written["faults"] + written["warnings"]} == expected
    assert written["ok"] == report.ok == expected.keys().isdisjoint(FAULTS)


def test_uniform_images_are_told_why_and_another_ground_helps(photos: Path) -> None:
    white_on_transparent(photos)
    [found] = check(photos).warnings
    assert "the ground, white; give another data.ground" in found.reasons["val/flower/white.png"]
    on_black = check(photos, look=partial(look, ground="black"))
    assert not on_black.ok  # both splits have this drawing, which can be seen now
    assert kinds(on_black)["leakage"] == [["train/flower/white.png", "val/flower/white.png"]]
    assert kinds(on_black)["uniform"] == ["train/flower/black.png"]


def test_a_class_is_told_what_it_holds_instead_of_images(photos: Path) -> None:
    class_of_files_that_are_not_read(photos)
    [fault] = check(photos).faults
    assert fault.reasons == {"train/tree": ".heic 2, .zip 1"}


def test_every_kind_is_planted(photos: Path, tmp_path: Path) -> None:
    found: set[str] = {"imbalance", "channels", "beyond"}  # below
    found |= {"near_duplicate", "label_error"}  # in tests/cli/test_embed.py
    for number, plant in enumerate(PLANTS):
        found |= set(plant(Path(shutil.copytree(photos, tmp_path / str(number)))))
    assert found == {*FAULTS, *WARNINGS}


def test_a_rare_class_is_a_warning(tmp_path: Path) -> None:
    for split, name, images in (("train", "many", 101), ("train", "one", 1), ("val", "many", 1), ("val", "one", 1)):
        (tmp_path / split / name).mkdir(parents=True)
        for i in range(images):
            Image.effect_noise((16, 16), 50).save(tmp_path / split / name / f"{i}.png")
    report = check(tmp_path)
    assert kinds(report) == {"imbalance": ["train/one"]}
    assert "--data.balanced true" in report.warnings[0].message
    (tmp_path / "train/many/0.png").unlink()
    assert kinds(check(tmp_path)) == {}


def test_many_faults_at_once_are_all_found_and_ten_are_shown(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = [f"train/temple/empty{i:02d}.jpg" for i in range(13)]
    for name in names:
        (photos / name).touch()
    leak = copy_in_another_format_in_val(photos)
    assert run([f"--json={tmp_path / 'report.json'}", str(photos)]) == 1
    found = json.loads((tmp_path / "report.json").read_text())
    assert {one["kind"]: one["paths"] for one in found["faults"]} == {"unreadable": names, **leak}
    out = capfd.readouterr().out
    assert [name in out for name in names] == [True] * 10 + [False] * 3
    assert "and 3 more" in out
    assert "train/flower/palette.png = val/temple/copy.bmp" in out
    assert "restore or remove" in out


def test_each_file_that_cannot_be_read_has_its_reason(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for spoil in (empty_file, web_page, broken_link):
        spoil(photos)
    assert run([str(photos), f"--json={tmp_path / 'report.json'}"]) == 1
    (fault,) = json.loads((tmp_path / "report.json").read_text())["faults"]
    assert fault["reasons"] == {
        "train/temple/404.jpg": "it is no JPEG PNG WEBP GIF BMP PPM TIFF AVIF JPEG2000",
        "train/temple/link.jpg": "No such file or directory",
        "val/temple/empty.png": "it is empty",
    }
    out = capfd.readouterr().out
    assert all(f"\n  {path}: {reason}\n" in out for path, reason in fault["reasons"].items())


# A holdout


def test_a_holdout_is_cut_as_training_cuts_it(clean: Path) -> None:
    _, train, held = scan_train(clean, 0.2)
    assert held is not None
    for root in (clean, clean / "train"):
        report = check(root, holdout=0.2)
        assert kinds(report) == {}
        assert [report.splits[split]["images"] for split in ("train", "val")] == [len(train), len(held)]


def test_copies_on_both_sides_of_a_holdout_are_leakage(photos: Path) -> None:
    root = photos / "train"
    for i in range(8):  # of so many some are on either side
        shutil.copy(root / "temple/0.jpg", root / f"temple/copy{i}.jpg")
    held = scan_train(photos, 0.3)[2]
    assert held is not None
    copies = {name for name in (str(held.path(i)) for i in range(len(held))) if "copy" in name or "temple/0" in name}
    leaked = kinds(check(root, holdout=0.3))["leakage"]
    assert {str(root / pair[1]) for pair in leaked} == copies
    assert copies


def test_splits_in_another_spelling_are_no_classes_of_a_holdout(photos: Path) -> None:
    (photos / "train").rename(photos / "Train")
    (photos / "val").rename(photos / "valid")
    assert kinds(check(photos, holdout=0.2)) == {"split_name": ["Train"]}


def test_a_class_may_have_a_splits_name(photos: Path) -> None:
    root = photos / "train"
    (root / "temple").rename(root / "valid")
    assert kinds(check(root, holdout=0.2)) == {}
    assert kinds(check(photos / "val"))["no_split"] == ["train", "val"]


# The command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{}", "more"], "unrecognized arguments: more; vitlit data check --help"),
        (["--json", "report.json"], "ROOT"),
        (["{}", "--json"], "--json"),
        (["{}", "--jobs", "2"], "--jobs"),
        (["-x"], "ROOT"),
        (["{}", "--workers", "two"], "--workers: invalid int value: 'two'"),
        (["{}", "--holdout", "2"], "2 is not a share such as 10%"),
        (["{}", "--json", "{}/nowhere/report.json"], "nowhere is not a folder"),
        (["{}", "--json", "{}/train"], "train exists and is not empty: name another"),
        (["{0}", "--weights", "none", "--sheets", "{0}"], "exists and is not empty: name another"),
        (["{}/nowhere"], "nowhere cannot be listed"),
        (["{}/train/temple/0.jpg"], r"0\.jpg cannot be listed"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(clean: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        run([word.format(clean) for word in arguments])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["somewhere", "-h"]])
def test_help_lists_the_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(arguments)
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("--json", "--holdout", "--workers"))


def test_shards_are_refused(clean: Path, tmp_path: Path) -> None:
    write_shards([str(clean), str(tmp_path / "shards")])
    with pytest.raises(UserError, match="holds shards; check the folder that they were made of"):
        run([str(tmp_path / "shards")])


def test_a_process_that_dies_ends_the_check_in_one_line(clean: Path) -> None:
    with pytest.raises(UserError, match=r"a process died while it read images from .*flower/0\.jpg on") as caught:
        check(clean, look=lambda _: os._exit(9))
    assert "\n" not in str(caught.value)
