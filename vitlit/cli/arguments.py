"""The arguments of fit, validate, test and predict: their order and their error messages."""

import inspect
import re
import time
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch import callbacks
from lightning.pytorch.cli import LightningArgumentParser
from torch import optim

from vitlit import objectives
from vitlit.callbacks import ema as averaging
from vitlit.cli.configs import find_config
from vitlit.data import augment
from vitlit.errors import UserError
from vitlit.files import expand
from vitlit.model import Size
from vitlit.objectives import Objective
from vitlit.run.config import read_config, told_to_trust, with_public_paths
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
        check_class_paths(contents, next(filter(None, map(told_to_trust, paths)), ""))
        trainers = [dict(content["trainer"]) for content in contents if isinstance(content.get("trainer"), dict)]
        wandb = "--trainer.logger=vitlit.loggers.Wandb"  # the default, whose options may follow
        flags = [wandb if flag.lower() == "--trainer.logger=true" else flag for flag in flags]
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
        """How long ago the command was given."""
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
        ours = isinstance(error, UserError) or type(error).__name__ == "MisconfigurationException"
        if ours or kind.__module__.partition(".")[0] not in ("torch", "torchvision", "torchmetrics", "lightning"):
            raise
        raise UserError(f"{kind.__name__}: {error}") from error


class Parser(LightningArgumentParser):
    """A parser whose errors are one line, and that does not accept abbreviated keys."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        if "--seed_everything" in args:  # Lightning's true is 0, and not any seed
            kwargs |= {"type": int, "help": "The seed of every random draw, from 0 to 4294967295."}
        return super().add_argument(*args, **kwargs)

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
        for name, remedy in INSTEAD.items():
            if re.search(rf"are required(?s:.*)class_path[ =]'[\w.]+\.{name}'|value: (?:[\w.]+\.)?{name}$", message):
                raise UserError(f"{name}: {remedy}") from ex
        if unknown := UNKNOWN_KEY.match(message):
            key, parser = ".".join(filter(None, unknown.groups())), getattr(ex, "subcommand_parser", self)
            raise UserError("no key {}{}".format(*parser.nearest(key))) from ex
        raise UserError(shortened(message, getattr(ex, "subcommand_parser", self).get_defaults())) from ex

    def nearest(self, wrong: str) -> tuple[str, str]:
        """The wrong part of a key, and words that suggest the nearest of its group, or of any if it has none."""
        keys = list(self.get_defaults().keys())
        if wrong == "preset":
            remedy = "; write class_path: vitlit.ViT.from_preset beside it, or --model.vit.preset on the command line"
            return wrong, remedy
        if "preset" in keys and wrong in Size._fields:
            return wrong, ", which follows from preset: leave it out, or give --model.vit vitlit.ViT and all its keys"
        if elsewhere := ELSEWHERE.get(wrong.replace("-", "_")):
            return wrong, f"; did you mean {elsewhere}?"
        groups = {key.partition(".")[0] for key in keys}
        if (first := wrong.partition(".")[0]) not in groups and get_close_matches(first, groups, 1, 0.7):
            return first, suggestion(first, {group: group for group in groups})
        group, _, name = wrong.rpartition(".")
        beside = [key for key in keys if key.rpartition(".")[0] == group] if group else keys
        return wrong, suggestion(name, {key.rpartition(".")[2]: key for key in beside or keys})


# The keys of what other trainers call by these words.
ELSEWHERE = {
    **dict.fromkeys(("lr", "learning_rate"), "model.optimizer.lr"),
    **dict.fromkeys(("wd", "weight_decay"), "model.optimizer.weight_decay"),
    **dict.fromkeys(("warmup_steps", "warmup_epochs"), "model.schedule.warmup"),
    **dict.fromkeys(("epochs", "num_epochs"), "trainer.max_epochs"),
    **dict.fromkeys(("output", "output_dir", "out_dir"), "run.root"),
    **dict.fromkeys(("gpus", "num_gpus"), "trainer.devices"),
    **dict.fromkeys(("pretrained", "weights", "finetune"), "model.init_from"),
    "workers": "data.num_workers",
    "amp": "trainer.precision",
    "resume": "ckpt_path",
    "data_path": "data.root",
}
# What to use instead of classes that a config cannot make.
INSTEAD = {
    "ThroughputMonitor": "train/images_per_second and train/data_wait are logged in any case; leave it out",
    "CSVLogger": "metrics.csv is written in any case; leave it out, or give it a save_dir of its own",
    "CSV": "metrics.csv is written in any case; leave it out (trainer.logger false for no other logger)",
    "Logger": "a base class, which logs nothing; name one derived from it, or vitlit.loggers.Wandb",
    "LitLogger": "not a logger of lightning.pytorch without the package litlogger; install it, or use another",
}


def suggestion(wrong: str, names: dict[str, str]) -> str:
    """Words that suggest the nearest of these names, if one is near."""
    lower = {name.lower(): name for name in names}
    near = [lower[name] for name in get_close_matches(wrong.lower(), lower, 1, 0.7)]
    return f"; did you mean {names[near[0]]}?" if near and names[near[0]] != wrong else ""


# The objectives that a config can name.
OBJECTIVES = [c.__name__ for c in vars(objectives).values() if inspect.isclass(c) and issubclass(c, Objective)]
OBJECTIVES.remove(Objective.__name__)


def class_names() -> dict[str, str]:
    """The classes that a config usually names."""
    # The modules are imported for jsonargparse too, which finds only classes that are loaded.
    names = [name for module in (optim, callbacks, averaging, augment) for name in dir(module)]
    names += [*OBJECTIVES, *(stage.__name__ for stage in Stage.__subclasses__())]
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


def shortened(message: str, defaults: Namespace) -> str:
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
        nullable = value == "None" and "NoneType" in message  # None is YAML's word for a text
        shown = (
            value if nullable else {"None": "null", "True": "true", "False": "false"}.get(value, value or repr(value))
        )
        text += f", not {shown}"
        text += "; write null" if nullable else ""
        if choices[:1] in (["Sequence"], ["tuple"]) and not value.startswith(("[", "{")):
            default = defaults.get(key[1]) if key else None
            example = list(default) if isinstance(default, tuple | list) else []
            text += f"; write a list, such as {example}" if len(example) > 1 else f"; write [{value}]"
    if unknown := re.search(r"(?:expected class, not |has no attribute ')(?:[\w.]+\.)?(\w+)'?$", text):
        text += suggestion(unknown[1], class_names())
        if "did you mean" not in text and key and key[1].endswith("objective"):
            text += f"; give one of {', '.join(OBJECTIVES)}"
    if key:
        text = key[1] + ("." if re.match(r"[\w.]+: ", text) else ": ") + text
    text = " ".join(text.split())
    return text if len(text) < LONGEST else f"{text[:LONGEST]} ..."
