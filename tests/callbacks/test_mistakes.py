"""The mistakes of the last validation."""

from pathlib import Path

from conftest import paint
from PIL import Image
from small_stage import fit, pretrain

from vitlit.callbacks import Mistakes


def test_a_class_of_several_lines_has_a_picture(tmp_path: Path) -> None:
    for split in ("train", "val"):
        paint(*(tmp_path / split / name / f"{i}.png" for name in ("two\nlines", "b") for i in range(4)))
    fit(pretrain(num_classes=2), tmp_path, callbacks=[Mistakes()], default_root_dir=tmp_path)
    assert Image.open(tmp_path / "mistakes.png").width > 0
