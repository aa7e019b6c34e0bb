"""Image folders: what is found in them, what is held out, and mistakes in their layout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import paint, user_error

from vitlit.data import ImageFolderData
from vitlit.data.folder import brief, parse_share, scan_photos, scan_split, scan_train
from vitlit.errors import UserError
from vitlit.images.decode import decode


def test_names_are_found_as_they_are_and_hidden_files_are_not(tmp_path: Path) -> None:
    wanted = ["a b.png", "été/größe 日本.JPG", "deep/er/x.jpeg", "y.TiFF", "z.webp"]
    paint(*(tmp_path / "train" / "Ünï code" / name for name in wanted))
    paint(tmp_path / "train" / "plain" / "1.png")
    paint(tmp_path / "train" / "plain" / "._1.png", tmp_path / "train" / ".cache" / "2.png")
    (tmp_path / "train" / "plain" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "list.csv").write_text("no class")
    classes, index, held = scan_train(tmp_path)
    assert classes == ["plain", "Ünï code"]
    assert held is None
    found = {str(Path(index.path(i)).relative_to(tmp_path / "train")) for i in range(len(index))}
    assert found == {"plain/1.png", *(f"Ünï code/{name}" for name in wanted)}
    assert all(decode(index.path(i)).shape == (3, 8, 8) for i in range(len(index)))
    assert [str(Path(index.path(i)).relative_to(tmp_path / "train")).split("/")[0] for i in range(len(index))] == [
        classes[label] for label in index.labels
    ]


def test_hidden_folders_within_a_class_are_left_alone(tmp_path: Path) -> None:
    paint(tmp_path / "train" / "a" / "1.png", tmp_path / "train" / "a" / ".thumbnails" / "1.png")
    _, index, _ = scan_train(tmp_path)
    assert len(index) == 1


def test_classes_may_be_links_to_folders_and_images_links_to_files(tmp_path: Path) -> None:
    paint(tmp_path / "store" / "cats" / "1.png", tmp_path / "store" / "cats" / "2.png", tmp_path / "store" / "dog.png")
    (tmp_path / "train" / "dog").mkdir(parents=True)
    (tmp_path / "train" / "cat").symlink_to(tmp_path / "store" / "cats")
    (tmp_path / "train" / "dog" / "1.png").symlink_to(tmp_path / "store" / "dog.png")
    classes, index, _ = scan_train(tmp_path)
    assert classes == ["cat", "dog"]
    assert index.labels.tolist() == [0, 0, 1]
    assert all(decode(index.path(i)).shape == (3, 8, 8) for i in range(3))


def test_of_links_to_one_folder_the_first_by_name_counts(tmp_path: Path) -> None:
    paint(tmp_path / "store" / "1.png")
    (tmp_path / "train" / "a").mkdir(parents=True)
    for number in (3, 7, 1, 5, 9, 2, 0, 8, 4, 6):
        (tmp_path / "train" / "a" / f"link{number}").symlink_to(tmp_path / "store")
    assert scan_train(tmp_path)[1].names() == [b"a/link0/1.png"]


def test_links_in_a_circle_neither_hang_nor_count_an_image_twice(tmp_path: Path) -> None:
    train, store = tmp_path / "train", tmp_path / "store"
    paint(train / "a" / "1.png", train / "a" / "deep" / "2.png", train / "b" / "3.png", store / "x" / "4.png")
    paint(store / "5.png")
    (train / "a" / "self").symlink_to(".")
    (train / "a" / "up").symlink_to("..")  # which has class b, too
    (train / "a" / "deep" / "top").symlink_to(tmp_path)
    (train / "a" / "slash").symlink_to("/")
    (train / "b" / "store").symlink_to(store / "x")
    (store / "x" / "back").symlink_to(train)
    (store / "x" / "up").symlink_to("..")
    (train / "b" / "loop").symlink_to("loop")
    (train / "loop").symlink_to("loop")
    classes, index, _ = scan_train(tmp_path)
    assert (classes, index.labels.tolist()) == (["a", "b"], [0, 0, 1, 1])
    assert index.names() == [b"a/1.png", b"a/deep/2.png", b"b/3.png", b"b/store/4.png"]
    photos = scan_photos([train])
    assert photos.names() == [bytes(train) + b"/" + name for name in index.names()]
    (train / "all").symlink_to(".")
    with pytest.raises(UserError, match=r"class folder .*/all holds no image"):
        scan_train(tmp_path)


def test_mistakes_in_the_layout_are_named_with_the_remedy(tmp_path: Path) -> None:
    user_error("is not a folder; give --data.root", scan_train, tmp_path / "nowhere")
    (tmp_path / "flat" / "train").mkdir(parents=True)
    user_error("train holds no class folders; images belong in", scan_train, tmp_path / "flat")
    paint(tmp_path / "root" / "a" / "1.png")
    user_error(r"has no folder train; .*--data\.holdout 10%", scan_train, tmp_path / "root")
    paint(tmp_path / "hole" / "train" / "a" / "1.png")
    (tmp_path / "hole" / "train" / "b").mkdir()
    user_error("class folder .*/b holds no image", scan_train, tmp_path / "hole")
    paint(tmp_path / "strange" / "val" / "z" / "1.png")
    user_error("has the class 'z', which the training", scan_split, tmp_path / "strange" / "val", ["a", "b"])
    paint(tmp_path / "case" / "val" / "cat" / "1.png")
    user_error("lack; they have 'Cat': rename one", scan_split, tmp_path / "case" / "val", ["Cat", "dog"])
    paint(tmp_path / "mac" / "val" / "cafe\u0301" / "1.png")  # as macOS writes it
    told = r"has the class 'cafe\\u0301', .* they have 'caf\\xe9'"
    user_error(told, scan_split, tmp_path / "mac" / "val", ["caf\xe9", "dog"])
    paint(tmp_path / "loose" / "val" / "1.png")
    user_error("holds images but no class folders", scan_split, tmp_path / "loose" / "val", ["a", "b"])
    (tmp_path / "empty" / "val" / "a").mkdir(parents=True)
    user_error("holds no image", scan_split, tmp_path / "empty" / "val", ["a"])
    user_error("does not exist; give images or folders", scan_photos, [tmp_path / "nowhere"])
    user_error("no image under", scan_photos, [tmp_path / "empty"])


def test_what_is_not_read_is_told_once_by_ending(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = tmp_path / "train"
    paint(train / "a" / "1.jfif", train / "a" / "2.AVIF", train / "b" / "deep" / "3.png", train / "loose.png")
    for name in ("a/1.heic", "a/2.HEIC", "b/deep/3.heic", "b/notes", "c.zip", "a/.hidden"):
        (train / name).touch()
    (train / "d").symlink_to("/nowhere")
    (train / "b" / "e").symlink_to("e")
    data = ImageFolderData(str(tmp_path), holdout=0.3, batch_size=1)
    assert (len(data.split("train")), len(data.split("val"))) == (2, 1)
    kinds = ".heic 3, dead links 2, without an ending 1, .zip 1, images outside of class folders 1"
    told = sorted(kinds.split(", "))
    [line] = capsys.readouterr().out.splitlines()
    start, _, listed = line.partition(": not read: ")
    listed, _, remedy = listed.partition("; ")
    assert (start, sorted(listed.split(", ")), remedy) == (str(train), told, "`vitlit data check` names them")
    assert sorted(scan_photos([train]).names())[0].endswith(b"a/1.jfif")
    assert capsys.readouterr().out.startswith(f"{train}: not read: .heic 3, ")


def test_a_class_of_files_that_are_not_read_is_told_so(tmp_path: Path) -> None:
    paint(tmp_path / "train" / "a" / "1.png")
    (tmp_path / "train" / "b").mkdir()
    for number in range(12):
        (tmp_path / "train" / "b" / f"{number}.heic").touch()
    user_error(r"class folder .*/b holds no image that is read, only \.heic 12 \(known: \.jpg ", scan_train, tmp_path)
    user_error(r"no image under .*/b, only \.heic 12", scan_photos, [tmp_path / "train" / "b"])


@pytest.mark.parametrize(("split", "spelling"), [("val", "valid"), ("val", "Validation"), ("train", "training")])
def test_a_split_in_another_spelling_is_named(tmp_path: Path, split: str, spelling: str) -> None:
    for name in {"train", "val"} - {split} | {spelling}:
        paint(tmp_path / name / "a" / "1.png")
    data = ImageFolderData(str(tmp_path), batch_size=1)
    user_error(f"has no folder {split}, but {spelling}: rename it to {split}", data.split, split)


def test_photos_are_files_or_folders_searched_to_their_depth(tmp_path: Path) -> None:
    paint(tmp_path / "x" / "2.png", tmp_path / "x" / "y" / "1.png", tmp_path / "lone.png")
    index = scan_photos([tmp_path / "lone.png", tmp_path / "x"])
    assert [index.path(i) for i in range(3)] == [str(tmp_path / n) for n in ("lone.png", "x/2.png", "x/y/1.png")]
    assert index.labels.tolist() == [-1, -1, -1]


def test_the_holdout_is_stratified_disjoint_complete_and_always_the_same(tree: Path) -> None:
    classes, train, held = scan_train(tree, 0.2)
    assert held is not None
    assert classes == ["a", "b", "c", "d", "e"]
    assert np.bincount(held.labels, minlength=5).tolist() == [4, 2, 1, 1, 0]  # the last image of a class stays
    assert np.bincount(train.labels, minlength=5).tolist() == [16, 8, 4, 1, 1]
    paths = [Path(index.path(i)) for index in (train, held) for i in range(len(index))]
    assert sorted(paths) == sorted(tree.rglob("*.png"))
    for seed in (0, 1):
        data = ImageFolderData(str(tree), holdout="20%", batch_size=2, seed=seed)
        assert data.split("val").rows.tolist() == held.rows.tolist()
        assert data.split("train").rows.tolist() == train.rows.tolist()
    names = [Path(held.path(i)).name for i in range(4)]
    assert names != ["00.png", "01.png", "02.png", "03.png"]  # drawn, not the first
    assert names != ["16.png", "17.png", "18.png", "19.png"]


def test_a_holdout_leaves_the_val_folder_alone(few: Path) -> None:
    data = ImageFolderData(str(few), holdout=0.1)
    assert len(data.split("val")) == 4
    assert len(data.split("train")) == 36
    assert all("train" in str(data.split("val").path(i)) for i in range(4))


@pytest.mark.parametrize(("text", "share"), [("10%", 0.1), ("0.1", 0.1), (0.1, 0.1), (" 12.5% ", 0.125), (0, 0.0)])
def test_a_share_is_read_in_each_of_its_forms(text: float | str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["10 percent", "", "100%", "1", 10, "-1%", "nan", "inf", "1e3%"])
def test_what_is_no_share_is_refused(text: float | str) -> None:
    with pytest.raises(UserError, match="is not a share"):
        parse_share(text)


def test_class_names_are_listed_in_brief() -> None:
    assert brief(["a", "b"]) == "a, b (2)"
    assert brief(list("abcdefg")) == "a, b, c, d, ... (7)"


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_holdout_leaves_an_image_of_every_class(share: float, few: Path) -> None:
    classes, index, held = scan_train(few, share)
    assert held is not None
    assert set(index.labels) == set(held.labels) == set(range(len(classes)))


def test_links_in_a_circle_end_below_photos_too(
    vitlit: Callable[..., Any], few: Path, trained: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    (photos / "a").mkdir(parents=True)
    (photos / "a" / "1.png").write_bytes(next(few.rglob("*.png")).read_bytes())
    for name, target in (("self", "."), ("a/up", ".."), ("a/there", "../a"), ("loop", "loop"), ("a/top", photos)):
        (photos / name).symlink_to(target)
    assert [Path(scan_photos([photos]).path(i)).name for i in range(len(scan_photos([photos])))] == ["1.png"]
    done = vitlit("predict", trained / "runs" / "pretrain", photos, "--out", "out.csv")
    assert done.code == 0, done.err
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 2
    for arguments in (("predict", trained / "runs" / "pretrain", photos / "loop"), ("data", "check", photos / "loop")):
        result = vitlit(*arguments)
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
