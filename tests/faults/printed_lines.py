"""What a process prints, line by line, while it runs."""

from __future__ import annotations

import subprocess
import threading
import time


class PrintedLines:
    """Reads the output of a process that was started with a pipe.

    Attributes:
        process: whose output it is.
        lines: printed so far.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            for line in stream:
                self.lines.append(line.rstrip("\n"))

    def until(self, *texts: str, seconds: float = 60) -> None:
        """Wait for a line with one of the texts."""
        deadline = time.monotonic() + seconds
        while not any(text in line for line in list(self.lines) for text in texts):
            assert self.process.poll() is None, self.lines
            assert time.monotonic() < deadline, self.lines
            time.sleep(0.01)

    def end(self, seconds: float) -> int:
        """Wait for the end of the process and of its output. Returns the exit code."""
        code = self.process.wait(seconds)
        self._thread.join(30)
        return code
