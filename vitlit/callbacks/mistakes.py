"""What a run's best weights make of the validation images: each of them, the confusion matrix, and the mistakes."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from vitlit.callbacks.predictions import gather, write_csv
from vitlit.data.index import Index
from vitlit.errors import UserError
from vitlit.files import whole_file
from vitlit.images.decode import decode_bytes
from vitlit.inspection.sheet import Cell, draw_sheet
from vitlit.loggers import Mistake, Wandb
from vitlit.run.checkpoints import BEST, Best
from vitlit.run.history import VALIDATION, read_csv

COLUMNS = ("path", "label", "prediction", "probability", "label_probability", "above")
WORST = 32  # mistakes in W&B
SHOWN = 20  # images in the picture


class Mistakes(Callback):
    """Keep what the best weights make of each validation image, and log the worst mistakes to W&B.

    `validation.csv` has a row an image, of the validation that best.ckpt was saved after; without one, of the last:
    path, label, prediction, the probabilities of both, and how many classes are more probable than the label. At the
    end of the run its counts of each label and prediction go into `confusion.csv`, and its mistakes, the most confident
    first, into `mistakes.csv`. `mistakes.png` shows those, then the least confident of the others. Images must have one
    class each.
    """

    def __init__(self) -> None:
        self._rows: list[Tensor] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rows.clear()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        probabilities, labels = outputs["probabilities"], batch.labels
        if probabilities is not None and labels.ndim == 1 and labels.min() >= 0:  # one class an image
            probability, prediction = probabilities.max(-1)
            own = probabilities.gather(1, labels[:, None])
            columns = (batch.indices, labels, prediction, probability, own[:, 0], (probabilities > own).sum(1))
            self._rows.append(torch.stack([column.cpu().double() for column in columns], 1))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        rows, folder = gather(trainer, self._rows), Path(trainer.default_root_dir)
        best = next((each for each in trainer.checkpoint_callbacks if isinstance(each, Best)), None)
        better = best is None or best.check_monitor_top_k(trainer, trainer.callback_metrics.get(str(best.monitor)))
        # Best itself comes after this. A run that branched off may never be better than what it came from.
        kept = better or not (folder / "checkpoints" / BEST).is_file()
        if not (trainer.is_global_zero and kept and len(rows)):
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        index, classes = data.split("val"), data.classes
        cells = (
            (index.path(int(i)), classes[int(label)], classes[int(guess)], f"{p:.7g}", f"{own:.7g}", int(above))
            for i, label, guess, p, own, above in rows.tolist()
        )
        with trying(folder):
            write_csv(folder / VALIDATION, COLUMNS, cells)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        if not trainer.is_global_zero or not self._rows or not (folder / VALIDATION).is_file():
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        rows, number = read_csv(folder / VALIDATION), {name: i for i, name in enumerate(data.classes)}
        worst, unsure = by_confidence(rows)
        pairs = [(row["label"], row["prediction"]) for row in rows]
        counts = sorted(Counter(pairs).items(), key=lambda item: [number[name] for name in item[0]])
        title = f"{len(unsure):,} of {len(rows):,} validation images are right; in red: prediction (truth)"
        with trying(folder):
            write_csv(folder / "confusion.csv", ("label", "prediction", "count"), [(*pair, n) for pair, n in counts])
            write_csv(folder / "mistakes.csv", COLUMNS[:4], [[row[name] for name in COLUMNS[:4]] for row in worst])
            sheet = draw(title, (worst + unsure)[:SHOWN], data.split("val"), data.preprocess.ground)
            with whole_file(folder / "mistakes.png") as partial:
                sheet.save(partial, "PNG")
        labels, guesses = ([number[name] for name in column] for column in zip(*pairs, strict=True))
        mistakes = [
            Mistake(row["path"], number[row["label"]], number[row["prediction"]], float(row["probability"]))
            for row in worst[:WORST]
        ]
        for logger in trainer.loggers:
            if isinstance(logger, Wandb):
                logger.log_mistakes(data.classes, labels, guesses, mistakes)


def by_confidence(rows: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The mistakes, the most confident first, and the others, the least confident first."""
    order = sorted(rows, key=lambda row: float(row["probability"]))
    right = [row for row in order if row["label"] == row["prediction"]]
    return [row for row in reversed(order) if row["label"] != row["prediction"]], right


def draw(title: str, rows: list[dict[str, str]], index: Index, ground: str) -> Image.Image:
    """A sheet of images with their predictions, and the truth where that differs."""
    cells: list[Cell] = []
    for row, image in zip(rows, pictures(rows, index, ground), strict=True):
        right, truth = row["label"] == row["prediction"], f"({row['label']})"
        caption = f"{row['prediction']}  {100 * float(row['probability']):.0f} %", "" if right else truth
        cells.append((image, caption, "black" if right else "firebrick"))
    return draw_sheet(title, cells)


def pictures(rows: list[dict[str, str]], index: Index, ground: str) -> Iterator[Tensor | None]:
    """The images at paths of an index; None for one that cannot be read any more."""
    number = {index.path(i): i for i in range(len(index))}
    for row in rows:
        image = None
        with suppress(UserError, KeyError):  # its storage fails, or it is gone by now
            image = decode_bytes(index.read(number[row["path"]]), "", ground)
        yield image


@contextmanager
def trying(folder: Path) -> Iterator[None]:
    """A warning where the block cannot write into a folder: the training goes on all the same."""
    try:
        yield
    except OSError as error:
        print(f"vitlit: warning: cannot write the mistakes into {folder}: {error.strerror}", flush=True)
