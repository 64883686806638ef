"""Progress lines of long jobs, with the rate and the time left."""

import time
from collections.abc import Callable

# Least time between two lines.
_SECONDS = 10.0


class Progress:
    """Counts finished items, and writes a line every ten seconds and at the end."""

    def __init__(self, name: str, total: int, unit: str, write: Callable[[str], None]):
        self._name, self._total, self._unit, self._write = name, total, unit, write
        self._done = 0
        self._start = self._written = time.monotonic()

    def add(self, count: int = 1, note: str = "") -> None:
        """Counts `count` more finished items; `note` ends the line, if one is due."""
        self._done += count
        now = time.monotonic()
        if now - self._written < _SECONDS and self._done < self._total:
            return
        self._written = now
        rate = self._done / max(now - self._start, 1e-9)
        left = format_duration((self._total - self._done) / rate)
        self._write(
            f"{self._name}: {self._done:,} of {self._total:,} {self._unit}, {rate:,.2f}/s,"
            f" {left} left{note}"
        )


def format_duration(seconds: float) -> str:
    """Returns hours, minutes and seconds as `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
