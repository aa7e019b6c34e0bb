"""Progress of long work: a line at most every ten seconds, for a terminal and a log alike."""

import time

SECONDS = 10.0  # between two lines


class Progress:
    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, line: str) -> None:
        if time.monotonic() - self._last >= SECONDS:
            self._last = time.monotonic()
            print(line, flush=True)
