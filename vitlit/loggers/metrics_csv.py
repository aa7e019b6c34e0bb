"""The metrics of a run as a CSV file in its folder."""

import csv
import io
import os
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from vitlit.errors import UserError
from vitlit.files import whole_file, writing

Row = dict[str, str]
MAKE_ROOM = "the checkpoints are whole: make room, and the same command continues from them"


class CSV(Logger):
    """Writes FOLDER/metrics.csv: one row per step, on disk as soon as it is logged, at full precision.

    A run that was interrupted and continued (see `cut`) leaves the rows of an uninterrupted one, but for the speed and
    the column `unix_seconds`, the time at which the row was last added to.
    """

    name = version = ""

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._columns: list[str] = []
        self._last: Row = {}
        self._start = 0  # of the last row, in bytes

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: they are in the run's config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a row, or add to the last row if it has the same step; None means the last row's step."""
        if not self._columns:
            self._write(*self._read())
        at = self._last.get("step", "0") if step is None else str(step)
        same = self._last.get("step") == at
        row = {**(self._last if same else {}), **{name: _cell(value) for name, value in metrics.items()}, "step": at}
        row["unix_seconds"] = f"{time.time():.1f}"
        if new := [name for name in row if name not in self._columns]:
            rows = self._read()[1]
            self._write([*self._columns, *new], [*(rows[:-1] if same else rows), row])
            return
        line = _line([row.get(name, "") for name in self._columns])
        with writing(self.path, MAKE_ROOM), self.path.open("r+b") as file:
            self._start = file.seek(self._start) if same else file.seek(0, os.SEEK_END)
            file.write(line)
            file.truncate()
        self._last = row

    @rank_zero_only
    def cut(self, step: int) -> None:
        """Drop the rows after `step`, which a run that continues from there logs again."""
        if not self.path.exists():
            return
        columns, rows = self._read()
        rows = [row for row in rows if int(row["step"]) <= step]
        self._write([name for name in columns if name == "step" or any(row[name] for row in rows)], rows)

    def _read(self) -> tuple[list[str], list[Row]]:
        try:
            text = self.path.read_text() if self.path.exists() else ""
            complete = text[: text.rfind("\n") + 1]  # a killed process may leave half a row
            reader = csv.DictReader(io.StringIO(complete, newline=""))
            rows = [{**row, "step": str(int(row["step"]))} for row in reader]
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise UserError(f"{self.path} is damaged; move it away, and the same command continues the run") from error
        return list(reader.fieldnames or ["step"]), rows

    def _write(self, columns: list[str], rows: list[Row]) -> None:
        lines = [_line(columns), *(_line([row.get(name, "") for name in columns]) for row in rows)]
        with writing(self.path, MAKE_ROOM):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.path) as partial:
                partial.write_bytes(b"".join(lines))
        self._columns, self._last = columns, rows[-1] if rows else {}
        self._start = sum(map(len, lines[:-1]))


def _cell(value: Any) -> str:
    value = value.item() if hasattr(value, "item") else value
    return repr(float(value) if isinstance(value, float) else int(value))


def _line(cells: Sequence[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()
