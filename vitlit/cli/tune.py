"""`vitlit tune`: how much of the weights to train, and at which learning rate, by successive halving (1502.07943)."""

import ctypes
import itertools
import json
import math
import re
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

from vitlit.cli.configs import find_config
from vitlit.cli.runs import show
from vitlit.data.folder import parse_share
from vitlit.data.splits import Splits
from vitlit.data.workers import STOP_SIGNALS
from vitlit.errors import CommandParser, UserError, check_range
from vitlit.files import write_csv, write_text, writing
from vitlit.run.config import read_config
from vitlit.run.folder import LOCK, flatten
from vitlit.run.interrupt import AGAIN
from vitlit.run.lock import take
from vitlit.stages.metrics import direction
from vitlit.weights import locate

HELP = """\
Search, for a config of Finetune, how much of the weights to train and at which learning rate: everything, the last two
blocks, LoRA or a linear probe, each at three rates. All begin with a ninth of the config's epochs, the best third goes
on to a third of them, its best third to all, and the config as it is in any case. They learn from a part of train and
are compared on the rest, --holdout. Then the best trains on all of train, as OUT/best. Each is an ordinary run in OUT.
Killed, the same command continues.

Further arguments are those of vitlit fit, such as --data.image_size 224 or --trainer.max_epochs 10.
"""
# The flags of each way, and its middle learning rate as a multiple of the config's, which is for training everything.
WAYS: dict[str, tuple[list[str], float]] = {
    "all": ([], 1.0),
    "lora": (["--model.lora.rank=8", "--model.groups.layer_decay=1"], 5.0),
    "last": (["--model.last_blocks=2"], 1.5),
    "probe": (["--model.freeze=true"], 50.0),
}
RATES = (1.0, 3.0, 1 / 3)
BEST = "best"  # the run that trains on all of train
KEPT = 3  # a third goes on, for three times as many epochs
COLUMNS = ("run", "trains", "lr", "epochs", "value", "minutes")


class Trial(NamedTuple):
    way: str
    lr: float

    @property
    def name(self) -> str:
        return f"{self.way}-{self.lr:.2g}"

    @property
    def flags(self) -> list[str]:
        return [*WAYS[self.way][0], f"--model.optimizer.init_args.lr={self.lr:.6g}"]


def run(arguments: list[str]) -> int:
    parser = CommandParser("vitlit tune", HELP)
    parser.add_argument("--config", required=True, metavar="CONFIG", help="such as recipes/finetune_folder")
    parser.add_argument("--root", required=True, metavar="ROOT", help="as --data.root")
    parser.add_argument("--budget", required=True, metavar="TIME", help="of all trainings: 30m, 2h or 1h30m")
    parser.add_argument("--holdout", default="20%", metavar="SHARE", help="of train, to compare on; default 20%%")
    parser.add_argument("--ways", default=",".join(WAYS), metavar="LIST", help=f"some of {','.join(WAYS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/tune"), metavar="OUT", help="default runs/tune")
    given, fit = parser.parse_known_args(arguments or ["--help"])
    if not parse_share(given.holdout):
        parser.error("--holdout is 0: trials compared on val would choose on what they are measured on; give a share")
    search = Search(given, fit)
    with writing(given.out, "give another --out"):
        given.out.mkdir(parents=True, exist_ok=True)
    lock = take(given.out / LOCK, f"the search {given.out}")  # noqa: F841  # held as long as it is referred to
    for trial, epochs in search:
        if code := search.train(trial.name, [*trial.flags, f"--data.holdout={given.holdout}"], trial, epochs):
            return code
    final = search.ranked(search.longest)[0]
    if code := search.train(BEST, final.flags, final, search.epochs):
        return code
    search.print(final)
    return 0


class Search:
    """The trials of a search, what they came to, kept in OUT/tune.json, and what is left of the budget."""

    def __init__(self, given: Namespace, fit: list[str]) -> None:
        config = read_config(str(find_config(given.config)))
        self.given, self.fit, self.file = given, fit, given.out / "tune.json"
        self.budget = minutes(given.budget)
        if not str(config["model"].get("class_path", "")).endswith("Finetune"):
            raise UserError(f"{given.config} is no config of Finetune, whose ways of training are searched")
        set_by = settings(config, fit)
        self.epochs = set_by.epochs
        Splits(given.root, 0.0, set_by.manifest)["val"]  # or the last training would fail
        locate(set_by.init_from)
        check_range("vitlit tune", 1, max_epochs=self.epochs)
        ways = given.ways.split(",")
        if wrong := set(ways) - WAYS.keys():
            raise UserError(f"--ways has {min(wrong)!r}; give some of {','.join(WAYS)}")
        self.own = Trial("all", set_by.lr)
        self.trials = [Trial(way, set_by.lr * factor * WAYS[way][1]) for factor, way in itertools.product(RATES, ways)]
        search = [given.config, given.root, given.holdout, given.ways, *fit]
        self.found: dict[str, Any] = {"settings": search, "trials": {}}
        if self.file.is_file():
            self.found = json.loads(self.file.read_text())
            if apart := set(self.found["settings"]) ^ set(search):
                others = ", ".join(sorted(apart))
                raise UserError(f"{given.out} holds a search with other settings ({others}); give another --out")

    def __iter__(self) -> Any:
        """Each trial, and for how many epochs it is to train, as long as the budget holds."""
        field = self.trials
        lengths = dict.fromkeys(math.ceil(self.epochs / share) for share in (KEPT**2, KEPT, 1))
        for epochs in lengths:
            for trial in field:
                if str(epochs) in self.found["trials"].get(trial.name, {}):
                    continue
                if self.spent + self.cost(trial, epochs) + self.cost(trial, self.epochs, final=True) > self.budget:
                    print(f"the budget ends the search before {trial.name} trains for {epochs} epochs", flush=True)
                    return
                yield trial, epochs
            ranked = self.ranked(epochs)
            kept = ranked[: math.ceil(len(field) / KEPT)]
            field = [trial for trial in ranked if trial in kept or trial == self.own]

    @property
    def spent(self) -> float:
        """Minutes of all trainings so far."""
        return sum(each["minutes"] for trial in self.found["trials"].values() for each in trial.values())

    def cost(self, trial: Trial, epochs: int, final: bool = False) -> float:
        """The minutes that a trial will take, by what an epoch of its way took, or of any; 0 while none has trained."""
        taken = [
            (each["minutes"] / each["trained"], name.startswith(trial.way))
            for name, lengths in self.found["trials"].items()
            for each in lengths.values()
        ]
        own = [time for time, same in taken if same] or [time for time, _ in taken]
        before = 0 if final else max([0, *map(int, self.found["trials"].get(trial.name, {}))])
        return max(own, default=0.0) * (epochs - before)

    def train(self, name: str, flags: list[str], trial: Trial, epochs: int) -> int:
        """Train a run to so many epochs and keep its result; the exit code of one that was stopped."""
        if str(epochs) in self.found["trials"].get(name, {}):
            return 0
        where = [f"--data.root={self.given.root}", f"--run.root={self.given.out}", f"--run.name={name}"]
        where.append(f"--trainer.max_epochs={epochs}")
        log, out = self.given.out / f"{name}.log", self.given.out / name
        print(f"{name}, epochs: {epochs}; {self.spent:.0f} of {self.budget:.0f} minutes are spent", flush=True)
        page = f"--run.report={'true' if name == BEST else 'false'}"
        code = fit(["--config", self.given.config, page, *self.fit, *flags, *where], log)
        errors = re.findall(r"^vitlit: error: (.*)", log.read_text(), re.MULTILINE)
        diverged = code == 2 and " is not finite" in "".join(errors)
        if code and not diverged:
            if code < 0 or code in (AGAIN, 128 + signal.SIGINT, 128 + signal.SIGTERM):
                print(f"stopped while {name} trained; the same command continues", flush=True)
                return 128 - code if code < 0 else code
            raise UserError(f"{name}: {errors[-1] if errors else f'it ended with code {code}'} ({log})")
        record = json.loads((out / "run.json").read_text())
        trained = self.found["trials"].setdefault(name, {})
        took = sum(each.get("seconds", 0) for each in record["commands"]) / 60
        found: dict[str, Any] = {"minutes": took - sum(each["minutes"] for each in trained.values())}
        found |= {"trained": epochs - max([0, *map(int, trained)]), "way": trial.way, "lr": trial.lr}
        found |= {"metric": None, "value": None} if diverged else record["result"]["best"]
        if "value" not in found:
            raise UserError(f"{name} was not validated, so that it cannot be compared; see {log}")
        trained[str(epochs)] = found
        write_text(self.file, json.dumps(self.found, indent=1))
        return 0

    @property
    def longest(self) -> int:
        return max(int(epochs) for trial in self.trials for epochs in self.found["trials"].get(trial.name, {}))

    def ranked(self, epochs: int) -> list[Trial]:
        """The trials that trained so long without diverging, best first; UserError if there is none."""
        found = {trial: self.found["trials"].get(trial.name, {}).get(str(epochs)) for trial in self.trials}
        values = {trial: each["value"] for trial, each in found.items() if each and each["value"] is not None}
        if not values:
            raise UserError(f"no trial ended {epochs} epochs with finite numbers; give a config with a lower rate")
        highest = direction(next(each["metric"] for each in found.values() if each and each["metric"])) == "max"
        return sorted(values, key=lambda trial: values[trial], reverse=highest)

    def print(self, final: Trial) -> None:
        rows = []
        for name, lengths in self.found["trials"].items():
            last, took = list(lengths.values())[-1], sum(each["minutes"] for each in lengths.values())
            rows.append((name, last["way"], last["lr"], max(map(int, lengths)), last["value"], took))
        rows.sort(key=lambda row: (row[0] == BEST, row[3], row[4] is not None), reverse=True)
        write_csv(self.given.out / "tune.csv", COLUMNS, rows)
        shown = [
            (name, way, f"{lr:.2g}", epochs, "diverged" if value is None else f"{value:.4f}", f"{took:.1f}")
            for name, way, lr, epochs, value, took in rows
        ]
        show("", COLUMNS, shown)
        print(f"{self.given.out / BEST} is {final.name}, trained on all of train and measured on val")


def fit(arguments: list[str], log: Path) -> int:
    """`vitlit fit` in a process of its own, to which signals are passed on; its exit code."""
    with log.open("w") as file:
        command = [sys.executable, "-m", "vitlit", "fit", *arguments]
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, preexec_fn=end_with_parent)

        def passed_on(number: int, frame: Any) -> None:
            if number != signal.SIGINT:  # which a terminal sends to both
                child.send_signal(number)

        before = {number: signal.signal(number, passed_on) for number in STOP_SIGNALS}
        try:
            return child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def end_with_parent() -> None:
    """Let this process save and end if its parent is killed, or it would train on and hold the run."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def minutes(budget: str) -> float:
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?", budget)
    if not found or not any(int(part or 0) for part in found.groups()):
        raise UserError(f"--budget {budget!r} is not a time; give it as 30m, 2h or 1h30m")
    return 60 * int(found[1] or 0) + int(found[2] or 0)


# The settings of vitlit fit that the search has to know; a flag may leave init_args out.
SETTINGS = {"lr": "model.init_args.optimizer.init_args.lr", "epochs": "trainer.max_epochs"}
SETTINGS |= {"init_from": "model.init_args.init_from", "manifest": "data.manifest"}


def settings(config: dict[str, Any], fit: list[str]) -> Namespace:
    """What the search has to know, of flags of vitlit fit if they are given, else of the config."""
    parser, flat = CommandParser("vitlit tune", HELP), flatten(config)
    kinds: dict[str, Any] = {"lr": float, "epochs": int, "init_from": str}
    for name, key in SETTINGS.items():
        flags = dict.fromkeys((f"--{key.replace('.init_args', '', 1)}", f"--{key.replace('.init_args', '')}"))
        required = name in kinds and key not in flat
        parser.add_argument(*flags, dest=name, type=kinds.get(name, str), default=flat.get(key), required=required)
    return parser.parse_known_args(fit)[0]
