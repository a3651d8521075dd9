"""One line on stderr: how far a long job is, how fast it goes, how long it will take."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_TERMINAL_SECONDS = 0.2
_FILE_SECONDS = 10.0


class ProgressLine:
    """Counts finished items and prints them at a bounded rate.

    A terminal gets one line that is drawn over; a file gets a line every ten seconds, so that the
    log of a batch job stays readable.
    """

    def __init__(self, label: str, total: float, unit: str, stream: TextIO | None = None) -> None:
        """
        Args:
            label: what is being done.
            total: items to do, in `unit`; 0 if nobody knows.
            unit: plural name of the items.
            stream: where to print; stderr by default.
        """
        self._label, self._total, self._unit = label, total, unit
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._done = 0.0
        self._started = self._printed = time.monotonic()

    def advance(self, count: float) -> None:
        """Count `count` more items as done; prints if the last line is old enough."""
        self._done += count
        now = time.monotonic()
        if now - self._printed >= (_TERMINAL_SECONDS if self._terminal else _FILE_SECONDS):
            self._printed = now
            print(
                ("\r\x1b[K" if self._terminal else "") + self._line(now),
                end="" if self._terminal else "\n",
                file=self._stream,
                flush=True,
            )

    def finish(self) -> float:
        """Print the last line. Returns the seconds since the start."""
        seconds = time.monotonic() - self._started
        rate = self._done / max(seconds, 1e-9)
        start = "\r\x1b[K" if self._terminal else ""
        line = f"{self._label}: {self._done:,.0f} {self._unit} in {seconds:.1f} s ({rate:,.0f}/s)"
        print(start + line, file=self._stream, flush=True)
        return seconds

    def _line(self, now: float) -> str:
        rate = self._done / max(now - self._started, 1e-9)
        if self._total <= 0:
            return f"{self._label}: {self._done:,.0f} {self._unit}, {rate:,.0f}/s"
        left = (self._total - self._done) / max(rate, 1e-9)
        return (
            f"{self._label}: {self._done:,.0f} of {self._total:,.0f} {self._unit}, "
            f"{rate:,.0f}/s, {left:.0f} s left"
        )
