"""SIGTERM and SIGUSR1: somebody wants this worker's place. The run saves and can be started again.

Schedulers send SIGTERM some time before SIGKILL; Slurm sends what `--signal=USR1@120` asks for.
On one machine `deepspeed` hands no signal on: it dies of it and its workers would train for ever,
so that they take the end of their launcher for the request.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from pathlib import Path
from types import FrameType

import psutil

from dist_dml.errors import Stopped

_LOOK_SECONDS = 1.0
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this worker has been asked to stop.

    Until `hold` the request ends the process at once, as there is nothing to save; from then on the
    training looks at `asked` after each step.

    Attributes:
        asked: set by the first signal. Later ones change nothing: the save is under way.
    """

    def __init__(self) -> None:
        self.asked = False
        self.name = ""
        self._held = False

    def is_asked(self) -> bool:
        """Whether this worker has been asked to stop."""
        return self.asked

    def install(self) -> None:
        """Take the signals over; in the main thread alone, as Python has it."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, self._receive)
        if launchers := deepspeed_launchers():
            watch = threading.Thread(target=self._outlive, args=(launchers,), daemon=True)
            watch.start()

    def hold(self) -> None:
        """There is something to save from now on.

        Raises:
            Stopped: if the request came before.
        """
        self._held = True
        if self.asked:
            raise Stopped(f"{self.name} came before the first step; there was nothing to save")

    def _outlive(self, launchers: list[psutil.Process]) -> None:
        while all(_is_alive(launcher) for launcher in launchers):
            time.sleep(_LOOK_SECONDS)
        if not self.asked:
            self.name, self.asked = "its launcher is gone", True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        again = self.asked
        if not again:
            self.name, self.asked = signal.Signals(number).name, True
        if not again and not self._held:
            raise Stopped(f"{self.name} came before the first step; there was nothing to save")


def deepspeed_launchers() -> list[psutil.Process]:
    """The processes of DeepSpeed's launcher above this one; none under any other launcher."""
    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents()[:2]:
            words = process.cmdline()
            if not any(_is_deepspeed(word) for word in words[:5]):
                break
            found.append(process)
    return found


def _is_alive(process: psutil.Process) -> bool:
    """One that nobody has buried yet is not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _is_deepspeed(word: str) -> bool:
    return word.startswith("deepspeed.launcher") or Path(word).name in ("deepspeed", "ds")
