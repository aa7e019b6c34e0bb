"""What a run's best weights make of the validation images: each of them, the confusion matrix, and the mistakes."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from vitlit.callbacks.predictions import gather
from vitlit.data.index import Index
from vitlit.errors import UserError
from vitlit.files import read_csv, whole_file, write_csv
from vitlit.images.preprocess import Preprocess
from vitlit.images.raw import as_picture
from vitlit.inspection.sheet import Cell, draw_sheet, thumbnail
from vitlit.loggers import Wandb
from vitlit.run.checkpoints import BEST, Best
from vitlit.run.history import VALIDATION, mistakes

COLUMNS = ("path", "label", "prediction", "probability", "label_probability", "above")
WORST, SIDE = 32, 256  # mistakes in W&B, and the pixels of their images
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
        try:
            write_csv(folder / VALIDATION, COLUMNS, cells)
        except OSError as error:  # training goes on all the same
            print(f"vitlit: warning: cannot write {folder / VALIDATION}: {error.strerror}", flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        rows = read_csv(folder / VALIDATION) if trainer.is_global_zero and self._rows else []
        if not rows:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        worst, counts = mistakes(rows), Counter((row["label"], row["prediction"]) for row in rows)
        right = [row for row in rows if row["label"] == row["prediction"]]
        right.sort(key=lambda row: float(row["probability"]))
        title = f"{len(right):,} of {len(rows):,} validation images are right; in red: prediction (truth)"
        try:
            listed = [(*pair, count) for pair, count in sorted(counts.items())]
            write_csv(folder / "confusion.csv", ("label", "prediction", "count"), listed)
            write_csv(folder / "mistakes.csv", COLUMNS[:4], [[row[name] for name in COLUMNS[:4]] for row in worst])
            with whole_file(folder / "mistakes.png") as partial:
                draw_sheet(title, list(cells((worst + right)[:SHOWN], data))).save(partial, "PNG")
        except OSError as error:
            print(f"vitlit: warning: cannot write the mistakes into {folder}: {error.strerror}", flush=True)
        for logger in trainer.loggers:
            if isinstance(logger, Wandb):
                shown = readable(worst[:WORST] if logger.pictures else [], data.split("val"), data.preprocess)
                images = {row["path"]: thumbnail(image, SIDE) for row, image in shown}
                logger.log_mistakes(worst[:WORST], counts, images)
            elif hasattr(logger, "log_image") and (sheet := folder / "mistakes.png").is_file():
                logger.log_image("mistakes", [str(sheet)], trainer.global_step - 1)


def cells(rows: list[dict[str, str]], data: Any) -> Iterator[Cell]:
    """Validation images with their predictions, and the truth where that differs."""
    for row, image in readable(rows, data.split("val"), data.preprocess):
        wrong = row["label"] != row["prediction"]
        caption = f"{row['prediction']}  {100 * float(row['probability']):.0f} %", f"({row['label']})" if wrong else ""
        yield image, caption, "firebrick" if wrong else "black"


def readable(
    rows: list[dict[str, str]], index: Index, preprocess: Preprocess
) -> Iterator[tuple[dict[str, str], Tensor]]:
    """Rows of validation.csv and their images, uint8 (3, H, W), without those that cannot be read any more."""
    number = {index.path(i): i for i in range(len(index))}
    for row in rows:
        try:
            image = as_picture(preprocess.decode(index.read(number[row["path"]]), row["path"]))
        except (UserError, KeyError):  # its storage fails, or it is gone
            continue
        yield row, image
