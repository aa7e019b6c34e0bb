"""The list of images that a run skips because they cannot be read."""

import csv
import os
from pathlib import Path

from vitlit.errors import UserError

SHARE = 0.01  # of the images may be bad; with more, the data itself is wrong
LEAST = 10


class BadImages:
    """A CSV file, path and reason, that data workers of all ranks add to, also in a continued run; rows may repeat."""

    def __init__(self, file: Path, images: int) -> None:
        self.file, self.most = file, max(LEAST, int(images * SHARE))
        self._known: set[str] = set()

    def note(self, path: str, reason: str) -> None:
        if path in self._known:
            return
        try:
            with self.file.open("a+", encoding="utf-8", errors="surrogateescape", newline="") as file:
                file.seek(0)
                self._known |= {row[0] for row in csv.reader(file) if row} - {"path"}  # two workers may write a header
                if path not in self._known:
                    self._known.add(path)
                    # Buffered, and so one write, which stays whole at the end of the file between other processes'.
                    if not os.fstat(file.fileno()).st_size:
                        file.write("path,reason\n")
                    csv.writer(file, lineterminator="\n").writerow([path, reason])
        except OSError as error:
            raise UserError(f"cannot write {self.file}: {error.strerror}") from error
        if len(self._known) > self.most:
            raise UserError(f"{len(self._known)} images cannot be read, {self.most} may be skipped; see {self.file}")
