"""Every command that a document or a config names is run, on a few images and with a small ViT."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import tifffile
import yaml
from conftest import HEADS, REPOSITORY, SMALL, Result, stranger
from safetensors.torch import save_file

from vitlit import export
from vitlit.benchmark import data, model
from vitlit.cli.main import main
from vitlit.model import SIZES

pytestmark = pytest.mark.usefixtures("undrawn")

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"), reverse=True)  # pretrain, then finetune
RECIPES = sorted((REPOSITORY / "configs" / "recipes").glob("*.yaml"))
SHRINK = [*SMALL[2:], "--trainer.accelerator", "cpu"]
RECIPE = {
    "--data.image_size": "32",
    "--data.batch_size": "8",
    "--data.micro_batch": "4",
    "--data.num_workers": "0",
    "--trainer.accelerator": "cpu",
    "--trainer.devices": "1",
    "--trainer.max_steps": "2",
    "--trainer.logger": "false",
    "--run.report": "false",
    "--model.schedule.warmup": "1",
}


def unrolled(block: str) -> str:
    """A shell block with its loops as the commands that they run."""
    loop = r"for (\w+) in (.+); do\n(.*?)done\n"
    return re.sub(loop, lambda m: "".join(m[3].replace(f"${m[1]}", word) for word in m[2].split()), block, flags=re.S)


def commands(sources: list[Path]) -> list[str]:
    """The lines of documents' shell blocks and of configs' headers that work on runs, in order and once."""
    lines: list[str] = []
    for path in sources:
        text = path.read_text()
        if path.suffix == ".md":
            blocks = map(unrolled, re.findall(r"```sh\n(.*?)```", text, re.S))
            found = [line for block in blocks for line in block.splitlines()]
        else:
            found = [line.removeprefix("#   ") for line in text.splitlines() if line.startswith("#   ")]
        lines += [line.split("  # ")[0].strip() for line in found]
    # tests/prepare/test_sources.py downloads, from a server of its own.
    works = ("vitlit ", "mv ", "rm ")
    return [line for line in dict.fromkeys(lines) if line.startswith(works) and "data cifar10" not in line]


def shrunken(arguments: list[str], cwd: Path) -> list[str]:
    """Flags that make the run of a recipe small: of its ViT, and of what it starts from where there is no such run."""
    recipe = arguments[arguments.index("--config") + 1]
    config = yaml.safe_load((REPOSITORY / "configs" / f"{recipe}.yaml").read_text())
    stage = config["model"]["init_args"]
    flags = dict(RECIPE)
    if config["data"]["image_size"] < 32:
        del flags["--data.image_size"]
    if "views" in config["data"]:  # objectives that compare the images of a batch refuse to divide it
        del flags["--data.micro_batch"]
    if "preset" in stage.get("vit", {}).get("init_args", {}):
        flags["--model.vit.preset"] = "Ti/16"
    if "--model.objective" not in arguments:
        heads = HEADS.get(stage.get("objective", {}).get("class_path", ""), {})
        flags |= {f"--model.objective.{name}": str(value) for name, value in heads.items()}
    if "init_from" in stage and not (cwd / str(stage["init_from"])).exists():
        flags["--model.init_from"] = "timm.safetensors"
    named = re.compile(rf"runs/{Path(recipe).name}\b")
    if "--run.name" not in arguments and not any(named.search(path.read_text()) for path in RECIPES):
        flags["--trainer.fast_dev_run"] = "2"  # no other recipe begins with its checkpoint, whose writing takes long
    return [part for flag, value in flags.items() if flag not in arguments for part in (flag, value)]


def small(command: str, folder: Path, photos: Path, cwd: Path) -> list[str]:
    """The command's arguments with real folders, and flags that make its run small."""
    real = {"TILES": "tiles", "FOLDER": str(folder), "PHOTOS": str(photos), "FILE": "timm.safetensors"}
    arguments = [real.get(part, part) for part in shlex.split(command)[1:]]
    if arguments[0] == "benchmark":
        network = ["--model", "Ti/16"] if "data" in arguments else ["--preset", "Ti/16"]
        return [*arguments, "--image_size", "32", *network]
    if arguments[0] == "tune":
        flags = {**RECIPE, "--ways": "probe", "--model.init_from": "timm.safetensors"}
        return [*arguments, *(part for flag, value in flags.items() for part in (flag, value))]
    if arguments[0] != "fit" or any("help" in part or "print_config" in part for part in arguments):
        return arguments
    if "--data.image_size" in arguments:  # as large would be slow, not other
        arguments[arguments.index("--data.image_size") + 1] = "48"
    config = arguments[arguments.index("--config") + 1]
    if config.startswith("recipes/"):
        shrink = shrunken(arguments, cwd)
    else:
        shrink = SHRINK
        if "finetune" in config:
            keep = [i for i, part in enumerate(SHRINK) if part.startswith("--model.vit.")]
            shrink = [part for i, part in enumerate(SHRINK) if i not in keep and i - 1 not in keep]
            shrink = [*shrink, "--data.image_size", "48"]
        if "--ckpt_path" in arguments:
            shrink = [*shrink, "--trainer.max_steps", "9"]
        if "--model.objective" in arguments:
            heads = HEADS.get(arguments[arguments.index("--model.objective") + 1], {})
            shrink = [*shrink, *(part for name in heads for part in (f"--model.objective.{name}", str(heads[name])))]
        pairs = zip(shrink[::2], shrink[1::2], strict=True)
        shrink = [part for pair in pairs if pair[0] not in arguments or "max_steps" in pair[0] for part in pair]
    strategy = ["--trainer.strategy", "ddp_fork"] if "ddp" in arguments else []
    extra = ["--data.root", str(folder)] if "--data.root" not in arguments else []
    return [*arguments, *shrink, *strategy, *extra]


def write_labels(root: Path, cwd: Path) -> None:
    """The files of labels that the pages name: one class an image, one or two, numbers, and groups of images."""
    paths = sorted(path.relative_to(root) for path in (root / "train").rglob("*.png"))
    rows = {
        "labels.csv": [f"{path},{path.parent.name}" for path in paths],
        "numbers.csv": [f"{path},{i / 4}" for i, path in enumerate(paths)],
        "several.csv": [f"{path},{'even|' if i % 2 else ''}{path.parent.name}" for i, path in enumerate(paths)],
    }
    for name, lines in rows.items():
        (cwd / name).write_text("\n".join(["path,label", *lines]))
    lines = [f"{path},{path.parent.name},{i // 2}" for i, path in enumerate(paths)]
    (cwd / "groups.csv").write_text("\n".join(["path,label,group", *lines]))


def write_tiles(root: Path) -> None:
    """Images of four channels of 16 bits."""
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for name in ("field", "water"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                values = random.integers(0, 65536, (32, 32, 4), np.uint16)
                tifffile.imwrite(
                    root / split / name / f"{i}.tif", values, photometric="minisblack", planarconfig="contig"
                )


def named(command: str) -> set[str]:
    """The runs and shards that a command leaves or needs."""
    names = set(re.findall(r"(?:--run\.name |--data\.root |\bshard FOLDER |\bruns/)([\w.-]+)", command)) - {"FOLDER"}
    if command == "vitlit runs":
        names.add("seed-0")  # it needs one
    if config := re.search(r"--config (?:configs/)?([\w/]+)", command):
        stage = yaml.safe_load((REPOSITORY / "configs" / f"{config[1]}.yaml").read_text())["model"]
        if "--run.name" not in command:
            names.add(Path(config[1]).name)
        if "--model.init_from" not in command:
            names.update(re.findall(r"\bruns/(\w+)", str(stage)))
    return names


def together(lines: list[str]) -> list[list[str]]:
    """Commands that name one run, or by way of others; the groups need nothing of each other."""
    groups: list[tuple[set[str], list[str]]] = []
    for line in lines:
        names, found = named(line), [line]
        for group in [group for group in groups if group[0] & names]:
            groups.remove(group)
            names, found = names | group[0], group[1] + found
        groups.append((names, sorted(found, key=lines.index)))
    return [found for _, found in groups]


def trial(arguments: list[str], log: Path) -> int:
    """A trial of `vitlit tune` without the imports of a new process."""
    log.touch()
    if not (child := os.fork()):
        os._exit(main(["fit", *arguments]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fast() -> None:
    """Let benchmarks and probes take less long, the preset of the recipes have two blocks, and caches be the test's."""
    os.environ["XDG_CACHE_HOME"] = "cache"
    probe: Any = import_module("vitlit.evaluation.linear")
    probe.STEPS = 5
    evaluation: Any = import_module("vitlit.cli.evaluate")
    evaluation.temperature = lambda *_: 1.5  # a network that has learned from a few images has none
    hub: Any = import_module("huggingface_hub")
    hub.get_token, hub.HfApi = lambda: "token", MagicMock
    tune: Any = import_module("vitlit.cli.tune")
    tune.fit = trial
    export.INT8_LOSS = 1.0  # of a run that has learned nothing
    data.SECONDS, model.SECONDS, model.ROUNDS = 0.1, 0.01, 1
    SIZES["Ti"] = SIZES["Ti"]._replace(depth=2)


COMMANDS = commands([*PAGES, *CONFIGS, *RECIPES])


@pytest.fixture(scope="module")
def reader(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one who begins to read."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "configs").symlink_to(REPOSITORY / "configs")
    save_file(stranger().state_dict(), folder / "timm.safetensors")
    shutil.copy(next((few / "val" / "0").iterdir()), folder / "photo.png")
    write_labels(few, folder)
    write_tiles(folder / "tiles")
    return folder


@pytest.mark.parametrize("lines", together(COMMANDS), ids=lambda lines: "; ".join(sorted(named(lines[0]))) or lines[0])
def test_every_command_works(
    lines: list[str], vitlit: Callable[..., Result], few: Path, reader: Path, tmp_path: Path
) -> None:
    """In the documents' order: each finds what the ones before it left."""
    shutil.copytree(reader, tmp_path, symlinks=True, dirs_exist_ok=True)
    for line in lines:
        if not line.startswith("vitlit "):
            subprocess.run(shlex.split(line), cwd=tmp_path, check=True)
            continue
        arguments = small(line, few, few / "val", tmp_path)
        if "from-file" in line:
            arguments += ["--run.name", f"from-file-{lines.index(line)}"]
        if "ddp" in line:
            arguments += ["--run.name", "two"]
        result = vitlit(*arguments, before=fast)
        assert result.code == 0, f"{line}\n{result.out}\n{result.err}"


def test_the_site_builds_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    line = next(line for line in (REPOSITORY / "Makefile").read_text().splitlines() if "-m sphinx" in line)
    words = [sys.executable, *shlex.split(line)[1:-1], str(tmp_path)]
    built = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for path in re.findall(r"\]\(([^)#]+)", PAGES[0].read_text()):
        assert path.startswith("https:") or (REPOSITORY / path).exists(), path


def test_the_messages_of_the_page_are_those_of_the_code() -> None:
    texts = []
    for file in (REPOSITORY / "vitlit").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    told = re.findall(r"^\| `([^`]+)` \|", (REPOSITORY / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert len(told) >= 20
    for message in told:
        for part in filter(re.compile(r"\w\w").search, re.split(r"\.\.\.", message)):
            assert any(part.strip() in text for text in texts), part


def test_the_pages_name_many_commands() -> None:
    assert len(COMMANDS) >= 80
    assert sorted(line for lines in together(COMMANDS) for line in lines) == sorted(COMMANDS)


@pytest.mark.parametrize("path", [*CONFIGS, *RECIPES], ids=lambda path: path.stem)
def test_a_config_opens_with_its_command(path: Path) -> None:
    name = str(path.relative_to(REPOSITORY / "configs").with_suffix(""))
    first = next(line for line in path.read_text().splitlines() if line.startswith("#   vitlit fit"))
    assert f"--config {name}" in first or f"--config configs/{name}.yaml" in first


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda path: path.stem
)
def test_the_python_of_a_page_runs(
    page: Path, few: Path, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder where runs/pretrain is complete."""
    save_file(stranger().state_dict(), work / "timm.safetensors")
    (work / "photo.png").write_bytes(next((few / "val" / "0").iterdir()).read_bytes())
    (work / "FOLDER").symlink_to(few)
    monkeypatch.chdir(work)
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(block, {})
    assert capsys.readouterr().out
