"""Predictions as a CSV file."""

from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from vitlit.data.index import Index
from vitlit.errors import UserError
from vitlit.files import write_csv, writing


class Predictions(Callback):
    """Write predictions as CSV: path, class, probability, then the next four of the top five; or path, number."""

    def __init__(self, out: Path, index: Index, classes: list[str]) -> None:
        if out.is_dir():
            raise UserError(f"cannot write {out}: it is a folder; give another --out")
        self.out, self.index, self.classes = out, index, classes
        self.bad = out.with_name(f"{out.stem}-bad.csv")  # where the data module is to list what it cannot read
        self._rows: list[Tensor] = []

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        if pl_module.vit.temperature != 1:
            print(f"probabilities are softmax(logits / {pl_module.vit.temperature:.4g}), by the weights' temperature")
        with writing(self.out, "give another --out"):  # now, not when all is predicted
            self.out.parent.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=self.out.parent).close()

    def on_predict_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        if outputs.ndim == 1:
            rows = outputs.cpu().double()[:, None]
        else:
            probabilities, classes = outputs.cpu().topk(min(5, outputs.shape[-1]))
            rows = torch.stack([classes.double(), probabilities.double()], -1).flatten(1)
        self._rows.append(torch.cat([batch.indices.cpu().double()[:, None], rows], 1))

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        rows = gather(trainer, self._rows)
        if not trainer.is_global_zero:
            return
        read = rows[:, 0] >= 0  # -1 where data.on_bad_image skipped an image
        left, rows = int((~read).sum()), rows[read]
        head = ["path", "number"] if rows.shape[1] == 2 else ["path", "class", "probability"]
        head += [f"{name}_{k}" for k in range(2, rows.shape[1] // 2 + 1) for name in ("class", "probability")]
        write_csv(self.out, head, map(self._cells, rows.tolist()))
        beside = f"; {left:,} could not be read, see {self.bad}" if left else ""
        if not len(rows):
            raise UserError(f"{self.out} is empty{beside}")
        print(f"{self.out}: {len(rows):,} images{beside}")

    def _cells(self, row: list[float]) -> list[str]:
        index, *pairs = row
        cells = [f"{pairs[0]:.7g}"]  # a number
        if len(pairs) > 1:
            cells = [self.classes[int(v)] if i % 2 == 0 else f"{v:.6f}" for i, v in enumerate(pairs)]
        return [self.index.path(int(index)), *cells]


def gather(trainer: Trainer, rows: list[Tensor]) -> Tensor:
    """The rows of all ranks, on every rank, sorted by their first column."""
    parts: list[Any] = [rows]
    if trainer.world_size > 1:
        parts = [None] * trainer.world_size
        torch.distributed.all_gather_object(parts, rows)
    table = torch.cat([batch for part in parts for batch in part] or [torch.empty(0, 4)])
    return table[table[:, 0].argsort()]
