"""What `vitlit fit`, `validate` and `test` print and record: as a training begins, and at the end."""

import json
import shlex
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from rich.console import Console
from rich.markup import escape

from vitlit.cli.arguments import CommandLine
from vitlit.data import ImageFolderData
from vitlit.doctor import origin
from vitlit.errors import UserError
from vitlit.files import from_here, write_text
from vitlit.loggers import CSV, Wandb
from vitlit.optim import table
from vitlit.prepare.sources import DIGITS
from vitlit.run.checkpoints import Best
from vitlit.run.folder import RunFolder
from vitlit.run.history import Measured, in_words
from vitlit.stages import Pretrain, Stage
from vitlit.weights.checkpoint import open_checkpoint


class Begin(Callback):
    """All checks have passed: print what is trained, log the `resolved` config, and record the run, if one is kept."""

    def __init__(
        self, line: CommandLine, folder: RunFolder | None, config: dict[str, Any], resolved: dict[str, Any]
    ) -> None:
        self.line, self.folder, self.config, self.resolved = line, folder, config, resolved
        self.begun = False  # on this rank

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.line.launched = True
        data, vit = trainer.datamodule, cast(Stage, pl_module).vit  # type: ignore[attr-defined]
        if not trainer.is_global_zero:
            return
        labels = f"{len(data.classes)} classes" if data.classes else "numbers" if data.numbers else "no labels"
        parameters = sum(p.numel() for p in vit.parameters())
        images = {split: len(data.split(split)) for split in ("train", "val")}
        network = f"ViT with {parameters:,} parameters, {vit.grid[0]} x {vit.grid[1]} patches"
        counts = "{train:,} training and {val:,} validation images".format(**images)
        print(f"{network}; {counts}, {labels}; {data.epoch}", flush=True)
        if self.folder is not None:
            self.folder.begin(self.config)
            kept = next(each for each in trainer.checkpoint_callbacks if isinstance(each, Best))
            about = {"images": images, "labels": labels, "parameters": parameters}
            device = pl_module.device
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
            about["devices"] = f"{trainer.world_size} x {name}, {trainer.precision}"
            self.folder.command_begins(origin(self.line.words) | about | {"monitor": kept.monitor, "mode": kept.mode})
            self.begun = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.folder is None or not trainer.is_global_zero:
            return
        print(table(trainer.optimizers[0]), flush=True)
        for logger in trainer.loggers:
            if isinstance(logger, CSV):
                logger.cut(trainer.global_step - 1)  # the rows after it will be logged again; Lightning counts from 0
            if hasattr(logger, "log_config"):
                logger.log_config(self.resolved)
            if isinstance(logger, Wandb):
                self.folder.keep_wandb_id(str(logger.version))
                logger.log_classes(trainer.datamodule.classes)  # type: ignore[attr-defined]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.folder is not None and self.begun:
            ended = str(exception) or type(exception).__name__
            with suppress(OSError, UserError):  # the exception says more
                self.folder.command_ends(trainer.global_step, self.line.seconds(), ended)


def print_summary(trainer: Trainer, folder: RunFolder, data: ImageFolderData, best: Measured | None) -> None:
    """Print steps, best metric, checkpoint, W&B run and the next command, and close the W&B run."""
    rows = {"steps": f"{trainer.global_step:,}"}
    if (ended := ending(trainer)) != COMPLETE:
        rows["ended"] = ended
    last = best is not None and best.metric == "step"
    if best and not last:
        rows[f"best {best.metric}"] = f"{in_words(best.metric, best.value)}, after step {best.step:,}"
    if folder.best.is_file():
        rows["checkpoint"] = f"{folder.best}{' (the last: no metric tells which is best)' if last else ''}"
    else:
        validated = any(name.startswith("val/") for name in trainer.callback_metrics)
        why = "the best is of the run that it branched off" if validated else "nothing was validated, so none is best"
        rows["checkpoint"] = f"{folder.last} ({why})"
    if (sheet := folder.path / "mistakes.png").is_file():
        rows["mistakes"] = f"{sheet}, mistakes.csv and confusion.csv"
    if (report := folder.path / "report.html").is_file():
        rows["report"] = str(report)
    for logger in trainer.loggers:
        if isinstance(logger, Wandb):
            rows["W&B"] = logger.closing_line() or "disabled"
            logger.close()
    pretrained = isinstance(trainer.lightning_module, Pretrain)
    rows["next"] = shlex.join([program(), *(finetune(folder, data) if pretrained else predict(folder, data))])
    console = Console(soft_wrap=True, highlight=False)  # a command must stay on one line
    console.print(f"\n[bold]{escape(str(folder.path))} is complete[/bold]")
    for name, text in rows.items():
        console.print(f"  [dim]{name:<14}[/dim] {escape(text)}")


COMPLETE = "complete"


def ending(trainer: Trainer) -> str:
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    for stop in callbacks:
        # A run that was made longer remembers the early stop before.
        why = stop.stopping_reason_message if isinstance(stop, EarlyStopping) else None
        if why and trainer.current_epoch - stop.stopped_epoch <= 1:
            return f"early, in epoch {stop.stopped_epoch + 1}: {why.removesuffix(' Signaling Trainer to stop.')}"
    return COMPLETE


def program() -> str:
    """What a shell calls vitlit: its name, or its path where that is not found."""
    if shutil.which("vitlit"):
        return "vitlit"
    return from_here(Path(sys.executable).with_name("vitlit"))


def predict(folder: RunFolder, data: ImageFolderData) -> list[str]:
    """The command that classifies images, those of validation where they are in a folder."""
    root = Path(data.splits.root)
    photos = next((str(place) for place in (root / "val", root) if place.is_dir()), "PHOTOS")
    return ["predict", str(folder.path), photos, "--out", "predictions.csv"]


def finetune(folder: RunFolder, data: ImageFolderData) -> list[str]:
    """The command that finetunes what was pretrained, on the same data if it has labels."""
    splits, sides = data.splits, data.preprocess.image_size
    recipe = "finetune" if splits.root == DIGITS else "recipes/finetune_folder"
    command = ["fit", "--config", recipe, "--model.init_from", str(folder.path)]
    if splits.root != DIGITS:
        root = splits.root if splits.classes else "LABELLED_FOLDER"
        command += ["--data.root", root, "--run.name", f"{folder.name}-finetuned"]
    if (splits.root, sides) != (DIGITS, (32, 32)):  # configs/finetune.yaml is for the digits of configs/pretrain.yaml
        size = str(sides[0]) if sides[0] == sides[1] else f"[{sides[0]},{sides[1]}]"
        command += ["--data.image_size", size]
        if data.batch_size < 64:  # the recipe's may be more than there are images
            command += ["--data.batch_size", str(data.batch_size)]
    if splits.manifest:
        command += ["--data.manifest", splits.manifest]
    if splits.holdout:
        command += ["--data.holdout", str(splits.holdout)]
    return command


class Evaluated(Callback):
    """Say what `validate` or `test` evaluated, and write it and the metrics to RUN/validate.json or test.json."""

    def __init__(self, command: str, run: Path, checkpoint: str, words: list[str]) -> None:
        split = "val" if command == "validate" else "test"
        self.out, self.split = run / f"{command}.json", split
        self.about: dict[str, Any] = {"run": str(run), "checkpoint": checkpoint, "split": split}
        self.words, self.images = words, 0

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.images += len(batch.labels)

    on_test_batch_end: Any = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        counted = torch.tensor(float(self.images), device=pl_module.device)
        images = int(trainer.strategy.reduce(counted, reduce_op="sum"))
        if not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.about |= {"step": open_checkpoint(Path(self.about["checkpoint"]))["global_step"]}
        self.about |= {"root": data.splits.root, "images": images, **origin(self.words)}
        self.about["metrics"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        try:
            write_text(self.out, json.dumps(self.about, indent=2) + "\n")
        except OSError as error:
            print(f"vitlit: warning: cannot write {self.out}: {error.strerror}", flush=True)
        measured = f"{from_here(self.about['checkpoint'])} (step {self.about['step']:,}) on the {self.split} split of"
        where = f"{data.splits.root}, {images:,} images; the numbers are in {from_here(self.out)}"
        print(f"{measured} {where}", flush=True)

    on_test_end = on_validation_end
