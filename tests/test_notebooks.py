"""The notebooks run from top to bottom, and come to what they say."""

from pathlib import Path

import nbclient
import nbformat
import pytest
from conftest import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


LONG = ("03_positions", "04_masked_images", "05_finetune_your_folder")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.long] if path.stem in LONG else [], id=path.stem) for path in NOTEBOOKS],
)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    """The first with a ViT of half the depth, which suffices; others show less after a quarter of their epochs."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("depth=4", "depth=2").replace("epochs=12", "epochs=3")
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(
        str(output.get("text", "")) for cell in notebook.cells for output in cell.get("outputs", []) if cell.source
    )
    assert float(printed.rsplit("top-1 ", 1)[1].split(" %")[0]) > (90 if path.stem.startswith("01") else 40)
