"""The confusion matrix and the mistakes of the last validation, as tables and as a picture."""

from collections import Counter
from contextlib import suppress
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

WORST = 32  # mistakes in W&B
SHOWN = 20  # images in the picture


class Mistakes(Callback):
    """At the end of a run, write the last validation's mistakes into its folder, and log the worst to W&B.

    `confusion.csv` counts the images of each label and prediction that occur together. `mistakes.csv` lists all
    mistakes, the most confident first, and `mistakes.png` shows those, then the least confident of the others. Images
    must have one class each.
    """

    def __init__(self) -> None:
        self._rows: list[Tensor] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rows.clear()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        if outputs["probabilities"] is not None and batch.labels.ndim == 1:  # one class an image
            probability, prediction = outputs["probabilities"].max(-1)
            columns = (batch.indices, batch.labels, prediction, probability)
            self._rows.append(torch.stack([column.cpu().double() for column in columns], 1))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = gather(trainer, self._rows)
        if not trainer.is_global_zero or not len(rows):
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        index, classes = data.split("val"), data.classes
        wrong = rows[:, 1] != rows[:, 2]
        worst = rows[wrong][rows[wrong][:, 3].argsort(descending=True, stable=True)]
        unsure = rows[~wrong][rows[~wrong][:, 3].argsort(stable=True)]
        mistakes = [Mistake(index.path(int(i)), int(label), int(guess), p) for i, label, guess, p in worst.tolist()]
        labels, predictions = (rows[:, column].int().tolist() for column in (1, 2))
        counts = sorted(Counter(zip(labels, predictions, strict=True)).items())
        folder = Path(trainer.default_root_dir)
        named = [(classes[label], classes[guess], count) for (label, guess), count in counts]
        listed = [(m.path, classes[m.label], classes[m.prediction], f"{m.probability:.6f}") for m in mistakes]
        title = f"{len(unsure):,} of {len(rows):,} validation images are right; in red: prediction (truth)"
        sheet = draw(title, torch.cat([worst, unsure])[:SHOWN], index, classes, data.preprocess.ground)
        try:
            write_csv(folder / "confusion.csv", ("label", "prediction", "count"), named)
            write_csv(folder / "mistakes.csv", ("path", "label", "prediction", "probability"), listed)
            with whole_file(folder / "mistakes.png") as partial:
                sheet.save(partial, "PNG")
        except OSError as error:  # the training is complete all the same
            print(f"vitlit: warning: cannot write the mistakes into {folder}: {error.strerror}", flush=True)
        for logger in trainer.loggers:
            if isinstance(logger, Wandb):
                logger.log_mistakes(classes, labels, predictions, mistakes[:WORST])


def draw(title: str, rows: Tensor, index: Index, classes: list[str], ground: str) -> Image.Image:
    """A sheet of images with their predictions, and the truth where that differs."""
    cells: list[Cell] = []
    for number, label, guess, probability in rows.tolist():
        right, truth = label == guess, f"({classes[int(label)]})"
        caption = f"{classes[int(guess)]}  {100 * probability:.0f} %", "" if right else truth
        image = None
        with suppress(UserError):  # it was read before, so its storage fails
            image = decode_bytes(index.read(int(number)), "", ground)
        cells.append((image, caption, "black" if right else "firebrick"))
    return draw_sheet(title, cells)
