"""What worked on a run, when, where and for how long, and what came out: the run's run.json."""

import json
import platform
import shlex
import socket
import subprocess
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import vitlit
from vitlit.errors import UserError
from vitlit.files import whole_file

PACKAGES = ("torch", "torchvision", "torchcodec", "lightning", "torchmetrics", "jsonargparse", "wandb")


class History:
    """A JSON file: under `commands` those that worked on a run, and once it is complete, its `result`.

    A command has `seconds`, `step` and `ended` once it ended; one that was killed does not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, command: list[str]) -> None:
        """Add a command."""
        content = self.read()
        content.pop("result", None)
        content.setdefault("commands", []).append({"command": shlex.join(command), **origin()})
        self._write(content)

    def end(self, step: int, seconds: float, ended: str, **result: Any) -> None:
        """Add to the last command how it ended, and a complete run's result."""
        content = self.read()
        commands = content["commands"]
        commands[-1].update(step=step, seconds=round(seconds, 1), ended=ended)
        if result:
            total = sum(each.get("seconds", 0) for each in commands)
            content["result"] = {"step": step, "seconds": round(total, 1), **result}
        self._write(content)

    def read(self) -> dict[str, Any]:
        """The content; UserError if it is damaged."""
        try:
            content = json.loads(self.path.read_text()) if self.path.exists() else {}
            return {**content, "commands": list(content.get("commands", []))}
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{self.path} is damaged; remove it, and the same command continues the run") from error

    def _write(self, content: dict[str, Any]) -> None:
        with whole_file(self.path) as partial:
            partial.write_text(json.dumps(content, indent=2) + "\n")


def origin() -> dict[str, Any]:
    """What a result was made with: date, host, working folder, versions, and commits where there are any."""
    folders = {"folder": Path.cwd(), "vitlit": Path(vitlit.__file__).parent.parent}
    if not (folders["vitlit"] / ".git").exists():  # an installed package, in whatever repository its .venv lies
        del folders["vitlit"]
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "folder": str(Path.cwd()),
        "versions": versions(),
        "commit": {name: found for name, folder in folders.items() if (found := commit(folder))},
    }


def versions() -> dict[str, str | None]:
    """The versions of Python, vitlit and the packages below it; None for what is missing."""
    found: dict[str, str | None] = {"python": platform.python_version(), "vitlit": vitlit.__version__}
    return found | {name: version(name) for name in PACKAGES}


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit(folder: Path) -> str:
    """The commit checked out around a folder, with -dirty behind it if files differ; "" without one."""
    ask = ["git", "--no-optional-locks", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    with suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run([*ask, "--exclude=*"], capture_output=True, text=True, timeout=5).stdout.strip()
    return ""
