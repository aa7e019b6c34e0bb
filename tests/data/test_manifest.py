"""Labels from a CSV file: what it says, and every mistake with its line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitlit.data.dataset import Images
from vitlit.data.folder import hold_out, scan_train
from vitlit.data.index import Index
from vitlit.data.manifest import read_manifest
from vitlit.data.splits import Splits
from vitlit.errors import UserError
from vitlit.images.preprocess import Preprocess


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Files 0.png to 9.png, and some of awkward names."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in (*map(str, range(10)), "a, b", "größe 日本", "sub/x", 'quo"te'):
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    return folder


def written(tmp_path: Path, text: str, encoding: str = "utf-8") -> Path:
    file = tmp_path / "labels.csv"
    file.write_bytes(text.encode(encoding))
    return file


def test_single_labels_and_splits_in_the_files_order(root: Path, tmp_path: Path) -> None:
    text = "split,comment,label,path\ntrain,,dog,3.png\nval,x,cat,0.png\ntrain,,cat,1.png\ntrain,,Ape,sub/x.png\n"
    classes, splits, multi_label = read_manifest(written(tmp_path, text), root)
    assert (classes, multi_label) == (["Ape", "cat", "dog"], False)
    assert list(splits) == ["train", "val"]
    train, val = splits["train"], splits["val"]
    assert [train.path(i) for i in range(3)] == [str(root / name) for name in ("3.png", "1.png", "sub/x.png")]
    assert train.labels.dtype == np.int64
    assert train.labels.tolist() == [2, 1, 0]
    assert [val.path(0), val.labels.tolist()] == [str(root / "0.png"), [1]]


def test_without_splits_all_is_train(root: Path, tmp_path: Path) -> None:
    splits = read_manifest(written(tmp_path, "path,label\n1.png,a\n2.png,b\n"), root).splits
    assert list(splits) == ["train"]
    assert len(splits["train"]) == 2


def test_several_labels_in_any_row_make_all_rows_multi_label(root: Path, tmp_path: Path) -> None:
    text = "path,label,split\n1.png,b|a,train\n2.png,,train\n3.png, c ,train\n4.png,c,val\n5.png,,test\n"
    classes, splits, multi_label = read_manifest(written(tmp_path, text), root)
    assert (classes, multi_label) == (["a", "b", "c"], True)
    assert splits["train"].labels.dtype == bool
    assert splits["train"].labels.tolist() == [[True, True, False], [False] * 3, [False, False, True]]
    assert splits["val"].labels.tolist() == [[False, False, True]]
    assert splits["test"].labels.tolist() == [[False] * 3]
    dataset = Images(splits["train"], Preprocess((8, 8)).crop)
    _, label, index = dataset[0]
    assert (label.dtype, label.tolist(), index) == (torch.float32, [1.0, 1.0, 0.0], 0)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_names_are_read_as_any_program_writes_them(root: Path, tmp_path: Path, encoding: str, newline: str) -> None:
    absolute = root / "sub" / "x.png"
    rows = ("path,label", '"a, b.png",x', "größe 日本.png,Käse", '"quo""te.png",x', "", f"{absolute},x", "./1.png,x")
    classes, splits, _ = read_manifest(written(tmp_path, newline.join(rows), encoding), root)
    train = splits["train"]
    assert classes == ["Käse", "x"]
    names = ("a, b.png", "größe 日本.png", 'quo"te.png', "sub/x.png", "1.png")
    assert [train.path(i) for i in range(5)] == [str(root / name) for name in names]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", " has no column 'path', only an empty line; the header must be path,label"),
        ("path,label\n", " has a header but no rows"),
        ("file,label\n1.png,a\n", " has no column 'path', only 'file', 'label'; the header must be path,label"),
        ("x" * 10**6 + "\n", ", line 1: not valid CSV (field larger than field limit"),
        ("x," * 10**5 + "label\n", " has no column 'path', only " + ", ".join(8 * ["'x'"]) + "; the header"),
        (
            "path;label\n1.png;a\n",
            " has no column 'path', only 'path;label'; the header must be path,label[,split][,group], with commas",
        ),
        ("path,lable\n1.png,a\n", " has no column 'label', only 'path', 'lable'"),
        ("path,label,Split\n1.png,a,val\n", ": the column 'Split' must be 'split', once"),
        ("path, label\n1.png,a\n", ": the column ' label' must be 'label', once"),
        ("path,label,label\n1.png,a,b\n", ": the column 'label' must be 'label', once"),
        (
            "path,label\n1.png,a\na, b.png,a\n",
            ", line 3: not 2 fields; quote commas",
        ),
        ("path,label\n1.png\n", ", line 2: not 2 fields"),
        ('path,label\n1.png,a\n"2.png,a\n', ", line 3: not valid CSV"),
        ("path,label\n1.png,a\n,a\n", ", line 3: there is no file "),
        ("path,label\n1.png,a\n2.png, \n", ", line 3: the label of 2.png is empty"),
        ("path,label\n1.png,a|\n", ", line 2: the label 'a|' has an empty name"),
        ("path,label,split\n1.png,a,training\n", ", line 2: the split 'training' is none of train, val, test"),
        ("path,label,split\n1.png,a,\n", ", line 2: the split '' is none of"),
        ("path,label,split\n1.png,a,val\n", " has no row of split train"),
        ("path,label\n1.png,a\n2.png,a\nsub/../1.png,b\n", ", line 4: 1.png is in line 2, too; remove one"),
        ("path,label,split\n1.png,a,train\n1.png,a,val\n", ", line 3: 1.png is in line 2, too"),
        ("path,label,split\n1.png,a,train\n2.png,b,val\n", ", line 3: val has the class 'b', which the training"),
        ("path,label,split\n1.png,a,train\n2.png,a|b,test\n", ", line 3: test has the class 'b', which"),
        (
            "path,label\n1.png,a\nsub,a\n",
            ", line 3: there is no file {root}/sub (1 of 2 rows have none); paths are relative",
        ),
        (
            "path,label\nno.png,a\n1.png,a\nnone.png,a\n",
            ", line 2: there is no file {root}/no.png (2 of 3 rows have none); ",
        ),
    ],
)
def test_a_mistake_is_named_with_its_line(root: Path, tmp_path: Path, text: str, message: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(UserError) as caught:
        read_manifest(file, root)
    assert str(caught.value).startswith(f"{file}{message.format(root=root)}")
    assert "\n" not in str(caught.value)


def test_a_path_given_twice_is_seen_also_when_one_is_absolute(root: Path, tmp_path: Path) -> None:
    file = written(tmp_path, f"path,label\n1.png,a\n{root / '1.png'},b\n")
    with pytest.raises(UserError, match=r"line 3: .*1\.png is in line 2, too"):
        read_manifest(file, root)


def test_what_cannot_be_read_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read data\.manifest .*nowhere\.csv: No such file"):
        read_manifest(tmp_path / "nowhere.csv", root)
    with pytest.raises(UserError, match=r"cannot read data\.manifest .*images: Is a directory"):
        read_manifest(root, root)
    with pytest.raises(UserError, match=r"labels\.csv is not UTF-8"):
        read_manifest(written(tmp_path, "path,label\nKäse.png,a\n", "latin-1"), root)


# Holding out


def test_a_manifest_of_a_folder_holds_out_what_the_folder_does(few: Path, tmp_path: Path) -> None:
    classes, train, held = scan_train(few, 0.2)
    _, index, _ = scan_train(few)
    rows = [f"{path.decode()},{classes[label]}" for path, label in zip(index.names(), index.labels, strict=True)]
    found = read_manifest(written(tmp_path, "\n".join(["path,label", *reversed(rows)])), few / "train")
    assert found.classes == classes
    parts = hold_out(found.splits["train"], 0.2, classes)
    for part, expected in zip(parts, (train, held), strict=True):
        assert expected is not None
        assert dict(zip(part.names(), part.labels.tolist(), strict=True)) == dict(
            zip(expected.names(), expected.labels.tolist(), strict=True)
        )


@pytest.mark.parametrize(("count", "share", "held"), [(100, 0.1, 10), (7, 0.5, 4), (10, 0.01, 1), (1, 0.5, 0)])
def test_images_of_several_classes_are_held_out_by_their_paths(count: int, share: float, held: int) -> None:
    paths = [f"{i}.png".encode() for i in range(count)]
    index = Index.of(Path(), paths, np.random.default_rng(0).random((count, 3)) < 0.5)
    rest, part = hold_out(index, share, ["a", "b", "c"])
    assert (len(rest), len(part)) == (count - held, held)
    assert sorted([*rest.names(), *part.names()]) == sorted(paths)
    labels = dict(zip(paths, index.labels.tolist(), strict=True))
    assert all(labels[path] == label.tolist() for path, label in zip(part.names(), part.labels, strict=True))
    assert held < 2 or set(part.names()) != set(paths[:held])  # drawn, not the first
    other = Index.of(Path(), paths[::-1], index.labels[::-1])
    assert set(hold_out(other, share, ["a", "b", "c"])[1].names()) == set(part.names())


# Groups


def grouped(root: Path, rows: list[tuple[str, str, str]]) -> Path:
    """A manifest of (path, label, group); the images are made."""
    (root / "images").mkdir(exist_ok=True)
    for path, _, _ in rows:
        (root / "images" / path).touch()
    lines = ["path,label,group", *(",".join(row) for row in rows)]
    return written(root, "\n".join(lines))


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_group_is_held_out_whole_or_not_at_all(tmp_path: Path, share: float) -> None:
    draw = np.random.default_rng(0)
    rows = [(f"{i}.png", "abc"[i % 3], f"patient {draw.integers(60)}") for i in range(600)]
    rows += [(f"lone{i}.png", "a", "") for i in range(20)]
    group = {path: patient or path for path, _, patient in rows}
    found = read_manifest(grouped(tmp_path, rows), tmp_path / "images")
    rest, held = hold_out(found.splits["train"], share, found.classes)
    sides = [{group[name.decode()] for name in part.names()} for part in (rest, held)]
    assert not sides[0] & sides[1]
    assert len(rest) + len(held) == 620
    counts = np.bincount(found.splits["train"].labels)
    assert np.abs(np.bincount(held.labels, minlength=3) / counts - share).max() < 0.05
    again = read_manifest(grouped(tmp_path, rows[::-1]), tmp_path / "images")
    assert sorted(hold_out(again.splits["train"], share, again.classes)[1].names()) == sorted(held.names())


def test_groups_of_one_split_are_made_for_all(root: Path, tmp_path: Path) -> None:
    file = written(tmp_path, "path,label,split,group\n1.png,a,train,p\n2.png,a,train,p\n3.png,a,val,\n")
    groups = [index.groups for index in read_manifest(file, root).splits.values()]
    assert [len(np.unique(each)) for each in groups if each is not None] == [1, 1]


def test_groups_that_leave_nothing_to_hold_out_are_refused(tmp_path: Path) -> None:
    rows = [(f"{i}.png", "ab"[i % 2], "all") for i in range(20)]
    found = read_manifest(grouped(tmp_path, rows), tmp_path / "images")
    with pytest.raises(UserError, match=r"holdout 0.1: every group .* or all of one; hold out more"):
        hold_out(found.splits["train"], 0.1, found.classes)


def test_a_group_on_two_sides_is_refused_with_both_lines(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in "12":
        (tmp_path / "images" / f"{name}.png").touch()
    file = written(tmp_path, "path,label,split,group\n1.png,a,train,p\n2.png,a,val,p\n")
    with pytest.raises(UserError, match=r"line 3: the group 'p' is in val, and in train by line 2; keep it in one"):
        read_manifest(file, tmp_path / "images")


def test_fractions_are_numbers_and_integers_are_what_is_said(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, "path,label,split\n1.png,3,train\n2.png,-.5,train\n3.png,1e2,train\n4.png,77.25,val\n")
    classes, splits, multi_label = read_manifest(file, root)
    assert (classes, multi_label) == ([], False)
    assert splits["train"].labels.tolist() == [3.0, -0.5, 100.0]
    assert splits["val"].labels.tolist() == [77.25]
    _, label, index = Images(splits["train"], Preprocess((8, 8)).crop)[1]
    assert (label.dtype, label.item(), index) == (torch.float32, -0.5, 1)

    file = written(tmp_path, "path,label\n1.png,3\n2.png,10\n3.png,3\n")
    assert read_manifest(file, root).classes == ["10", "3"]
    assert read_manifest(file, root, "numbers").splits["train"].labels.tolist() == [3.0, 10.0, 3.0]
    assert Splits(str(root), 0.0, str(file)).numbers is False
    said = f"{file}: its integers are 2 classes; --data.labels numbers, with the objective"
    assert capsys.readouterr().out.startswith(said)
    assert Splits(str(root), 0.0, str(file), "numbers").numbers is True
    assert Splits(str(root), 0.0, str(file), "classes").numbers is False
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("rows", "kind", "words"),
    [
        (
            "1.png,3,train\n2.png,high,train",
            "numbers",
            r"line 3: the label 'high' of 2\.png is not a number such as 3\.5",
        ),
        ("1.png,3,train\n2.png,nan,train", "numbers", r"line 3: the label 'nan' of 2\.png is not a number"),
        ("1.png,3|4,train", "numbers", r"line 2: the label '3\|4' of 1\.png is not a number"),
        ("1.png,3.5,train\n2.png,,train", None, r"line 3: the label of 2\.png is empty"),
        ("1.png,3.5,train\n2.png,4,train\n3.png,n/a,train", None, r"line 4: the label 'n/a' of 3\.png is not a number"),
        ("1.png,3,train\n2.png,4,val", None, r"val has the class '4', which .* lack; --data\.labels numbers, with the"),
    ],
)
def test_what_is_no_number_is_said(rows: str, kind: str | None, words: str, root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        read_manifest(written(tmp_path, f"path,label,split\n{rows}\n"), root, kind)


def test_labels_of_what_is_no_manifest_are_refused(root: Path) -> None:
    with pytest.raises(UserError, match=r"there is no data\.manifest; leave it out"):
        Splits(str(root), 0.0, None, "numbers")
