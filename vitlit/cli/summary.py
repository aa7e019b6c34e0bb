"""What `vitlit fit` prints when a run is complete."""

import shlex

from lightning.pytorch import Trainer
from rich.console import Console
from rich.markup import escape

from vitlit.data.splits import Splits
from vitlit.loggers import Wandb
from vitlit.prepare.sources import DIGITS
from vitlit.run.checkpoints import Best
from vitlit.run.folder import RunFolder
from vitlit.stages import Pretrain


def print_summary(trainer: Trainer, folder: RunFolder, splits: Splits) -> None:
    """Print steps, best metric, checkpoint, W&B run and the next command, and close the W&B run."""
    rows = {"steps": f"{trainer.global_step:,}", **_best(trainer, folder)}
    for logger in trainer.loggers:
        if isinstance(logger, Wandb):
            rows["W&B"] = logger.closing_line() or "disabled"
            logger.close()
    pretrained = isinstance(trainer.lightning_module, Pretrain)
    predict = ["vitlit", "predict", str(folder.path), "PHOTOS", "--out", "predictions.csv"]
    rows["next"] = shlex.join(_finetune(folder, splits) if pretrained else predict)
    console = Console(soft_wrap=True, highlight=False)  # a command must stay on one line
    console.print(f"\n[bold]{escape(str(folder.path))} is complete[/bold]")
    for name, value in rows.items():
        console.print(f"  [dim]{name:<14}[/dim] {escape(value)}")


def _best(trainer: Trainer, folder: RunFolder) -> dict[str, str]:
    best = next(callback for callback in trainer.checkpoint_callbacks if isinstance(callback, Best))
    if best.best_model_score is None:
        return {"checkpoint": f"{folder.last} (nothing was validated, so none is best)"}
    score, is_loss = float(best.best_model_score), "loss" in str(best.monitor)
    shown = f"{score:.4f}" if is_loss else f"{100 * score:.2f} %"
    return {f"best {best.monitor}": shown, "checkpoint": str(folder.best)}


def _finetune(folder: RunFolder, splits: Splits) -> list[str]:
    """The command that finetunes what was pretrained, on the same data if it has labels."""
    command = ["vitlit", "fit", "--config", "finetune", "--model.init_from", str(folder.path)]
    if splits.root != DIGITS:
        root = splits.root if splits.classes else "LABELLED_FOLDER"
        command += ["--data.root", root, "--run.name", f"{folder.name}-finetuned"]
    if splits.manifest:
        command += ["--data.manifest", splits.manifest]
    if splits.holdout:
        command += ["--data.holdout", str(splits.holdout)]
    return command
