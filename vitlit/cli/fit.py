"""`vitlit fit|validate|test|predict`: the Lightning CLI, told what a run is."""

import logging
import shlex
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace, get_loader, set_loader, set_parsing_settings
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.markup import escape

from vitlit import callbacks
from vitlit.callbacks import ema as averaging
from vitlit.cli.arguments import HELP, CommandLine, Parser, build, check_groups
from vitlit.cli.completion import check_idle, complete, doubts, starting_weights
from vitlit.cli.trainer import Trainer, check_monitors
from vitlit.data import ImageFolderData, augment
from vitlit.data.folder import parse_share
from vitlit.data.splits import Splits
from vitlit.errors import UserError
from vitlit.loggers import CSV, Wandb
from vitlit.prepare import sources
from vitlit.run.checkpoints import Best, Last
from vitlit.run.config import with_public_paths
from vitlit.run.folder import Decision, RunFolder, RunOptions, seconds
from vitlit.run.interrupt import AGAIN, Interrupt, Interrupted, requeue, signals_handled
from vitlit.run.ranks import inherited, rank, share_decision
from vitlit.stages import Pretrain, Stage
from vitlit.stages.record import trusted
from vitlit.weights import locate
from vitlit.weights.checkpoint import open_checkpoint

DIGITS = "data/digits"  # the root that is made where it is missing

QUIET = (
    r".*LeafSpec.*",  # lightning 2.6 with torch 2.15
    r".*does not have many workers.*",
    r".*smaller than the logging interval.*",
    r".*exists and is not empty.*",
    r".*could not find the monitored key.*",  # it is known, so nothing was validated, and the summary says so
    r".*The dirpath has changed.*",  # a moved run
    r".*callbacks used to create the checkpoint.*",  # evaluation has none
    r".*WeightAveraging callback with a model that overrides.*",  # it does so for fsdp2 alone
    r".*recommended to use `self.log\(.*sync_dist=True\)`.*",  # torchmetrics does that
)

NAMED = (averaging, augment)  # a config may name what they hold

# Settings of the Trainer that a config must leave at their defaults, and why.
OURS = {
    "accumulate_grad_batches": (1, "it follows from data.batch_size and data.micro_batch"),
    "barebones": (False, "best.ckpt and last.ckpt are always kept"),
    "default_root_dir": (None, "the run's folder is run.root and run.name"),
    "enable_checkpointing": (None, "best.ckpt and last.ckpt are always kept"),
    "overfit_batches": (0.0, "it would read images unseeded and unmixed; set limit_train_batches"),
    "max_time": (None, "it would end the run as if it were complete; set max_steps, or stop the run with SIGTERM"),
}


def run(command: str, arguments: list[str]) -> int:
    """Run fit, validate, test or predict and return the exit code."""
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    set_parsing_settings(
        import_path_denylist=["*"],
        # What jsonargparse calls the base class where a callback's keys come without a class.
        import_path_allowlist=[*trusted(), "lightning.Callback"],
        docstring_parse_attribute_docstrings=True,  # the help of ViTConfig's options
    )
    load = get_loader("yaml")
    set_loader("yaml", lambda text: with_public_paths(load(text)), (yaml.YAMLError,))
    line = CommandLine.read(command, arguments)
    try:
        with signals_handled(command == "fit"):
            CLI(line)
    except UserError:
        if rank() and not line.launched:
            return 2  # rank 0 has the same to say
        raise
    except Interrupted as stop:
        if inherited():
            return 0  # or Lightning would kill rank 0 for it, before its loggers are closed
        same = "the same command without --run.overwrite" if "--run.overwrite" in arguments else "the same command"
        rank_zero_only(print)(f"{stop}; {same} continues the run", flush=True)
        if stop.code == AGAIN and rank() == 0:
            requeue()
        return stop.code
    return 0


class CLI(LightningCLI):
    """The Lightning CLI over the two stages and image folders."""

    def __init__(self, line: CommandLine) -> None:
        self.line, self.begun = line, time.monotonic()
        super().__init__(
            Stage,
            ImageFolderData,
            save_config_callback=None,
            trainer_class=Trainer,
            trainer_defaults={"enable_model_summary": False},
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={line.command: HELP[line.command]},
            subclass_mode_model=True,
            args=line.arguments,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunOptions, "run")
        if self.line.command == "predict":
            parser.add_argument(
                "--out", type=str, default=None, help="the CSV file; predictions.csv in the run's folder"
            )

    def _parse_ckpt_path(self) -> None:
        """Lightning would let a checkpoint's settings silently win over the config; `complete` compares them."""

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that runs: the parsers of the others would take their time."""
        ours = {"weights_only", "return_predictions"}  # always true, and always false
        return {self.line.command: LightningCLI.subcommands()[self.line.command] | ours}

    def before_instantiate_classes(self) -> None:
        self.parser.add_instantiator(build, object)  # after Lightning's own, of model and data
        config = self.config[self.subcommand]
        check_groups(config)
        self.options = RunOptions(**config.run.as_dict())
        self.folder = RunFolder(self.options, self.line.config, self.line.exact)
        self.keeps = self.subcommand == "fit" and not config.trainer.fast_dev_run
        if self.subcommand == "fit":
            self.decide(config)
        elif not config.ckpt_path:
            config.ckpt_path = str(locate(self.folder.path))
        # The data module gets these very ones: what is asked here is not read again.
        self.splits = Splits(config.data.root, parse_share(config.data.holdout), config.data.manifest)
        self.classes = complete(config, starting_weights(config, fitting=self.subcommand == "fit"), self.splits)
        self.resolved = self.plain(config)
        if config.ckpt_path and "init_from" in config.model.init_args:
            config.model.init_args.init_from = None  # it may be gone by now
        if not self.keeps:  # evaluation needs neither the training's loggers nor its callbacks
            config.trainer.logger, config.trainer.callbacks = False, None
        self.complete_loggers(config)

    def plain(self, config: Any) -> dict[str, Any]:
        """The config as plain values, without what is no setting of the run."""
        plain = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))[self.subcommand]
        for beside in ("config", "ckpt_path", "out"):
            plain.pop(beside, None)
        plain["run"].update(name=self.folder.name, overwrite=False)
        return plain

    def decide(self, config: Any) -> None:
        """Begin the run, continue it, or say that it is complete; rank 0 decides for all."""
        for key, (default, why) in OURS.items():
            if config.trainer[key] != default:
                raise UserError(f"trainer.{key} is not for a config: {why}")
        ends = (config.trainer.max_epochs, config.trainer.max_steps)
        if self.keeps and ends in ((None, -1), (-1, -1)):
            raise UserError("training has no end; set trainer.max_epochs or trainer.max_steps")
        if 0 in ends:
            raise UserError("there is nothing to train; set trainer.max_epochs or trainer.max_steps above 0")
        if rank() == 0 and config.data.root == DIGITS and not Path(config.data.root).exists():
            sources.write("digits", Path(config.data.root))
        self.asked = self.plain(config)
        decision = Decision("begin", "")
        if self.keeps:
            decision = share_decision(self.decided(config.run.overwrite), self.folder.path, self.asked)
        if decision.action == "finished":
            rank_zero_only(print)(
                f"the run {self.folder.path} is complete at step {self.folder.finished_at()}; more "
                "--trainer.max_epochs or --trainer.max_steps continue it, --run.overwrite true begins it again"
            )
            raise SystemExit(0)
        self.given = config.ckpt_path
        config.ckpt_path = config.ckpt_path or decision.checkpoint or None
        if config.ckpt_path:
            rank_zero_only(print)(f"continuing {self.folder.path} from {config.ckpt_path}")

    def decided(self, overwrite: bool) -> Decision | None:
        """What rank 0 decides; where it refuses, the others are told to end, too."""
        if rank():
            return None
        try:
            return self.folder.decide(self.asked, overwrite)
        except UserError:
            with suppress(UserError):  # they may not have come
                share_decision(Decision("refused", ""), self.folder.path, self.asked)
            raise

    def complete_loggers(self, config: Any) -> None:
        """Let W&B's loggers, one unless the config says otherwise, keep their run in the run's folder."""
        trainer = config.trainer
        if trainer.logger in (None, True):
            trainer.logger = Namespace(class_path="vitlit.loggers.Wandb", init_args=Namespace())
        for logger in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
            if logger and logger.class_path.endswith(".Wandb"):
                about = logger.init_args
                about.save_dir = about.get("save_dir") or str(self.folder.path)
                about.name = about.get("name") or self.folder.name
                about.id = about.get("id") or (self.folder.wandb_id() if config.ckpt_path else None)

    def instantiate_trainer(self, **kwargs: Any) -> LightningTrainer:
        self.splits.classes, self.splits.photos = self.classes, self.line.photos
        self.datamodule.splits = self.splits
        bar = self.config[self.subcommand].trainer.enable_progress_bar is not False
        terminal = sys.stdout.isatty()
        extra: list[Any] = [callbacks.Bar() if terminal else callbacks.Lines()] if bar else []
        if self.keeps:
            extra += self.training_callbacks()
        elif self.subcommand == "predict":
            out = Path(self.config.predict.out or self.folder.path / "predictions.csv")
            extra.append(callbacks.Predictions(out, self.datamodule.split("predict"), self.classes))
            self.datamodule.bad_photos = out.with_name(f"{out.stem}-bad.csv")
            if rank() == 0 and self.datamodule.bad_photos.is_file():  # of a prediction before
                self.datamodule.bad_photos.unlink()
        self.trainer_defaults["callbacks"] = extra
        return super().instantiate_trainer(
            logger=False,
            default_root_dir=str(self.folder.path),
            enable_progress_bar=bar and terminal,
            enable_checkpointing=self.keeps,
        )

    def training_callbacks(self) -> list[Any]:
        """The callbacks that keep what a training run makes."""
        measured = self.model.measured
        monitor = self.config.fit.run.monitor or next(
            name for name in ("val/top1", "val/map", "val/loss") if name in measured
        )
        if monitor not in measured:
            raise UserError(f"run.monitor {monitor} is not among {' '.join(measured)}")
        folder = self.folder.best.parent
        self.best = Best(folder, monitor)
        last = Last(folder, self.options.keep_every)
        limit = self.options.time_limit
        until = None if limit is None else self.begun + seconds(limit)
        return [
            Interrupt(last, until, self.options.save_minutes),
            callbacks.NonFinite(),
            callbacks.Throughput(),
            callbacks.Tracking(self.resolved),
            callbacks.Mistakes(),
            self.best,
            last,
        ]

    def after_instantiate_classes(self) -> None:
        self.datamodule.check(self.subcommand, self.trainer.world_size)
        if self.keeps:
            check_idle(self.config.fit.data, self.line.content)
            for doubt in doubts(self.config.fit, self.line.content):
                rank_zero_only(print)(f"vitlit: warning: {doubt}", flush=True)
            check_monitors(self.trainer, self.model)
            epoch = self.datamodule.steps_per_epoch
            limits = [self.trainer.max_steps, (self.trainer.max_epochs or -1) * epoch]
            total = min(limit for limit in limits if limit > 0)
            self.model.schedule.over(total, epoch)
            # Not of the run's own, which may have been stopped when it had but to be marked as finished.
            if self.given and (step := open_checkpoint(Path(self.given))["global_step"]) >= total:
                ends = f"{self.given} is at step {step}, and this training ends at step {total}"
                raise UserError(f"{ends}; give more --trainer.max_epochs or --trainer.max_steps")

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise UserError(f"seed_everything: {error}") from error

    def before_fit(self) -> None:
        self.line.launched = True
        data, vit = self.datamodule, self.model.vit
        rank_zero_only(print)(
            f"ViT with {sum(p.numel() for p in vit.parameters()):,} parameters, {vit.grid[0]} x {vit.grid[1]} patches; "
            f"{len(data.split('train')):,} training and {len(data.split('val')):,} validation images, "
            f"{len(data.classes)} classes; {data.steps_per_epoch:,} steps an epoch",
            flush=True,
        )
        if not self.keeps:
            return
        if rank() == 0:
            self.folder.begin(self.asked, self.config.fit.run.overwrite)
        given = self.config_init.fit.trainer.logger
        loggers = given if isinstance(given, list) else [given] if given else []
        for logger in loggers:
            if isinstance(logger, Wandb) and rank() == 0:
                self.folder.keep_wandb_id(str(logger.version))
        self.trainer.loggers = [*loggers, CSV(self.folder.path)]

    def after_fit(self) -> None:
        if not self.keeps or rank() != 0:
            return
        self.folder.finish(self.trainer.global_step)
        rows = {"steps": f"{self.trainer.global_step:,}"}
        if self.best.best_model_score is not None:
            score = float(self.best.best_model_score)
            percent = "loss" not in str(self.best.monitor)
            rows[f"best {self.best.monitor}"] = f"{100 * score:.2f} %" if percent else f"{score:.4f}"
            rows["checkpoint"] = str(self.folder.best)
        else:
            rows["checkpoint"] = f"{self.folder.last} (nothing was validated, so none is best)"
        for logger in self.trainer.loggers:
            if isinstance(logger, Wandb):
                rows["W&B"] = logger.closing_line() or "disabled"
                logger.close()
        rows["next"] = f"vitlit predict {shlex.quote(str(self.folder.path))} PHOTOS --out predictions.csv"
        if isinstance(self.model, Pretrain):
            parts = ["vitlit", "fit", "--config", "finetune", "--model.init_from", str(self.folder.path)]
            splits = self.splits
            if splits.root != DIGITS:
                parts += ["--data.root", splits.root, "--run.name", f"{self.folder.name}-finetuned"]
            if splits.manifest:
                parts += ["--data.manifest", splits.manifest]
            if splits.holdout:
                parts += ["--data.holdout", str(splits.holdout)]
            rows["next"] = shlex.join(parts)
        console = Console(soft_wrap=True, highlight=False)  # a command must stay on one line
        console.print(f"\n[bold]{escape(str(self.folder.path))} is complete[/bold]")
        for name, value in rows.items():
            console.print(f"  [dim]{name:<14}[/dim] {escape(value)}")

    def after_predict(self) -> None:
        trainer: Any = self.trainer
        writer = next(c for c in trainer.callbacks if isinstance(c, callbacks.Predictions))
        left = len(writer.index) - writer.written
        beside = f"; {left:,} could not be read, see {self.datamodule.bad_photos}" if left else ""
        if trainer.is_global_zero and not writer.written:
            raise UserError(f"{writer.out} is empty{beside}")
        rank_zero_only(print)(f"{writer.out}: {writer.written:,} images{beside}")

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}  # execute nothing
        return {**kwargs, "return_predictions": False} if subcommand == "predict" else kwargs
