"""The parser of fit, validate, test and predict: its errors are one line, with the nearest key or class."""

import inspect
import re
from difflib import get_close_matches
from typing import Any, NoReturn

from jsonargparse import Namespace
from jsonargparse.typing import restricted_number_type
from lightning.pytorch import callbacks
from lightning.pytorch.cli import LightningArgumentParser
from torch import optim

from vitlit import objectives
from vitlit.callbacks import ema as averaging
from vitlit.data import augment
from vitlit.errors import UserError
from vitlit.model import Size
from vitlit.objectives import Objective
from vitlit.run.config import check_class_paths
from vitlit.stages import Stage

SEED = restricted_number_type("seed", int, [(">=", 0), ("<", 2**32)])


class Parser(LightningArgumentParser):
    """A parser whose errors are one line, and that does not accept abbreviated keys."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        if "--seed_everything" in args:  # Lightning's true is 0, and not any seed
            kwargs |= {"type": SEED, "help": "The seed of every random draw, from 0 to 4294967295."}
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


def suggestion(wrong: str, names: dict[str, str]) -> str:
    """Words that suggest the nearest of these names, if one is near."""
    lower = {name.lower(): name for name in names}
    near = [lower[name] for name in get_close_matches(wrong.lower(), lower, 1, 0.7)]
    return f"; did you mean {names[near[0]]}?" if near and names[near[0]] != wrong else ""


# The objectives that a config can name.
OBJECTIVES = [c.__name__ for c in vars(objectives).values() if inspect.isclass(c) and issubclass(c, Objective)]
OBJECTIVES.remove(Objective.__name__)


def class_names() -> dict[str, str]:
    # The modules are imported for jsonargparse too, which finds only classes that are loaded.
    names = [name for module in (optim, callbacks, averaging, augment) for name in dir(module)]
    names += [*OBJECTIVES, *(stage.__name__ for stage in Stage.__subclasses__())]
    return {name: name for name in names if name[0].isupper()}


YAML = {"None": "null", "True": "true", "False": "false"}
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
        text += f", not {value if nullable else YAML.get(value, value or repr(value))}"
        text += "; write null" if nullable else ""
        if choices in (["Sequence"], ["tuple"]) and not value.startswith(("[", "{")):
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
