"""What worked on a run, when, where and for how long, and what came out: the run's run.json."""

import json
from pathlib import Path
from typing import Any

from vitlit.errors import UserError
from vitlit.files import whole_file


class History:
    """A JSON file: under `commands` those that worked on a run, and once it is complete, its `result`.

    A command has `seconds`, `step` and `ended` once it ended; one that was killed does not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, command: dict[str, Any]) -> None:
        """Add a command and what is known of it."""
        content = self.read()
        content.pop("result", None)
        content.setdefault("commands", []).append(command)
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
