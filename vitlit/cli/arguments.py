"""The arguments of fit, validate, test and predict: their order, their errors, and what they may name."""

import re
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

# What opens the help of a command, before all keys.
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
    """Arguments in the order that makes flags win over config files, and what they say beside the keys.

    Attributes:
        arguments: for the parser, configs first.
        config: the first config's path, which names the run.
        content: of that config.
        photos: what `predict` is given.
        exact: whether the folder of a run was given.
        launched: whether training has begun, from where on ranks may differ.
    """

    def __init__(self, command: str, configs: list[str], flags: list[str], photos: list[str], exact: bool) -> None:
        paths = [str(find_config(name)) for name in configs]
        contents = [read_config(path) for path in paths]
        for content in contents:
            check_class_paths(content)
        self.content = contents[0] if contents else {}
        self.command, self.config, self.photos = command, paths[0] if paths else None, [Path(p) for p in photos]
        self.exact, self.launched = exact, False
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
        exact = False
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
        if command != "fit" and not configs and others:
            folder = Path(others.pop(0))
            if not (folder / "config.yaml").is_file():
                raise UserError(f"{folder} is not the folder of a run: it holds no config.yaml")
            configs = [str(folder / "config.yaml")]
            where = {"run.root": folder.absolute().parent, "run.name": folder.absolute().name}
            # The run's machine need not be this one.
            here = {"trainer.num_nodes": 1, "trainer.strategy": "auto", "trainer.devices": 1}
            flags = [part for key, value in {**where, **here}.items() for part in (f"--{key}", str(value))] + flags
            exact = True
        if others and command != "predict":
            raise UserError(f"what is {others[0]!r}? {command} takes --config CONFIG and --KEY VALUE")
        return cls(command, configs, flags, others, exact)


# What is a group of keys, or a class and its keys, in every config.
GROUPS = (
    *("run", "trainer", "data", "data.erasing", "data.mixing"),
    *(f"model.init_args.{name}" for name in ("objective", "optimizer", "schedule", "groups")),
)


def check_groups(config: Namespace) -> None:
    """Raise UserError where a group is something else, which jsonargparse lets pass: a number, null, a function."""
    for key in GROUPS:
        if not isinstance(config.get(key), Namespace):
            raise UserError(f"{key.replace('.init_args', '')}: expected its keys, not {_shown(config.get(key))}")


def _shown(value: Any) -> str:
    return "null" if value is None else str(getattr(value, "__name__", value))


def build(kind: type, /, *args: Any, **kwargs: Any) -> Any:
    """Make an object that a config names.

    Raises:
        UserError: a class of a library refuses its arguments; an error in a class of vitlit's or the user's is a bug.
    """
    try:
        return kind(*args, **kwargs)
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        if kind.__module__.partition(".")[0] not in ("torch", "torchvision", "torchmetrics", "lightning"):
            raise
        raise UserError(f"{kind.__name__}: {error}") from error


# What jsonargparse says, and what a user reads: applied one after the other to the whole message, on one line.
NOISE = (
    *("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>", "Expected a path"),
    *("Subclass types expect", "a class path (str)", "a dict with class_path", "a dict without", "a dict with param"),
)
LONGEST = 400  # characters of a message, which may quote a whole config
WORDING = (
    (r"Type .* expects a function or a callable class: ", ""),
    (r"\.* Got value: Namespace\(.*", ""),
    (r"\.* Got value:$", ", not ''"),
    (r"\.* Got value: ", ", not "),
    (r", not None$", ", not null"),
    (r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1"),
    (r"typing\.Literal\[([^]]*)\]", lambda found: found[1].replace(", ", " or ")),
    (r"(has no attribute '\w+').*", r"\1"),
    (r"Expected an? ", "expected "),
    (r"Problem with given class_path '[^']*': ", ""),
    (r"(?:Option|Sub\w+ '\w+' does not accept option) '([^']+)'(?: is not accepted)?", r"no key \1"),
    (r"Group '([\w.]+)' does not accept option '([^']+)'", r"no key \1.\2"),
    (r"unrecognized arguments: -*([\w.]+).*", r"no key \1"),
    (r"Import path does not correspond", "it does not correspond"),
    (r"(?:Import path |Expected ')?([\w.]+)'? (?:does not correspond to|to be) a subclass of", r"\1 is no subclass of"),
    (r"Subclasses are disabled for (\w+), thus '([^']*)'.*", r"expected the keys of \1, not \2"),
    (r"Dict must include a class_path and optionally init_args, but got", "expected class_path and init_args, not"),
    (r"expected import path or a subclass spec, but got .*, not", "expected class, not"),
    (r"Unable to load config '([^']*)'.*", r"expected its keys, not \1"),
    (r"Not a valid subclass of (\w+)", r"expected \1"),
    (r"(expected (?:Sequence|tuple), not )([^\[{].*)", r"\1\2; write [\2]"),
    (r'Parser key "([\w.]+)":(?: ([\w.]+):(?= ))?', lambda found: ".".join(filter(None, found.groups())) + ":"),
)


class Parser(LightningArgumentParser):
    """A parser whose errors are one line, and that takes no abbreviation of a key."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def validate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> None:
        """Also of null, which jsonargparse lets pass as any type."""
        super().validate(namespace, *args, **kwargs)
        for action in self._actions:
            if action.default is not None and namespace.get(action.dest, action.default) is None:
                self._check_value_key(action, None, action.dest, namespace)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        denied = re.search(r"Importing '([^']+)' is not allowed", message)
        if denied:
            check_class_paths({"class_path": denied[1]})
        required = re.search(r"arguments are required: (\w+)\.(\S+\w)(.*\.model)?", message)
        if required:
            command, key, model = required.groups()
            if key != "model" and not model:
                raise UserError(f"{command} needs --{key}") from ex
            run = "" if command == "fit" else " or the folder of a run"
            raise UserError(f"{command} needs --config CONFIG{run}; `vitlit config` lists the shipped ones") from ex
        text = plain(message)
        parser = getattr(ex, "subcommand_parser", self)
        raise UserError(text + parser.suggestion(text)) from ex

    def suggestion(self, text: str) -> str:
        """The nearest name to the one that a message calls unknown, within the object that it names."""
        pattern = r"(?:^([\w.]+): )?no (key|class|attribute) '?([\w.]+?)(?:\.(?:class_path|init_args).*)?'?$"
        found = re.search(pattern, text)
        if not found:
            return ""
        owner, kind, wrong = found.groups()
        names = self.keys(owner or "", wrong) if kind == "key" else self.classes()
        if "preset" in names and wrong in Size._fields:
            return ", which follows from preset: give --model.vit.preset, or --model.vit vitlit.ViT and all its keys"
        near = get_close_matches(wrong, names, 1, 0.7) or get_close_matches(wrong.rpartition(".")[2], names, 1, 0.7)
        return f"; did you mean {names[near[0]]}?" if near and names[near[0]] != wrong else ""

    def keys(self, owner: str, wrong: str) -> dict[str, str]:
        """The keys beside a wrong one by their last parts; without an owner or a group, all, by their whole names too.

        Of an owner that is a class, whose keys its own parser has, there are none.
        """
        keys = [action.dest for action in self._actions if action.dest and action.dest != "help"]
        group = ".".join(filter(None, (owner, wrong.rpartition(".")[0])))
        beside = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == group}
        if owner or (group and beside):
            return beside
        return {key.rpartition(".")[2]: key for key in keys} | {key: key for key in keys}

    @staticmethod
    def classes() -> dict[str, str]:
        """The classes that a config usually names."""
        names = [name for module in (optim, callbacks, averaging, augment) for name in dir(module)]
        names += [c.__name__ for base in (Stage, Objective) for c in base.__subclasses__()]
        return {name: name for name in names if name[0].isupper()}


def plain(message: str) -> str:
    """A message of jsonargparse's on one line, without what only its authors understand."""
    given = re.search(r"Given value: (.+)", message)
    lines = [line.strip(" -") for line in message.splitlines()]
    lines = list(dict.fromkeys(line for line in lines if line and not line.startswith(NOISE)))
    telling = [line for line in lines if not line.startswith("Not a valid subclass of")]  # what a list is, for one
    lines = telling if len(telling) > 1 else lines[:2]
    choices = [line.removeprefix("Expected a ") for line in lines if line.startswith("Expected a ")]
    unknown = [choice.rsplit(" ", 1)[-1] for choice in choices if choice.startswith("dot import path string")]
    if given or unknown:
        lines = [line for line in lines if not line.startswith("Expected a ")]
        if unknown and not (given and given[1] == unknown[0] and len(choices) > 1):
            lines.append(f"no class {unknown[0]}")
        elif given and choices:
            choices = ["class" if choice.startswith("dot import path string") else choice for choice in choices]
            lines.append(f"expected {' or '.join(choices)}, not {given[1]}")
    text = " ".join(" ".join(lines).split())
    for pattern, words in WORDING:
        text = re.sub(pattern, words, text)
    return text if len(text) < LONGEST else f"{text[:LONGEST]} ..."
