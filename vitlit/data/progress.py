"""Progress of long work, in lines that suit a terminal and a log alike."""

import time

SECONDS = 10.0  # between two lines


class Progress:
    """Prints a line, at most every ten seconds."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, line: str) -> None:
        if time.monotonic() - self._last >= SECONDS:
            self._last = time.monotonic()
            print(line, flush=True)
