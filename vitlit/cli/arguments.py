"""The arguments of fit, validate, test and predict: their order and their error messages."""

import re
import time
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch import callbacks
from lightning.pytorch.cli import LightningArgumentParser
from torch import optim

from vitlit.callbacks import ema as averaging
from vitlit.cli.configs import find_config
from vitlit.data import augment
from vitlit.errors import UserError
from vitlit.model import Size
from vitlit.objectives import Objective
from vitlit.run.config import read_config
from vitlit.stages import Stage
from vitlit.stages.record import check_class_paths

BARE = ("-h", "--help", "--print_config")  # flags that no value follows

# What opens a command's help, before all keys.
HELP = {
    "fit": {"usage": "vitlit fit --config CONFIG [--KEY VALUE ...]"},
    "validate": {"usage": "vitlit validate RUN [--KEY VALUE ...]"},
    "test": {"usage": "vitlit test RUN [--KEY VALUE ...]"},
    "predict": {
        "usage": "vitlit predict RUN PHOTOS... [--out FILE.csv] [--KEY VALUE ...]",
        "description": "Classify PHOTOS: images, or folders searched to their depth.",
    },
}


class CommandLine:
    """The arguments of a command as the parser gets them: configs first, so that flags win."""

    def __init__(self, command: str, arguments: list[str]) -> None:
        self.command, self.began = command, time.monotonic()
        self.launched = False  # once training has begun, ranks may fail in different ways
        self.exact = False  # whether the folder of a run was given
        configs, flags, others = sort_arguments(arguments)
        if command != "fit" and not configs and others:
            folder = Path(others.pop(0))
            if not (folder / "config.yaml").is_file():
                raise UserError(f"{folder} is not the folder of a run: it holds no config.yaml")
            configs, self.exact = [str(folder / "config.yaml")], True
            keys = {"run.root": folder.absolute().parent, "run.name": folder.absolute().name}
            # The run may have been trained on another machine.
            keys |= {"trainer.num_nodes": 1, "trainer.strategy": "auto", "trainer.devices": 1}
            flags = [part for key, value in keys.items() for part in (f"--{key}", str(value))] + flags
        if others and command != "predict":
            raise UserError(f"unexpected argument {others[0]!r}; {command} takes --config CONFIG and --KEY VALUE")
        names = [flag.partition("=")[0] for flag in flags]
        if "--model.vit.preset" in names and "--model.vit" not in names:  # replaces the config's class and sizes
            first = next(i for i, name in enumerate(names) if name.startswith("--model.vit."))
            flags[first:first] = ["--model.vit", "vitlit.ViT.from_preset"]
        paths = [str(find_config(name)) for name in configs]
        contents = [read_config(path) for path in paths]
        check_class_paths(contents)
        self.config: str | None = paths[0] if paths else None  # names the run
        self.content = contents[0] if contents else {}
        self.photos = [Path(other) for other in others]
        self.arguments = [command, *(part for path in paths for part in ("--config", path)), *flags]


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
            flags += [part, rest.pop(0)] if follows else [part]
        else:
            others.append(part)
    return found


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
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        if kind.__module__.partition(".")[0] not in ("torch", "torchvision", "torchmetrics", "lightning"):
            raise
        raise UserError(f"{kind.__name__}: {error}") from error


class Parser(LightningArgumentParser):
    """A parser whose errors are one line, and that does not accept abbreviated keys."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def validate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> None:
        """Check null too, which jsonargparse accepts for any type."""
        super().validate(namespace, *args, **kwargs)
        # skip_unset=False would do the same, but for required keys: "expected str, not null" says less than "needs".
        for action in self._actions:
            if action.default is not None and namespace.get(action.dest, action.default) is None:
                self._check_value_key(action, None, action.dest, namespace)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if denied := re.search(r"Importing '([^']+)' is not allowed", message):
            check_class_paths({"class_path": denied[1]})
        if required := re.search(r"arguments are required: (\w+)\.(\S+\w)(.*\.model)?", message):
            command, key, model = required.groups()
            if key != "model" and not model:
                raise UserError(f"{command} needs --{key}") from ex
            run = "" if command == "fit" else " or the folder of a run"
            raise UserError(f"{command} needs --config CONFIG{run}; `vitlit config` lists the shipped ones") from ex
        if unknown := UNKNOWN_KEY.match(message):
            key = ".".join(filter(None, unknown.groups()))
            raise UserError(f"no key {key}{getattr(ex, 'subcommand_parser', self).nearest(key)}") from ex
        raise UserError(shortened(message)) from ex

    def nearest(self, wrong: str) -> str:
        """Words that suggest the nearest key of the same group, or of any where no group has that name."""
        keys = list(self.get_defaults().keys())
        if wrong == "preset":
            return "; write class_path: vitlit.ViT.from_preset beside it, or --model.vit.preset on the command line"
        if "preset" in keys and wrong in Size._fields:
            return ", which follows from preset: give --model.vit.preset, or --model.vit vitlit.ViT and all its keys"
        group, _, name = wrong.rpartition(".")
        beside = [key for key in keys if key.rpartition(".")[0] == group] if group else keys
        return suggestion(name, {key.rpartition(".")[2]: key for key in beside or keys})


def suggestion(wrong: str, names: dict[str, str]) -> str:
    """Words that suggest the nearest of these names, if one is near."""
    near = get_close_matches(wrong, names, 1, 0.7)
    return f"; did you mean {names[near[0]]}?" if near and names[near[0]] != wrong else ""


def class_names() -> dict[str, str]:
    """The classes that a config usually names."""
    # The modules are imported for jsonargparse too, which finds only classes that are loaded.
    names = [name for module in (optim, callbacks, averaging, augment) for name in dir(module)]
    names += [c.__name__ for base in (Stage, Objective) for c in base.__subclasses__()]
    return {name: name for name in names if name[0].isupper()}


LONGEST = 400  # characters of a message, which may quote a whole config
NOISE = (
    *("Does not validate", "Subtypes:", "Errors:", "Given value type", "Expected a NoneType", "Expected a path"),
    *("Subclass types expect", "a class path (str)", "a dict with"),
)
# The forms in which jsonargparse names an unknown key, after the words that may precede it.
UNKNOWN_KEY = re.compile(
    r"unrecognized arguments: -*([^\s=]+)|(?:Group '([^']+)' |Sub\w+ '.*' )?(?:does not accept o|O)ption '([^']+)'"
)
WORDING = (
    (r"Parser key \"[\w.]+\":|Type .* callable class: |Problem with given class_path .*:\n|\.+ Got value: .*", ""),
    (r"<class '(?:[\w.]+\.)?(\w+)'>|typing\.Literal\[(.*?)\]", r"\1\2"),
    (r"Unable to load config .(.*).", r"Expected a its keys: \1"),
    (r"Not a valid subclass of", "Expected a"),
    (r"dot import path string", "class"),
)


def shortened(message: str) -> str:
    """A message of jsonargparse on one line: the key, what is wrong, what was given, and the nearest class."""
    key = re.match(r"Parser key \"([\w.]+)\":", message)
    values = r"\n *Given value: " if "\n  Given value: " in message else r"\.+ Got value: "
    body, *given = re.split(values, message, maxsplit=1)
    for pattern, words in WORDING:
        body = re.sub(pattern, words, body)
    said, choices = [], []
    for line in (line.strip(" -") for line in body.splitlines()):
        if expected := re.fullmatch(r"Expected an? (?!path|NoneType)([^:]+)(?:: (.+))?", line):
            choices.append(expected[1].replace("', '", "' or '"))
            given = given or list(filter(None, [expected[2]]))
        elif line and not line.startswith(NOISE):
            said.append(line)
    text = (said or [f"expected {' or '.join(dict.fromkeys(choices)) or 'null'}"])[0]
    value = str(given[0]) if given else ""
    if given and not said and not value.startswith(("Namespace(", "NestedArg(")):
        text += f", not {'null' if value == 'None' else value or repr(value)}"
        if choices[:1] in (["Sequence"], ["tuple"]) and not value.startswith(("[", "{")):
            text += f"; write [{value}]"
    if unknown := re.search(r"(?:expected class, not |has no attribute ')(?:[\w.]+\.)?(\w+)'?$", text):
        text += suggestion(unknown[1], class_names())
    if key:
        text = key[1] + ("." if re.match(r"[\w.]+: ", text) else ": ") + text
    text = " ".join(text.split())
    return text if len(text) < LONGEST else f"{text[:LONGEST]} ..."
