"""An installed wheel works without the repository, and an sdist is one whose tests run."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import yaml
from conftest import REPOSITORY

import vitlit


def test_the_wheel_holds_the_configs_and_the_command_and_the_sdist_all(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"vitlit-{vitlit.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        points = archive.read(f"vitlit-{vitlit.__version__}.dist-info/entry_points.txt").decode()
    configs = {
        f"vitlit/configs/{path.relative_to(REPOSITORY / 'configs')}" for path in (REPOSITORY / "configs").rglob("*.*")
    }
    assert configs | {"vitlit/py.typed", "vitlit/inspection/report.html"} <= held
    assert not any(name.startswith(("tests/", "runs/", "data/")) for name in held)
    assert "vitlit = vitlit.cli.main:main" in points
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    beside = {
        "Makefile",
        "constraints.txt",
        ".github/workflows/ci.yml",
        "benchmarks/runs.py",
        "notebooks/03_positions.ipynb",
    }
    assert beside | {"tests/conftest.py", "docs/start.md", "configs/pretrain.yaml"} <= held
    assert not any(name.startswith((".git/", "runs/", "data/", ".venv/")) for name in held)


def test_what_describes_the_project_agrees() -> None:
    project: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == project["version"] == vitlit.__version__
    newest = re.search(r"^## (.+) - (.+)$", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest.groups() == (project["version"], str(citation["date-released"]))
    assert citation["license"] == project["license"]
    jobs = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())["jobs"]
    pythons = jobs["test"]["strategy"]["matrix"]["python"]
    assert pythons[0] == project["requires-python"].removeprefix(">=")
    assert {f"Programming Language :: Python :: {python}" for python in pythons} <= set(project["classifiers"])
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert ".ci/run" in commands
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert {word for line in commands for word in re.findall(r"\bmake ([a-z-]+)", line)} <= targets
    (imports,) = (line for line in commands if "import vitlit" in line)
    subprocess.run([sys.executable, "-c", imports.split('"')[1]], check=True)
