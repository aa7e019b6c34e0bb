"""The arguments of fit, validate, test and predict: their order, and what must hold of the config that they make."""

import re
import time
from enum import Enum
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from vitlit.cli.configs import find_config
from vitlit.errors import UserError
from vitlit.files import expand
from vitlit.run.config import check_class_paths, read_config, with_public_paths

BARE = ("-h", "--help", "--print_config")  # flags that no value follows


def opening(command: str) -> dict[str, str]:
    """What opens a command's help, before all keys."""
    takes = {"fit": "--config CONFIG", "predict": "RUN PHOTOS... [--out FILE.csv]"}.get(command, "RUN")
    about = {"description": "Classify PHOTOS: images, or folders searched to their depth."}
    return {"usage": f"vitlit {command} {takes} [--KEY VALUE ...]"} | (about if command == "predict" else {})


class CommandLine:
    """The arguments of a command as the parser gets them: configs first, so that flags win."""

    def __init__(self, command: str, arguments: list[str]) -> None:
        self.command, self.began = command, time.monotonic()
        self.words = ["vitlit", command, *arguments]
        self.launched = False  # once training has begun, ranks may fail in different ways
        self.exact = False  # whether the folder of a run was given
        configs, flags, others = sort_arguments(arguments)
        if command != "fit" and not configs and others:
            folder = Path(expand(others.pop(0)))
            if not (folder / "config.yaml").is_file():
                run = folder.parent.parent  # of a checkpoint in RUN/checkpoints
                near = f"; give {run} --ckpt_path {folder.stem}" if (run / "config.yaml").is_file() else ""
                raise UserError(f"{folder} is not the folder of a run: it holds no config.yaml{near}")
            configs, self.exact = [str(folder / "config.yaml")], True
            keys = {"run.root": folder.absolute().parent, "run.name": folder.absolute().name}
            # The run may have been trained on another machine.
            keys |= {"trainer.num_nodes": 1, "trainer.strategy": "auto", "trainer.devices": 1}
            flags = [f"--{key}={value}" for key, value in keys.items()] + flags
        if others and command != "predict":
            raise UserError(f"unexpected argument {others[0]!r}; {command} takes --config CONFIG and --KEY VALUE")
        paths = [str(find_config(name)) for name in configs]
        contents = [read_config(path) for path in paths]
        check_class_paths(contents)
        trainers = [dict(content["trainer"]) for content in contents if isinstance(content.get("trainer"), dict)]
        wandb = "--trainer.logger=vitlit.loggers.Wandb"  # the default, whose options may follow
        flags = [wandb if flag.lower() == "--trainer.logger=true" else flag for flag in flags]
        classes_first(flags)
        insert(flags, "--model.vit", "vitlit.ViT.from_preset", only="--model.vit.preset")  # for the config's class
        if not any(isinstance(trainer.get("logger"), str | dict | list) for trainer in trainers):
            insert(flags, "--trainer.logger", "vitlit.loggers.Wandb")
        written = [trainer.get("callbacks") for trainer in trainers] + [f for f in flags if "callbacks" in f]
        self.gives_mode = re.search(r"\bmode\b", str(written)) is not None  # of a callback, whose default is min
        self.config: str | None = paths[0] if paths else None  # names the run
        self.content = contents[0] if contents else {}
        self.photos = [Path(expand(other)) for other in others]
        self.arguments = [command, *(part for path in paths for part in ("--config", path)), *flags]

    def seconds(self) -> float:
        return time.monotonic() - self.began


def sort_arguments(arguments: list[str]) -> tuple[list[str], list[str], list[str]]:
    """The configs, the flags with their values, and all other arguments."""
    found: tuple[list[str], list[str], list[str]] = ([], [], [])
    configs, flags, others = found
    rest = list(arguments)
    while rest:
        part = rest.pop(0)
        name, equals, value = part.partition("=")
        follows = bool(rest) and not rest[0].startswith("--") and not equals and name not in BARE
        if name in ("-c", "--config"):
            value = rest.pop(0) if follows else value
            if not value:
                raise UserError(f"{name} needs a config: its path, or a name that `vitlit config` lists")
            configs.append(value)
        elif part.startswith("-"):
            value = with_public_paths(rest.pop(0) if follows else value)
            flags.append(f"{name}={value}" if follows or equals else part)
        else:
            others.append(part)
    return found


def classes_first(flags: list[str]) -> None:
    """Move each class before the options of its key: jsonargparse drops what the class before has alone."""
    for place, flag in enumerate(flags):
        key, _, value = flag.partition("=")
        if re.fullmatch(r"(\w+\.)*[A-Z]\w*(\.\w+)?", value):
            options = f"{key.removesuffix('.class_path')}."
            first = next(i for i, other in enumerate(flags) if other.startswith(options) or i == place)
            flags.insert(first, flags.pop(place))


def insert(flags: list[str], key: str, value: str, only: str = "") -> None:
    """Give `key` this class before its first option, if it has options (or `only` this one), but no class."""
    names = [flag.partition("=")[0] for flag in flags]
    options = [i for i, name in enumerate(names) if name.startswith(f"{key}.")]
    if options and key not in names and (not only or only in names):
        flags.insert(options[0], f"{key}={value}")


# The last parts of keys that are paths, also in other libraries' loggers, callbacks and profilers.
PATHS = ("root", "manifest", "init_from", "teacher", "ckpt_path", "out", "save_dir", "dirpath", "root_dir", "log_dir")


def expand_paths(config: Any) -> None:
    """Replace ~ and environment variables in all paths, and enumerations, before anything reads or records them."""
    for key, value in config.items() if isinstance(config, dict) else vars(config).items():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, Namespace | dict):
                expand_paths(part)
        if key in PATHS and isinstance(value, str):
            config[key] = expand(value)
        elif isinstance(value, str) and isinstance(value, Enum):  # a default that its class calls a str
            config[key] = value.value


def check_groups(config: Namespace) -> None:
    """Refuse a number, null or a function in place of a group, which jsonargparse accepts."""
    groups = ["run", "trainer", "data", "data.erasing", "data.mixing"]
    groups += [f"model.init_args.{name}" for name in ("objective", "optimizer", "schedule", "groups")]
    for key in groups:
        value = config.get(key)
        if not isinstance(value, Namespace):
            given = "null" if value is None else getattr(value, "__name__", value)
            raise UserError(f"{key.replace('.init_args', '')}: expected its keys, not {given}")


def build(kind: type, /, *args: Any, **kwargs: Any) -> Any:
    """Make an object that a config names. A library's class may refuse its arguments; an error elsewhere is a bug."""
    try:
        return kind(*args, **kwargs)
    except Exception as error:  # a logger's may be of its service's package
        told = isinstance(error, UserError) or type(error).__name__ == "MisconfigurationException"
        library = kind.__module__.partition(".")[0] in ("torch", "torchvision", "torchmetrics", "lightning")
        library |= kind.__module__.startswith("vitlit.loggers")  # whose bases are of their services' packages
        if told or not (library or isinstance(error, ImportError)):  # that a package is missing is no bug either
            raise
        raise UserError(f"{kind.__name__}: {error}") from error
