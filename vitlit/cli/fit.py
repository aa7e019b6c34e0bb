"""`vitlit fit|validate|test|predict`: the Lightning CLI over runs that are kept in folders."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace, get_loader, set_loader, set_parsing_settings
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from vitlit import callbacks
from vitlit.cli import completion
from vitlit.cli.arguments import CommandLine, build, check_groups, expand_paths, opening
from vitlit.cli.messages import show_asked
from vitlit.cli.parser import Parser
from vitlit.cli.summary import Begin, Evaluated, ending, print_summary
from vitlit.cli.trainer import (
    Trainer,
    check_length,
    check_monitors,
    check_trainer,
    fill_folders,
    fill_modes,
    harmless,
    listed,
    monitor,
)
from vitlit.data import ImageFolderData
from vitlit.data.folder import parse_share
from vitlit.data.splits import Splits
from vitlit.errors import UserError
from vitlit.files import check_new
from vitlit.loggers import CSV
from vitlit.prepare.sources import DIGITS, write
from vitlit.run.checkpoints import Best, Last
from vitlit.run.config import trusted, with_public_paths
from vitlit.run.folder import Decision, RunFolder, RunOptions, seconds
from vitlit.run.history import History
from vitlit.run.interrupt import AGAIN, Interrupt, Interrupted, requeue, signals_handled
from vitlit.run.ranks import check_environment, inherited, rank, share_decision
from vitlit.stages import Stage
from vitlit.weights import locate


def run(command: str, arguments: list[str]) -> int:
    show_asked()
    check_environment()
    if "VITLIT_TRUST" in os.environ and "" not in sys.path:
        sys.path.append(os.getcwd())  # at the end: a file here must not replace a module that is installed
    set_parsing_settings(
        import_path_denylist=["*"],
        # The name that jsonargparse gives to the base class if a callback's keys come without a class.
        import_path_allowlist=[*trusted(), "lightning.Callback"],
        # The help of ViTConfig's options, for which sources are read: 0.6 s that a training need not wait for.
        docstring_parse_attribute_docstrings=any("help" in part or "comments" in part for part in arguments),
    )
    load = get_loader("yaml")
    set_loader("yaml", lambda text: with_public_paths(load(text)), (yaml.YAMLError,))
    line = CommandLine(command, arguments)
    try:
        with signals_handled(command == "fit"):
            CLI(line)
    except UserError:
        if rank() and not line.launched:
            return 2  # rank 0 prints the same
        raise
    except Interrupted as stop:
        if inherited():
            return 0  # or Lightning would kill rank 0 before its loggers are closed
        same = "the same command without --run.overwrite" if "--run.overwrite" in arguments else "the same command"
        rank_zero_only(print)(f"{stop}; {same} continues the run", flush=True)
        if stop.code == AGAIN and rank() == 0:
            requeue()
        return stop.code
    return 0


class CLI(LightningCLI):
    """The Lightning CLI over the two stages and image folders."""

    def __init__(self, line: CommandLine) -> None:
        self.line = line
        super().__init__(
            Stage,
            ImageFolderData,
            save_config_callback=None,
            trainer_class=Trainer,
            trainer_defaults={"enable_model_summary": False},
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={line.command: opening(line.command)},
            subclass_mode_model=True,
            args=line.arguments,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        expand_paths(self.config)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunOptions, "run")
        if self.line.command == "predict":
            parser.add_argument("--out", type=str, help="the CSV file; by default predictions.csv in the run's folder")

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning lets a checkpoint's settings win over the config; `fill_config` compares them."""

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the subcommand that runs: to build the parsers of the others takes time."""
        fixed = {"weights_only", "return_predictions"}  # always true and always false
        return {self.line.command: LightningCLI.subcommands()[self.line.command] | fixed}

    @property
    def keeps(self) -> bool:
        """Whether the command trains a run that is kept."""
        return self.subcommand == "fit" and not self.config.fit.trainer.fast_dev_run

    def before_instantiate_classes(self) -> None:
        self.parser.add_instantiator(build, object)  # after Lightning's own, of model and data
        config, fitting = self.config[self.subcommand], self.subcommand == "fit"
        check_groups(config)
        if fitting:
            check_trainer(config.trainer)
            fill_modes(config.trainer.callbacks, self.line.gives_mode)
        self.folder = RunFolder(RunOptions(**config.run.as_dict()), self.line.config, self.line.exact)
        completion.fill_size(config, self.line.content)
        recorded = self.plain(self.config) if fitting else {}
        if config.ckpt_path and not Path(config.ckpt_path).exists():  # best or last of the run itself
            own = self.folder.last.parent / f"{config.ckpt_path}.ckpt"
            config.ckpt_path = str(own) if own.is_file() or config.ckpt_path in ("best", "last") else config.ckpt_path
        if fitting:
            self.decide(recorded)
            fill_folders(config.trainer, self.folder)
        elif not config.ckpt_path:
            config.ckpt_path = str(locate(self.folder.path))
        completion.fill_labels(config)
        data = config.data
        self.splits = Splits(data.root, parse_share(data.holdout), data.manifest, data.labels)
        self.weights = completion.starting_weights(config, fitting)
        completion.fill_config(config, self.weights, self.splits)
        self.splits.photos = self.line.photos
        self.callbacks: list[Any] = []
        if fitting:
            folder = self.folder if self.keeps else None
            speed = callbacks.Throughput(self.folder.options.peak_tflops)
            begin = Begin(self.line, folder, recorded, self.plain(self.config))
            self.callbacks += [callbacks.NonFinite(), speed, begin]
        if self.keeps:
            completion.check_idle(config.data, self.line.content)
            self.callbacks.append(callbacks.Mistakes())
        else:  # evaluation needs neither the training's loggers nor its callbacks
            config.trainer.logger, config.trainer.callbacks = False, None
        if config.ckpt_path:
            config.model.init_args.init_from = None  # it may be gone by now
        completion.fill_loggers(config, self.folder)

    def plain(self, config: Namespace) -> dict[str, Any]:
        """A config as plain values, without what is not a setting of the run."""
        plain = yaml.safe_load(self.parser.dump(config, skip_unset=False, skip_validation=True))[self.subcommand]
        for key in ("config", "ckpt_path", "out"):
            plain.pop(key, None)
        plain["run"].update(name=self.folder.name, overwrite=False)
        return dict(plain)

    def completed(self, before: dict[str, Any]) -> dict[str, Any]:
        """The config of a run that an older version made, with the defaults of the keys that are new."""
        try:
            return self.plain(self.parser.parse_object({self.subcommand: before}))
        except UserError:  # it also has keys that are no more, which the comparison names
            return before

    def decide(self, recorded: dict[str, Any]) -> None:
        """Begin the run, continue it, or say that it is complete. Rank 0 decides for all."""
        config = self.config.fit
        try:
            decided = None if rank() else self.decided(recorded)
        except UserError:
            with suppress(UserError):  # the other ranks, which end too, may not have started
                share_decision(Decision("refused"), self.folder.path, recorded)
            raise
        decision = share_decision(decided, self.folder.path, recorded)
        if decision.action == "finished":
            about = "more --trainer.max_epochs or --trainer.max_steps continue it, --run.overwrite true starts it over"
            rank_zero_only(print)(f"{self.folder.path} is complete at step {self.folder.finished_at()}; {about}")
            raise SystemExit(0)
        config.ckpt_path = config.ckpt_path or decision.checkpoint or None
        if config.ckpt_path:
            rank_zero_only(print)(f"continuing {self.folder.path} from {config.ckpt_path}")

    def decided(self, recorded: dict[str, Any]) -> Decision:
        """What rank 0 decides about the run; it writes the digits if they are trained on."""
        config = self.config.fit
        root = str(config.data.root)
        decision = self.folder.decide(recorded, self.completed) if self.keeps else Decision("begin")
        if root == DIGITS and decision.action != "finished" and not Path(root).exists():
            if decision.action == "begin":
                completion.starting_weights(config, fitting=True)  # nothing is written if they are missing
            write("digits", Path(root))
        return decision

    def instantiate_trainer(self, **kwargs: Any) -> LightningTrainer:
        self.datamodule.splits = self.splits
        self.model.weights = self.weights
        trainer = self.config_init[self.subcommand].trainer
        bar, terminal, own = trainer.enable_progress_bar is not False, sys.stdout.isatty(), listed(trainer.callbacks)
        if any(isinstance(callback, ProgressBar) for callback in own):
            terminal = True  # the user's bar, off a terminal too, in place of vitlit's
        elif bar:
            self.callbacks.insert(0, callbacks.Bar() if terminal else callbacks.Lines())
        if self.keeps:
            # Where an objective measures nothing but its loss, features and pictures tell whether it learns.
            for watching in (callbacks.Probes, callbacks.Pictures) if len(self.model.measured) == 1 else ():
                if not any(isinstance(each, watching) for each in own):
                    self.callbacks.append(watching())
            options, checkpoints = self.folder.options, self.folder.best.parent
            metric, mode = monitor(self.model, options.monitor, [*self.callbacks, *own], self.datamodule)
            until = None if options.time_limit is None else self.line.began + seconds(options.time_limit)
            last = Last(checkpoints, options.keep_every)
            self.callbacks[:0] = [Interrupt(last, until, options.save_minutes), Best(checkpoints, metric, mode), last]
        elif self.subcommand == "predict":
            out = Path(self.config.predict.out or self.folder.path / "predictions.csv")
            writer = callbacks.Predictions(out, self.datamodule.split("predict"), self.splits.classes)
            check_new(self.config.predict.out)
            self.datamodule.bad_photos = writer.bad
            if rank() == 0 and writer.bad.is_file():  # left by an earlier prediction
                writer.bad.unlink()
            self.callbacks.append(writer)
        elif self.subcommand != "fit":
            checkpoint = self.config[self.subcommand].ckpt_path
            self.callbacks.append(Evaluated(self.line.command, self.folder.path, checkpoint, self.line.words))
        self.trainer_defaults["callbacks"] = self.callbacks
        return super().instantiate_trainer(
            logger=[*map(harmless, trainer.logger), CSV(self.folder.path)] if self.keeps else False,
            default_root_dir=str(self.folder.path),
            enable_progress_bar=bar and terminal,
            enable_checkpointing=self.keeps,
        )

    def after_instantiate_classes(self) -> None:
        # Before other processes start: a process that fails may end this one before it has printed why.
        self.datamodule.check(self.subcommand, self.trainer.world_size)
        if self.keeps:
            check_monitors(self.trainer, self.model, self.datamodule)
            start = Path(self.config.fit.ckpt_path or self.folder.last)
            # Its own may be at the end, if the run was stopped just before it was marked as complete.
            another = start if start.parent != self.folder.last.parent else None
            check_length(self.trainer, self.model, self.datamodule.steps_per_epoch, another)
            self.model.check_data(self.datamodule)
            for warning in completion.config_warnings(self.config.fit, self.line.content, self.datamodule):
                rank_zero_only(print)(f"vitlit: warning: {warning}", flush=True)

    def after_fit(self) -> None:
        if self.keeps and rank() == 0:
            step, folder = self.trainer.global_step, self.folder
            best = History(folder.path).best if folder.best.is_file() else None
            result = {"metric": best.metric, "value": best.value, "step": best.step} if best else {}
            folder.command_ends(step, self.line.seconds(), ending(self.trainer), best=result)
            folder.finish(step)
            if folder.options.report:
                self.report()
            print_summary(self.trainer, folder, self.datamodule, best)

    def report(self) -> None:
        """Write the run's page. The run is complete, whether or not that works."""
        from vitlit.cli.report import Report  # for which the beginning need not wait

        path = self.folder.path
        try:
            Report(History(path), self.splits).write(path / "report.html")
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"vitlit: warning: the report was not written ({why}); vitlit report {path} tries again", flush=True)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}  # execute nothing
        return {**kwargs, "return_predictions": False} if subcommand == "predict" else kwargs
