"""Images that cannot be read, of which a run that goes on keeps a list."""

import csv
import io
import os
from pathlib import Path

from vitlit.errors import UserError

SHARE = 0.01  # of the images; where more are bad, it is the data that is wrong
LEAST = 10
HEADER = "path,reason\n"


class BadImages:
    """The list, a line an image: path, reason. All data workers of all ranks add to it, also when a run is continued.

    Two that meet an image at the same moment both list it.

    Args:
        file: the CSV file.
        images: how many there are in all; a hundredth of them may be bad, and ten in any case.
    """

    def __init__(self, file: Path, images: int) -> None:
        self.file, self.most = file, max(LEAST, int(images * SHARE))
        self._known: set[str] = set()

    def note(self, path: str, reason: str) -> None:
        """Add an image that is not yet in the list.

        Raises:
            UserError: there are more than may be, or the list cannot be written.
        """
        if path in self._known:
            return
        try:
            self._known |= self._read()
            if path not in self._known:
                self._known.add(path)
                line = io.StringIO()
                csv.writer(line, lineterminator="\n").writerow([path, reason])
                # One write to a file that is open for appending is whole beside those of other processes.
                with open(self.file, "ab", buffering=0) as file:
                    head = HEADER if not os.fstat(file.fileno()).st_size else ""
                    file.write((head + line.getvalue()).encode(errors="surrogateescape"))
        except OSError as error:
            raise UserError(f"cannot write {self.file}: {error.strerror}") from error
        if len(self._known) > self.most:
            raise UserError(
                f"{len(self._known)} images cannot be read, more than the {self.most} that may be skipped; "
                f"see {self.file}, or `vitlit data check` for all of them"
            )

    def _read(self) -> set[str]:
        try:
            with self.file.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
                return {row[0] for row in csv.reader(file) if row} - {"path"}  # two workers may both have begun it
        except FileNotFoundError:
            return set()
