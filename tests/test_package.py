"""An installed wheel works without the repository."""

import subprocess
import sys
import zipfile
from pathlib import Path

from conftest import REPOSITORY

import vitlit


def test_the_wheel_holds_the_configs_and_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"vitlit-{vitlit.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        points = archive.read(f"vitlit-{vitlit.__version__}.dist-info/entry_points.txt").decode()
    configs = {
        f"vitlit/configs/{path.relative_to(REPOSITORY / 'configs')}" for path in (REPOSITORY / "configs").rglob("*.*")
    }
    assert configs <= held
    assert not any(name.startswith(("tests/", "runs/", "data/")) for name in held)
    assert "vitlit = vitlit.cli.main:main" in points
