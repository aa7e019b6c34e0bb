"""What a training prints and records as it begins, and how it ended if it fails."""

from contextlib import suppress
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from vitlit.cli.arguments import CommandLine
from vitlit.doctor import origin
from vitlit.errors import UserError
from vitlit.loggers import CSV, Wandb
from vitlit.optim import table
from vitlit.run.folder import RunFolder
from vitlit.stages import Stage


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
        print(
            f"ViT with {sum(p.numel() for p in vit.parameters()):,} parameters, {vit.grid[0]} x {vit.grid[1]} patches; "
            f"{len(data.split('train')):,} training and {len(data.split('val')):,} validation images, "
            f"{labels}; {data.epoch}",
            flush=True,
        )
        if self.folder is not None:
            self.folder.begin(self.config)
            self.folder.command_begins(origin(self.line.words))
            self.begun = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.folder is None or not trainer.is_global_zero:
            return
        print(table(trainer.optimizers[0]), flush=True)
        for logger in trainer.loggers:
            if isinstance(logger, CSV):
                logger.cut(trainer.global_step - 1)  # the rows after it will be logged again; Lightning counts from 0
            elif isinstance(logger, Wandb):
                self.folder.keep_wandb_id(str(logger.version))
                logger.log_config(self.resolved)
                logger.log_classes(trainer.datamodule.classes)  # type: ignore[attr-defined]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.folder is not None and self.begun:
            ended = str(exception) or type(exception).__name__
            with suppress(OSError, UserError):  # the exception says more
                self.folder.command_ends(trainer.global_step, self.line.seconds(), ended)
