"""The arguments of fit, validate, test and predict: their order, their errors, and what they may name."""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from vitlit.cli import find_config
from vitlit.errors import UserError
from vitlit.stages.record import check_class_paths

BARE = ("-h", "--help", "--print_config")  # flags that no value follows


class CommandLine:
    """Arguments in the order that makes flags win over config files, and what they say beside the keys.

    Attributes:
        arguments: for the parser, configs first.
        config: the last config's path, which names the run.
        photos: what `predict` is given.
    """

    def __init__(self, command: str, configs: list[str], flags: list[str], photos: list[str]) -> None:
        paths = [str(find_config(name)) for name in configs]
        for path in paths:
            check_class_paths(load_yaml(path))
        self.command, self.config, self.photos = command, paths[-1] if paths else None, [Path(p) for p in photos]
        self.arguments = [command, *(part for path in paths for part in ("--config", path)), *flags]

    @classmethod
    def read(cls, command: str, arguments: list[str]) -> "CommandLine":
        """Sort arguments into configs, flags and what is neither.

        Raises:
            UserError: a config does not exist, or a folder that should be a run's is none.
        """
        configs: list[str] = []
        flags: list[str] = []
        others: list[str] = []
        rest = list(arguments)
        while rest:
            part = rest.pop(0)
            name, equals, value = part.partition("=")
            follows = bool(rest) and not rest[0].startswith("--") and not equals and name not in BARE
            if name in ("-c", "--config"):
                if follows:
                    value = rest.pop(0)
                configs.append(value)
            elif part.startswith("-"):
                flags += [part, rest.pop(0)] if follows else [part]
            else:
                others.append(part)
        if command != "fit" and not configs and others:
            folder = Path(others.pop(0))
            if not (folder / "config.yaml").is_file():
                raise UserError(f"{folder} is not the folder of a run: it holds no config.yaml")
            configs = [str(folder / "config.yaml")]
            flags = ["--run.root", str(folder.absolute().parent), "--run.name", folder.absolute().name, *flags]
        if others and command != "predict":
            raise UserError(f"what is {others[0]!r}? {command} takes --config CONFIG and --KEY VALUE")
        return cls(command, configs, flags, others)


def load_yaml(path: str) -> Any:
    """A config's content; UserError where it is no YAML."""
    try:
        return yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} is not YAML: {' '.join(str(error).split())}") from error


class Parser(LightningArgumentParser):
    """A parser whose errors are one line, and that takes no abbreviation of a key."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        noise = (
            "Does not validate",
            "Subtypes:",
            "Errors:",
            "Expected a <class 'NoneType'>",
            "Given value",
            "- Expected a <class 'NoneType'>",
        )
        lines = [line.strip(" -") for line in message.splitlines() if not line.strip().startswith(noise)]
        text = " ".join(" ".join(lines).split())
        denied = re.search(r"Importing '([^']+)' is not allowed", text)
        if denied:
            check_class_paths({"class_path": denied[1]})
        raise UserError(text + self.suggestion(text)) from ex

    def suggestion(self, text: str) -> str:
        """The nearest key to the one that a message calls unknown."""
        wrong = re.findall(r"(?:unrecognized arguments: -*|[Kk]ey ['\"]|Option ')([\w.]+)", text)
        if not wrong or "did you mean" in text or not re.search("unrecognized|not expected|not accepted", text):
            return ""
        near = get_close_matches(wrong[-1], sorted(set(self.keys())), 1, 0.7)
        return f"; did you mean {near[0]}?" if near else ""

    def keys(self) -> Iterator[str]:
        """Every key, whole and by its last part."""
        for action in self._actions:
            if action.dest and action.dest != "help":
                yield action.dest
                yield action.dest.rsplit(".", 1)[-1]
