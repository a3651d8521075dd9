"""One process writes a run folder: whoever else comes is refused, not mixed in."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path

from dist_dml.errors import UsageError

_FILE = "run.lock"
# An attempt that is being ended while the next one starts: its workers have 30 s to notice.
_PATIENCE_SECONDS = 45.0


class RunLock:
    """Holds a run folder; the system lets go of it for a process that dies.

    On a file system without `flock` it holds nothing, and says nothing.
    """

    def __init__(self) -> None:
        self._descriptor = -1

    def acquire(self, folder: Path, patience_seconds: float = _PATIENCE_SECONDS) -> None:
        """Take the folder, which exists; nothing if it is held by this lock already.

        Raises:
            UsageError: another process holds it, also after some patience.
            OSError: the folder cannot be written.
        """
        if self._descriptor >= 0:
            return
        descriptor = os.open(folder / _FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                if time.monotonic() > deadline:
                    os.close(descriptor)
                    raise UsageError(
                        f"{folder} is in use by {holder or 'another process'}; wait for its end or "
                        "end it, or choose another run.name"
                    ) from None
                time.sleep(0.2)
            except OSError:
                break
        self._descriptor = descriptor
        with contextlib.suppress(OSError):  # For people; a full disk is found elsewhere.
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Let go of it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1
