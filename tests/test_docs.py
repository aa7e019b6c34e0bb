"""Every command that a document or a config names is run, on a few images and with a small ViT."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY, SMALL, Result
from safetensors.torch import save_file
from test_convert import stranger

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
SHRINK = [*SMALL[2:], "--trainer.accelerator", "cpu"]
RECIPE = shlex.split(
    "--data.image_size 32 --data.batch_size 8 --data.micro_batch 4 --data.num_workers 0 --trainer.logger false "
    "--trainer.accelerator cpu --trainer.devices 1 --trainer.max_steps 2 --model.schedule.warmup 1"
)


def commands() -> list[str]:
    """The `vitlit` lines of the documents' shell blocks and of the configs' headers, in order and once."""
    blocks = [block for page in PAGES for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S)]
    lines = [line.split("  # ")[0].strip() for block in blocks for line in block.splitlines()]
    for path in CONFIGS:
        lines += [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#   ")]
    return list(dict.fromkeys(line for line in lines if line.startswith("vitlit ")))


def small(command: str, folder: Path, photos: Path) -> list[str]:
    """The command's arguments with real folders, and flags that make its run small."""
    real = {"FOLDER": str(folder), "PHOTOS": str(photos), "FILE": "timm.safetensors"}
    arguments = [real.get(part, part) for part in shlex.split(command)[1:]]
    if arguments[0] != "fit" or any("help" in part or "print_config" in part for part in arguments):
        return arguments
    config = arguments[arguments.index("--config") + 1]
    if config.startswith("recipes/"):
        shrink = RECIPE if config.endswith("384") else [*RECIPE, "--model.vit.preset", "Ti/16"]
    else:
        shrink = SHRINK
        if "finetune" in config:
            keep = [i for i, part in enumerate(SHRINK) if part.startswith("--model.vit.")]
            shrink = [part for i, part in enumerate(SHRINK) if i not in keep and i - 1 not in keep]
            shrink = [*shrink, "--data.image_size", "24"]
    strategy = ["--trainer.strategy", "ddp_fork"] if "ddp" in arguments else []
    extra = ["--data.root", str(folder)] if "--data.root" not in arguments else []
    return [*arguments, *shrink, *strategy, *extra]


def test_every_command_works(vitlit: Callable[..., Result], few: Path, tmp_path: Path) -> None:
    """In the documents' order, in one folder: each finds what the ones before it left."""
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    save_file(stranger().state_dict(), tmp_path / "timm.safetensors")
    listed = commands()
    assert len(listed) >= 16
    for i, command in enumerate(listed):
        arguments = small(command, few, few / "val")
        if "convert" in command:
            arguments[3] = f"{i}-{arguments[3]}"
        if "from-file" in command:
            arguments += ["--run.name", f"from-file-{i}"]
        if "ddp" in command:
            arguments += ["--run.name", "two"]
        result = vitlit(*arguments)
        assert result.code == 0, f"{command}\n{result.out}\n{result.err}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_opens_with_its_command(path: Path) -> None:
    name = str(path.relative_to(REPOSITORY / "configs").with_suffix(""))
    first = next(line for line in path.read_text().splitlines() if line.startswith("#   vitlit"))
    assert f"--config {name}" in first or f"--config configs/{name}.yaml" in first


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda path: path.stem)
def test_the_python_of_a_page_runs(
    page: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(stranger().state_dict(), tmp_path / "timm.safetensors")
    (tmp_path / "photo.png").write_bytes(next((few / "val" / "0").iterdir()).read_bytes())
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(block, {})
    assert capsys.readouterr().out
