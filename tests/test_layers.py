"""The package's layers: which module may import which, held by reading the source."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vitlit

PACKAGE = Path(vitlit.__file__).parent
SOURCES = {str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}

# What a part of the package may import of the others; a part that is not named here composes them and is free.
MAY_IMPORT = {
    "errors": (),
    "model": ("errors",),
    "objectives": ("model", "weights", "errors"),
    "optim": ("errors",),
    "config": ("errors",),
    "data": ("config", "errors"),
    "weights": ("model", "errors", "data.transforms"),
    "stages": ("model", "objectives", "optim", "weights", "data.stream", "errors"),
    "evaluation": ("errors",),
    "loggers": ("errors", "wandb_mode"),
    "wandb_mode": ("errors",),
    "callbacks": ("loggers", "data", "optim", "errors"),
    "checkpoints": ("errors",),
    "interrupt": ("checkpoints", "data.workers"),
    "lock": ("errors",),
}
# And of other packages, beside Python's own library.
TORCH_ONLY = ("model", "objectives", "optim")
WITHOUT_LIGHTNING = ("weights", "evaluation")
VAGUE = ("utils", "util", "common", "misc", "helpers", "helper")
LONGEST = 350


def imports(source: str) -> Iterator[str]:
    """The dotted names that a source imports, at any depth, also through import_module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def within(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def violations(file: str, source: str) -> list[str]:
    """What is wrong with a file of the package, in words."""
    part = Path(file).parts[0].removesuffix(".py")
    found = []
    for name in imports(source):
        root = name.split(".")[0]
        if not root:
            found.append(f"{file} imports {name} relatively")
        elif root == "vitlit":
            rest = name.removeprefix("vitlit").removeprefix(".")
            if part in MAY_IMPORT and not within(rest, (part, *MAY_IMPORT[part])):
                found.append(f"{file} imports {name}")
        elif root not in sys.stdlib_module_names:
            forbidden = (
                part == "errors"
                or (part in TORCH_ONLY and root != "torch")
                or (part in WITHOUT_LIGHTNING and root == "lightning")
                or (root == "wandb" and file not in ("loggers.py", "wandb_mode.py"))
            )
            if forbidden:
                found.append(f"{file} imports {name}")
    if any(piece.removesuffix(".py") in VAGUE for piece in Path(file).parts):
        found.append(f"{file} has a name that says nothing")
    lines = source.count("\n")
    if lines > LONGEST:
        found.append(f"{file} has {lines} lines")
    return found


@pytest.mark.parametrize("file", SOURCES)
def test_imports_run_one_way(file: str) -> None:
    assert violations(file, SOURCES[file]) == []


def test_the_table_names_what_is_there() -> None:
    parts = {Path(file).parts[0].removesuffix(".py") for file in SOURCES}
    assert parts >= set(MAY_IMPORT) - {"evaluation"}
    assert len(SOURCES) > 20


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("model/vit.py", "import numpy as np"),
        ("model/vit.py", "from vitlit.optim import Schedule"),
        ("model/vit.py", "from vitlit import optim"),
        ("model/vit.py", "import vitlit"),
        ("model/vit.py", "def f():\n    from vitlit.stages import Stage"),
        ("model/vit.py", "from ..optim import Schedule"),
        ("model/vit.py", "import importlib\nimportlib.import_module('vitlit.data')"),
        ("objectives/mae.py", "from vitlit.stages import Stage"),
        ("objectives/mae.py", "import lightning"),
        ("optim.py", "from vitlit.model import ViT"),
        ("errors.py", "import torch"),
        ("data/folder.py", "from vitlit.model import ViT"),
        ("data/folder.py", "from vitlit.loggers import CSV"),
        ("weights/timm.py", "from vitlit.data.module import ImageFolderData"),
        ("weights/timm.py", "from vitlit.data import ImageFolderData"),
        ("weights/timm.py", "from vitlit.stages import Stage"),
        ("weights/timm.py", "from lightning.pytorch import LightningModule"),
        ("stages/stage.py", "from vitlit.data.module import ImageFolderData"),
        ("stages/stage.py", "from vitlit.data import streams"),
        ("stages/stage.py", "from vitlit.callbacks import Bar"),
        ("loggers.py", "from vitlit.callbacks import Bar"),
        ("callbacks.py", "from vitlit.stages import Stage"),
        ("callbacks.py", "import wandb"),
        ("cli.py", "def f():\n    import wandb.sdk"),
        ("data/utils.py", ""),
        ("common/names.py", ""),
        ("model/vit.py", "\n" * 351),
    ],
)
def test_the_check_sees_what_is_forbidden(file: str, source: str) -> None:
    assert len(violations(file, source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("model/vit.py", "import math\nfrom torch import nn\nfrom vitlit.model.heads import tanh_head"),
        ("model/vit.py", "from vitlit.errors import UserError\n" + "\n" * 300),
        ("stages/stage.py", "from vitlit.data import stream\nfrom vitlit.data.stream import seed_step"),
        ("weights/timm.py", "from vitlit.data.transforms import Preprocess\nimport numpy"),
        ("loggers.py", "import wandb"),
        ("fit.py", "from vitlit.stages import Stage\nfrom vitlit.callbacks import Bar"),
    ],
)
def test_the_check_lets_pass_what_is_allowed(file: str, source: str) -> None:
    assert violations(file, source) == []
