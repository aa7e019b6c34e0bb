"""The folder of a run, `ROOT/NAME/`, and whether a command begins, continues or has finished the run."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from vitlit.errors import UserError, check_range
from vitlit.files import check_archive, expand, write_text, writing
from vitlit.run.config import read_config
from vitlit.run.lock import take

# Settings that change how a run is computed, not what: they may differ when it continues.
FREE = (
    *("data.cache", "data.micro_batch", "data.num_workers", "data.on_bad_image", "data.pin_memory", "data.prefetch"),
    *("model.init_args.compile", "run.keep_every", "run.name", "run.peak_tflops", "run.report", "run.root"),
    *("run.save_minutes", "run.time_limit", "trainer.accelerator", "trainer.devices", "trainer.enable_*"),
    *("trainer.logger*", "trainer.num_nodes", "trainer.num_sanity_val_steps", "trainer.profiler", "trainer.strategy*"),
)
MAX_NAME_BYTES = 200  # a file's name may have 255 bytes, and W&B's are longer than the run's
LOCK = ".lock"
LOGS = {"tensorboard", "wandb"}  # what loggers leave of a run that is refused before it begins
LONGER = ("trainer.max_epochs", "trainer.max_steps")


@dataclass
class RunOptions:
    """Where a run is kept, and when it is saved.

    Args:
        name: the run's folder below the root; by default the config's name.
        root: the folder of all runs.
        overwrite: delete the run's folder and begin again.
        monitor: the metric of best.ckpt, which has its highest value, or a loss's lowest; by default val/top1,
            val/map if images have several classes, or val/knn of an objective that predicts no classes; the last of
            DINO and LeJEPA where that is not measured.
        save_minutes: minutes between checkpoints within an epoch; the end of an epoch and a signal also save one.
        keep_every: optimiser steps between checkpoints that are kept for good, as step-N.ckpt.
        time_limit: of this command: HH:MM:SS, D:HH:MM:SS or seconds. Then training saves and exits with code 75, and
            the same command continues it.
        peak_tflops: of one device, for train/mfu: its dense peak in the run's precision; by default, for many GPUs,
            that of NVIDIA's data sheet.
        report: whether training ends by writing the run's report.html, the page of `vitlit report`.
    """

    name: str | None = None
    root: str = "runs"
    overwrite: bool = False
    monitor: str | None = None
    save_minutes: float = 15.0
    keep_every: int | None = None
    time_limit: int | str | None = None
    peak_tflops: float | None = None
    report: bool = True

    def __post_init__(self) -> None:
        check_range("run", 0, save_minutes=self.save_minutes)
        check_range("run", 1, keep_every=1 if self.keep_every is None else self.keep_every)
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise UserError(f"run.peak_tflops {self.peak_tflops} is not above 0")


class Decision(NamedTuple):
    """What to do with a run, the checkpoint to continue it from, and a digest of its config."""

    action: Literal["begin", "continue", "finished", "refused"]
    checkpoint: str = ""
    config: str = ""


class RunFolder:
    """The folder of a run, by default named by its config; in a W&B sweep also by its trial, unless `exact`."""

    def __init__(self, options: RunOptions, config: str | None, exact: bool = False) -> None:
        name = Path(config or "run").stem if options.name is None else options.name
        trial = f"-{os.environ.get('WANDB_RUN_ID')}"
        if "WANDB_SWEEP_ID" in os.environ and not exact and not name.endswith(trial):
            name += trial
        if name in ("", ".", "..") or {"/", "\0"} & set(name) or len(os.fsencode(name)) > MAX_NAME_BYTES:
            raise UserError(f"run.name {name!r} is not a folder name; give run.root for the folder above it")
        self.name, self.options = name, options
        self.path = Path(expand(options.root)) / name
        self.config = self.path / "config.yaml"
        self.marker = self.path / "finished.json"
        checkpoints = self.path / "checkpoints"
        self.last, self.previous, self.best = (checkpoints / f"{which}.ckpt" for which in ("last", "previous", "best"))
        self.commands = self.path / "run.json"  # what worked on the run, when, where and for how long, and its result
        self._wandb_id = self.path / "wandb" / "run-id"

    def decide(
        self, config: dict[str, Any], completed: Callable[[dict[str, Any]], dict[str, Any]] = lambda before: before
    ) -> Decision:
        """Compare a config with the folder's, `completed` if it is an old one; UserError if they differ."""
        if not self.path.exists() or (self.path.is_dir() and {each.name for each in self._content()} <= LOGS):
            return Decision("begin")
        if not self.config.is_file():
            raise UserError(f"{self.path} has no config.yaml, so it is no run: restore it, or give another --run.name")
        if self.options.overwrite:
            return Decision("begin")
        finished = self.marker.is_file()
        if not finished and not self.checkpoints():
            if (self.path / "metrics.csv").is_file():
                print(f"{self.path} has no checkpoint to continue from, so it begins again", flush=True)
            return Decision("begin")
        stored, after = read_config(self.config), settings(config)
        before = settings(stored)
        if after.keys() - before.keys():
            before = settings(completed(stored))
        differing = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
        if not set(differing) <= set(LONGER) or (differing and not finished):
            listed = ", ".join(f"{key} {before.get(key)} -> {after.get(key)}" for key in differing[:8])
            more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
            raise UserError(
                f"the run {self.path} was made with another config ({listed}{more}); "
                "give another --run.name, or --run.overwrite true to begin again"
            )
        if finished and not any(longer(before.get(key), after.get(key)) for key in LONGER):
            return Decision("finished")
        return Decision("continue", str(self.newest()))

    def checkpoints(self) -> list[Path]:
        """The checkpoints that the run can continue from, the newest first."""
        kept = [path for path in self.last.parent.glob("step-*.ckpt") if path.stem[5:].isdecimal()]
        kept.sort(key=lambda path: -int(path.stem[5:]))
        return [path for path in (self.last, self.previous, *kept) if path.is_file()]

    def newest(self) -> Path:
        """The newest checkpoint that is not damaged, with a warning if it is not last.ckpt."""
        wrong = [] if self.last.is_file() else [f"{self.last} is missing"]
        for path in self.checkpoints():
            try:
                check_archive(path)
            except UserError as error:
                wrong.append(str(error))
                continue
            if wrong:
                print(f"vitlit: warning: {'; '.join(wrong)}; {path}, which is older, takes its place", flush=True)
            return path
        raise UserError(f"{'; '.join(wrong)}; --run.overwrite true begins again")

    def begin(self, config: dict[str, Any]) -> None:
        """Lock the folder, empty it if the run is overwritten, and write the config into it."""
        with writing(self.path, "give another --run.root"):
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = take(self.path / LOCK, f"the run {self.path}")
            if self.options.overwrite:
                for path in self._content():
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            self.marker.unlink(missing_ok=True)
            write_text(self.config, yaml.safe_dump(config, sort_keys=False))

    def wandb_id(self) -> str | None:
        return self._wandb_id.read_text() if self._wandb_id.is_file() else None

    def keep_wandb_id(self, name: str) -> None:
        self._wandb_id.parent.mkdir(exist_ok=True)
        write_text(self._wandb_id, name)

    def finish(self, step: int) -> None:
        """Mark the run as complete. Nothing continues from the checkpoint before the last any more."""
        self.previous.unlink(missing_ok=True)
        write_text(self.marker, json.dumps({"step": step}) + "\n")

    def finished_at(self) -> int:
        return int(json.loads(self.marker.read_text())["step"])

    def command_begins(self, command: dict[str, Any]) -> None:
        """Add a command to run.json. One that is killed stays without `step`, `seconds` and `ended`."""
        before = json.loads(self.commands.read_text())["commands"] if self.commands.exists() else []
        write_text(self.commands, json.dumps({"commands": [*before, command]}, indent=2) + "\n")

    def command_ends(self, step: int, seconds: float, ended: str, **result: Any) -> None:
        """Add to run.json how the last command ended, and a complete run's result."""
        commands = json.loads(self.commands.read_text())["commands"]
        commands[-1].update(step=step, seconds=round(seconds, 1), ended=ended)
        total = round(sum(each.get("seconds", 0) for each in commands), 1)
        content = {"commands": commands} | ({"result": {"step": step, "seconds": total, **result}} if result else {})
        write_text(self.commands, json.dumps(content, indent=2) + "\n")

    def _content(self) -> list[Path]:
        """What is in the folder, but for the lock."""
        return [path for path in self.path.iterdir() if not path.name.startswith(LOCK)]


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """The flat keys and values of a config, without those that change how a run is computed."""
    return {key: value for key, value in flatten(config).items() if not any(fnmatchcase(key, free) for free in FREE)}


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; None and empty branches are dropped."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def longer(before: int | None, after: int | None) -> bool:
    """Whether the second limit of training allows more than the first; None and -1 mean no limit."""
    if before in (None, -1):
        return False
    return after in (None, -1) or int(after or 0) > int(before or 0)


def seconds(limit: int | str) -> int:
    """Convert HH:MM:SS, D:HH:MM:SS, SLURM's D-HH:MM:SS or a number of seconds; UserError for anything else."""
    parts = str(limit).replace("-", ":", 1).split(":")
    if not all(part.isdecimal() for part in parts) or len(parts) not in (1, 3, 4) or not any(map(int, parts)):
        raise UserError(f"run.time_limit {limit} is not a time; give HH:MM:SS, D:HH:MM:SS or a number of seconds")
    # YAML reads 1:30:00 as the number 5400.
    return sum(int(part) * unit for part, unit in zip(reversed(parts), (1, 60, 3600, 86400), strict=False))
