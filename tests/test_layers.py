"""The package's structure, held by reading its source: which module may import which, and how long things may be."""

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import vitlit

PACKAGE = Path(vitlit.__file__).parent
SOURCES = {str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}

# A part of the package imports parts of the rows above its own, and never the other way round.
ROWS = (
    ("errors", "seeds", "files"),
    ("model", "images", "optim", "evaluation", "loggers"),
    ("objectives", "weights", "data", "run", "inspection"),
    ("stages", "prepare", "export", "benchmark"),
    ("callbacks", "doctor"),
    ("cli",),
)
ROW = {part: number for number, row in enumerate(ROWS) for part in row}
BESIDE = {  # imports within a row
    ("files", "errors"),
    ("run", "data"),  # the signals that stop a run, which data workers ignore
    ("data", "objectives"),  # a loader makes the batches that an objective takes
}
LIGHT = ("objectives", "model", "optim")  # load, by whatever path, torch and numpy alone
WITHOUT_LIGHTNING = ("images", "weights", "evaluation")
VAGUE = ("utils", "util", "common", "misc", "helpers", "helper")
CORE = ("model", "objectives", "optim", "stages")
LOOSE, LONGEST_FILE, LONGEST_FUNCTION, LARGEST_CORE, LARGEST = 7, 350, 60, 3300, 17_250


def imports(source: str) -> Iterator[tuple[str, ...]]:
    """Of each import at any depth the modules that it may load, also through import_module; not for types alone."""
    tree = ast.parse(source)
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name,) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((module, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield (str(node.args[0].value),)


def module_of(file: str) -> str:
    """model/vit.py -> vitlit.model.vit"""
    return ".".join(("vitlit", *Path(file).with_suffix("").parts)).removesuffix(".__init__")


def part_of(module: str) -> str:
    """vitlit.model.vit -> model"""
    return (module + "..").split(".")[1]


def graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """The modules that each module imports: those of vitlit that there are, and the packages of others."""
    known = {module_of(file) for file in sources}
    found: dict[str, set[str]] = {}
    for file, source in sources.items():
        found[module_of(file)] = edges = set()
        for names in imports(source):
            inside = [name for name in names if name in known]
            root = names[0].split(".")[0]
            edges |= {inside[-1]} if inside else {root} if root != "vitlit" else set()
    return found


def reached(edges: Mapping[str, set[str]], start: str) -> set[str]:
    """All that a module loads: what it imports, what those import, and the packages around them."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        around = module.rpartition(".")[0]  # its __init__ runs, too; that of vitlit itself imports nothing
        todo += [*edges.get(module, ()), *([around] if "." in around else [])]
    return seen - {start}


def violations(file: str, source: str) -> list[str]:
    """What is wrong with a file of the package by itself, in words."""
    part = part_of(module_of(file))
    found = []
    for names in imports(source):
        name, root = names[-1], names[0].split(".")[0]
        if not root:
            found.append(f"{file} imports {name} relatively")
        elif root == "vitlit":
            other = part_of(name)
            beside = other == part or (part, other) in BESIDE or (not other and ROW.get(part, 99) >= ROW["callbacks"])
            if part in ROW and not beside and ROW.get(other, 99) >= ROW[part]:
                found.append(f"{file} imports {name}")
        elif root == "wandb" and part != "loggers":
            found.append(f"{file} imports {name}")
    if any(piece.removesuffix(".py") in VAGUE for piece in Path(file).parts):
        found.append(f"{file} has a name that says nothing")
    if (lines := source.count("\n")) > LONGEST_FILE:
        found.append(f"{file} has {lines} lines")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and (lines := (node.end_lineno or 0) - node.lineno + 1) > LONGEST_FUNCTION:
            found.append(f"{file}: {node.name} has {lines} lines")
    return found


def loads_what_it_may_not(sources: Mapping[str, str]) -> list[str]:
    """Modules that load a package which their part must do without, by whatever path."""
    edges = graph(sources)
    found = []
    for module in edges:
        outside = {name for name in reached(edges, module) if not name.startswith("vitlit")} - sys.stdlib_module_names
        part = part_of(module)
        allowed = {"torch", "numpy"}
        if part == "errors":
            wrong = outside
        elif part in LIGHT:
            wrong = outside - allowed
        else:
            wrong = outside & {"lightning"} if part in WITHOUT_LIGHTNING else set()
        found += [f"{module} loads {name}" for name in sorted(wrong)]
    return found


def circles(sources: Mapping[str, str]) -> list[str]:
    """Modules that import themselves by way of others."""
    edges = {module: {name for name in names if name != module} for module, names in graph(sources).items()}

    def comes_back(start: str) -> bool:
        seen: set[str] = set()
        todo = list(edges[start])
        while todo:
            module = todo.pop()
            if module == start:
                return True
            if module not in seen:
                seen.add(module)
                todo += edges.get(module, ())
        return False

    return [module for module in edges if comes_back(module)]


def too_large(sources: Mapping[str, str]) -> list[str]:
    """Which limits the package as a whole is over."""
    lines = {file: source.count("\n") for file, source in sources.items()}
    core = sum(count for file, count in lines.items() if part_of(module_of(file)) in CORE)
    loose = sum("/" not in file and not file.startswith("__") for file in sources)
    sizes = {"core": (core, LARGEST_CORE), "package": (sum(lines.values()), LARGEST), "loose modules": (loose, LOOSE)}
    return [f"{name}: {size} of {most}" for name, (size, most) in sizes.items() if size > most]


@pytest.mark.parametrize("file", SOURCES)
def test_imports_run_one_way(file: str) -> None:
    assert violations(file, SOURCES[file]) == []


def test_every_part_has_its_row() -> None:
    parts = {part_of(module_of(file)) for file in SOURCES} - {"", "__main__"}
    assert parts <= set(ROW)


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circles(SOURCES) == []


def test_light_parts_load_nothing_heavy_by_any_path() -> None:
    assert loads_what_it_may_not(SOURCES) == []


def test_the_package_stays_small() -> None:
    assert too_large(SOURCES) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("model/vit.py", "from vitlit.optim import Schedule"),
        ("model/vit.py", "from vitlit import optim"),
        ("model/vit.py", "import vitlit"),
        ("model/vit.py", "def f():\n    from vitlit.stages import Stage"),
        ("model/vit.py", "from ..optim import Schedule"),
        ("model/vit.py", "import importlib\nimportlib.import_module('vitlit.data')"),
        ("objectives/mae.py", "from vitlit.stages import Stage"),
        ("objectives/mae.py", "from vitlit.data import ImageFolderData"),
        ("objectives/mae.py", "from vitlit.weights import load"),
        ("data/folder.py", "from vitlit.weights import load"),
        ("data/folder.py", "from vitlit.run.config import read_config"),
        ("run/folder.py", "from vitlit.weights.files import open_file"),
        ("weights/timm.py", "from vitlit.data import ImageFolderData"),
        ("stages/stage.py", "from vitlit.callbacks import Bar"),
        ("prepare/check.py", "from vitlit.cli.main import main"),
        ("callbacks/ema.py", "from vitlit.cli.trainer import Trainer"),
        ("loggers/wandb.py", "from vitlit.callbacks import Bar"),
        ("callbacks/mistakes.py", "import wandb"),
        ("cli/fit.py", "def f():\n    import wandb.sdk"),
        ("data/utils.py", ""),
        ("common/names.py", ""),
        ("model/vit.py", "\n" * 351),
        ("model/vit.py", "def f():\n" + "    x = 1\n" * 60),
    ],
)
def test_the_check_sees_what_is_forbidden(file: str, source: str) -> None:
    assert len(violations(file, source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("model/vit.py", "import math\nfrom torch import nn\nfrom vitlit.model.heads import new_head"),
        ("model/vit.py", "from vitlit.errors import UserError\n" + "\n" * 300),
        ("data/module.py", "from vitlit.objectives import Batch"),
        ("stages/stage.py", "from vitlit import seeds\nfrom vitlit.seeds import seed_step"),
        ("weights/timm.py", "from vitlit.images.preprocess import Preprocess\nimport numpy"),
        ("loggers/wandb.py", "import wandb"),
        ("cli/fit.py", "from vitlit.stages import Stage\nfrom vitlit.callbacks import Bar"),
    ],
)
def test_the_check_lets_pass_what_is_allowed(file: str, source: str) -> None:
    assert violations(file, source) == []


def test_the_checks_over_the_package_see_what_is_forbidden() -> None:
    by_a_path = {
        "objectives/mae.py": "from vitlit.model.vit import ViT",
        "model/__init__.py": "def f():\n    import PIL.Image",
        "model/vit.py": "",
        "weights/timm.py": "import lightning.pytorch",
        "errors.py": "import torch",
    }
    assert loads_what_it_may_not(by_a_path) == [
        *("vitlit.objectives.mae loads PIL", "vitlit.model loads PIL", "vitlit.model.vit loads PIL"),
        *("vitlit.weights.timm loads lightning", "vitlit.errors loads torch"),
    ]
    circle = {
        "data/a.py": "from vitlit.data import b",
        "data/b.py": "def f():\n    import vitlit.data.a",
        "data/c.py": "",
    }
    assert circles(circle) == ["vitlit.data.a", "vitlit.data.b"]
    assert (
        circles({"data/a.py": "if TYPE_CHECKING:\n    import vitlit.data.b", "data/b.py": "import vitlit.data.a"}) == []
    )
    assert too_large({f"{name}.py": "" for name in "abcdefg"} | {"__init__.py": ""}) == []
    assert too_large({f"{name}.py": "" for name in "abcdefgh"}) == ["loose modules: 8 of 7"]
    assert too_large({"optim/a.py": "\n" * 3301}) == ["core: 3301 of 3300"]
    assert too_large({"data/a.py": "\n" * 17_251}) == ["package: 17251 of 17250"]
