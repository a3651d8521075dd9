"""The live line: how far training is, how fast, and whether it waits for data."""

from __future__ import annotations

import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

REDRAW_SECONDS = 0.2
WINDOW_SECONDS = 20.0
LEAST_BAR = 8
MOST_BAR = 30


@runtime_checkable
class Stream(Protocol):
    """What the line writes to: standard error, or anything like it."""

    def write(self, text: str, /) -> int:
        """Append text."""
        ...

    def flush(self) -> None:
        """Hand on what was written."""
        ...

    def isatty(self) -> bool:
        """Whether a person watches a terminal."""
        ...


@dataclass(frozen=True)
class Progress:
    """What the line shows. None stands for what is not known yet.

    Attributes:
        wait_share: part of the recent time spent waiting for data, 0..1.
        eta_seconds: time to the last step at the recent rate, evaluations not counted.
        time: seconds of training done and allowed, where there is a limit.
    """

    step: int
    total_steps: int
    epoch: int
    images_per_second: float | None
    wait_share: float | None
    loss: float | None
    eta_seconds: float | None
    time: tuple[float, float] | None = None


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds: "7:05", "1:02:03", "3d 04:05" from a day on."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def format_line(progress: Progress, columns: int = 0, blocks: str = "#-") -> str:
    """The line as text, at most `columns` characters wide; 0 stands for no limit and no bar.

    Args:
        progress: what to show.
        columns: width of the terminal. What does not fit is cut off on the right; the bar appears
            where at least 8 characters are left for it.
        blocks: the two characters of the bar, done and to do.
    """
    width = len(str(progress.total_steps))
    share = min(1.0, progress.step / max(1, progress.total_steps))
    parts = [f"step {progress.step:{width}d}/{progress.total_steps}"]
    if progress.time is not None and progress.time[0] / progress.time[1] > share:
        share = min(1.0, progress.time[0] / progress.time[1])
        # The last step is not known where time ends the training.
        parts = [f"step {progress.step}", f"{progress.time[0]:.0f}/{progress.time[1]:.0f} s"]
    parts.append(f"epoch {progress.epoch}")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.images_per_second is not None:
        parts.append(f"{_rounded(progress.images_per_second)} images/s")
    if progress.wait_share is not None:
        parts.append(f"waits for data {100 * progress.wait_share:.0f}%")
    if progress.eta_seconds is not None:
        parts.append(f"ETA {format_duration(progress.eta_seconds)}")
    text = "  ".join(parts)
    if columns <= 0:
        return text
    bar = min(MOST_BAR, columns - len(text) - len("100% ") - 2)
    if bar < LEAST_BAR:
        return text[:columns]
    done = int(share * bar)
    return f"{int(100 * share):3d}% {blocks[0] * done}{blocks[1] * (bar - done)}  {text}"


def _rounded(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"


class LiveLine:
    """Shows progress on a stream: redrawn in place on a terminal, else a line per interval.

    Rates are those of the last 20 seconds, from the first update of this process on: a run resumed
    at step 1000 shows its real speed. Writes no escape codes. A stream that breaks (a closed pipe)
    ends the line, not the run.
    """

    def __init__(
        self,
        total_steps: int,
        stream: Stream | None = None,
        interval_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        max_seconds: float = 0.0,
        training_seconds: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """Show nothing yet.

        Args:
            total_steps: optimizer steps of the whole training, before a resume included.
            stream: where to write; standard error by default.
            interval_seconds: time between two lines where there is no terminal.
            clock: seconds that only grow.
            max_seconds: of training, where that is limited; else 0.
            training_seconds: how many of them are spent.
        """
        self._max_seconds, self._training_seconds = max_seconds, training_seconds
        self._total_steps = total_steps
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._terminal = self._stream.isatty()
        self._every = REDRAW_SECONDS if self._terminal else interval_seconds
        # (time, step, images seen, seconds waited) of recent updates, oldest first.
        self._window: deque[tuple[float, int, int, float]] = deque()
        self._progress: Progress | None = None
        self._loss: float | None = None
        self._epoch = 0
        self._drawn_at: float | None = None
        self._drawn_width = 0
        self._is_stale = False

    def begin(self, step: int, images_seen: int, wait_seconds: float) -> None:
        """Start to measure here: at the first step, and again after an evaluation or a save.

        Without the second, their time would count as slow training.
        """
        self._window.clear()
        self._window.append((self._clock(), step, images_seen, wait_seconds))

    def update(
        self,
        step: int,
        epoch: int,
        images_seen: int,
        wait_seconds: float,
        loss: float | None = None,
    ) -> None:
        """Take note of a step that is done, and show it when it is time to. Costs microseconds.

        Args:
            step: optimizer steps done, of the whole training.
            epoch: the current epoch as it is shown.
            images_seen: training images so far, over all workers.
            wait_seconds: time this process has waited for data so far.
            loss: a number on the host where there is a new one; else the line keeps the last.
        """
        now = self._clock()
        self._window.append((now, step, images_seen, wait_seconds))
        while len(self._window) > 2 and self._window[1][0] <= now - WINDOW_SECONDS:
            self._window.popleft()
        self._epoch = epoch
        self._loss = self._loss if loss is None else loss
        self._is_stale = True
        if self._drawn_at is None and not self._terminal:
            self._drawn_at = now - self._every + min(1.0, self._every)
        if self._drawn_at is None or now - self._drawn_at >= self._every:
            self._draw(now)

    def message(self, text: str) -> None:
        """Print a line of its own, above the bar where there is one."""
        blank = "\r" + " " * self._drawn_width + "\r" if self._drawn_width else ""
        self._write(f"{blank}{text}\n")
        self._drawn_width = 0
        self._is_stale = self._progress is not None

    def close(self) -> None:
        """Show the last step if it is not shown yet, and end the line."""
        if self._is_stale and self._window:
            self._draw(self._clock())
        if self._terminal and self._drawn_width:
            self._write("\n")
        self._drawn_width = 0
        self._is_stale = False

    def _draw(self, now: float) -> None:
        self._drawn_at = now
        self._is_stale = False
        self._progress = self._measure()
        if not self._terminal:
            self._write(format_line(self._progress) + "\n")
            return
        # The last column stays empty: some terminals begin a new line when it is written.
        columns = shutil.get_terminal_size().columns - 1
        utf8 = (getattr(self._stream, "encoding", None) or "").lower().replace("-", "") == "utf8"
        line = format_line(self._progress, columns, "█░" if utf8 else "#-")
        self._write("\r" + line.ljust(min(self._drawn_width, columns)))
        self._drawn_width = len(line)

    def _measure(self) -> Progress:
        first, last = self._window[0], self._window[-1]
        elapsed, steps = last[0] - first[0], last[1] - first[1]
        images_per_second = wait_share = eta = None
        if elapsed > 0 and steps > 0:
            images_per_second = (last[2] - first[2]) / elapsed
            wait_share = min(1.0, max(0.0, (last[3] - first[3]) / elapsed))
            eta = max(0, self._total_steps - last[1]) * elapsed / steps
        spent = None
        if self._max_seconds:
            spent = (self._training_seconds(), self._max_seconds)
            eta = None if eta is None else min(eta, max(0.0, spent[1] - spent[0]))
        return Progress(
            last[1],
            self._total_steps,
            self._epoch,
            images_per_second,
            wait_share,
            self._loss,
            eta,
            spent,
        )

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            # Nobody reads any more; the figures are in the run folder.
            self._every = float("inf")
