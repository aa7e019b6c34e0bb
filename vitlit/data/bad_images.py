"""The list of images that a run skips because they cannot be read."""

import csv
import io
import os
from pathlib import Path

from vitlit.errors import UserError

SHARE = 0.01  # of the images may be bad; with more, the data itself is wrong
LEAST = 10
HEADER = "path,reason\n"


class BadImages:
    """A CSV file, path and reason, that data workers of all ranks add to, also in a continued run; rows may repeat."""

    def __init__(self, file: Path, images: int) -> None:
        self.file, self.most = file, max(LEAST, int(images * SHARE))
        self._known: set[str] = set()

    def note(self, path: str, reason: str) -> None:
        """List an image once; UserError if there are too many, or the list cannot be written."""
        if path in self._known:
            return
        try:
            with self.file.open("a+", encoding="utf-8", errors="surrogateescape", newline="") as file:
                file.seek(0)
                self._known |= {row[0] for row in csv.reader(file) if row} - {"path"}  # two workers may write a header
                if path not in self._known:
                    self._known.add(path)
                    line = io.StringIO()
                    csv.writer(line, lineterminator="\n").writerow([path, reason])
                    # One write at the end of the file stays whole between those of other processes.
                    header = HEADER if not os.fstat(file.fileno()).st_size else ""
                    os.write(file.fileno(), (header + line.getvalue()).encode(errors="surrogateescape"))
        except OSError as error:
            raise UserError(f"cannot write {self.file}: {error.strerror}") from error
        if len(self._known) > self.most:
            raise UserError(
                f"{len(self._known)} images cannot be read, more than the {self.most} that may be skipped; "
                f"see {self.file}, or `vitlit data check` for all of them"
            )
