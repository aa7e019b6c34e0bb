"""Which outputs of a head are a folder's classes, and ReaL labels by the published rule, on made-up files."""

import json
from pathlib import Path

import pytest
from conftest import user_error

from vitlit.evaluation.variants import outputs, read_real

NAMES = ["ant", "bee", "cat", "3", "emu"]


def test_folders_are_found_by_name_and_without_names_by_order() -> None:
    assert outputs(["bee", "emu"], NAMES, 5) == [1, 4]
    assert outputs(sorted(NAMES), NAMES, 5) == [3, 0, 1, 2, 4]
    assert outputs(["x", "y"], [], 2) == [0, 1]
    user_error("'dog'.*of the head's 5.*--classes", outputs, ["bee", "dog"], NAMES, 5)
    user_error("'x'.*--classes", outputs, ["x", "y"], [], 3)


def test_a_file_says_which_class_a_folder_is(tmp_path: Path) -> None:
    file = tmp_path / "classes.csv"
    file.write_text("folder,class\nn01,bee\n0,emu\nodd, 3\n7,0\n")
    assert outputs(["0", "7", "n01"], NAMES, 5, file) == [4, 0, 1]
    assert outputs(["odd"], NAMES, 5, file) == [3]  # a name goes before a number, of which this is another
    assert outputs(["7", "odd"], [], 1000, file) == [0, 3]
    user_error("'n02'.*classes.csv", outputs, ["7", "n02"], NAMES, 5, file)
    file.write_text("a,bee\nb,1\nc,5\n")
    user_error("'a'.*gives it bee; give it one of its own", outputs, ["a", "b"], NAMES, 5, file)
    user_error("'c'.*classes.csv gives it 5; give .* from 0 to 4", outputs, ["a", "c"], NAMES, 5, file)
    user_error("'d'.*classes.csv gives it nothing", outputs, ["a", "d"], NAMES, 5, file)
    for text in ("a\n", "a,b,c\n"):
        file.write_text(text)
        user_error("rows folder,class", outputs, ["a"], NAMES, 5, file)
    user_error("missing.csv", outputs, ["a"], NAMES, 5, tmp_path / "missing.csv")


def test_real_labels_go_by_the_number_in_the_name(tmp_path: Path) -> None:
    file, folders = tmp_path / "real.json", ["n00000001", "n00000002", "n00000003"]
    labels = [[0], [], [2, 1]]
    file.write_text(json.dumps(labels))
    path = "val/n00000001/ILSVRC2012_val_{:08d}.JPEG"
    assert read_real(file, [path.format(3), path.format(1), path.format(2)], folders) == [[2, 1], [0], []]
    for wrong in (path.format(4), path.format(0), "val/n00000001/cat.JPEG"):
        user_error("no labels of .*ILSVRC2012_val_00000001", read_real, file, [path.format(1), wrong], folders)
    user_error("its 3 classes.*there are 2", read_real, file, [path.format(1)], folders[:2])
    user_error("WordNet.*cat", read_real, file, [path.format(1)], ["cat", "dog", "emu"])


@pytest.mark.parametrize("text", ["{", "[1, 2]", "[]", '{"a": "b"}', '[["a"]]'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "real.json").write_text(text)
    user_error("real.json holds no ReaL labels", read_real, tmp_path / "real.json", [], ["n00000001"])
