"""Runs a command, and ends it with all that it has started when whoever asked for it is gone.

`python -m dist_dml.protocol_guard COMMAND ...`. Standard input is a pipe that the asker holds open:
closing it, or dying in whatever way, ends the command. A signal to a process group would not do:
torchrun gives each worker a session of its own, and nobody sends it where the asker was killed.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import psutil

_POLL_SECONDS = 0.1
_LOOK_SECONDS = 1.0
GRACE_SECONDS = 10.0
"""What the processes of an ended command have between the polite signal and the other one."""


def run_guarded(command: Sequence[str], ended: threading.Event) -> int:
    """Run a command until it ends or `ended` is set. Returns its exit code, 128 + n for signal n.

    A command that is ended, or fails, leaves no process behind, also none that has lost its
    parent; one that ends well may (the mirror to MLflow finishes by itself).
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    leader = psutil.Process(process.pid)
    family: dict[int, psutil.Process] = {}
    looked = 0.0
    while process.poll() is None and not ended.wait(_POLL_SECONDS):
        # Remembered as it grows: the workers of a launcher that is killed have no parent any more.
        if time.monotonic() - looked > _LOOK_SECONDS:
            looked = time.monotonic()
            family |= _descendants(leader)
    if process.poll() == 0:
        return 0
    _end(process, list((family | _descendants(leader)).values()))
    code = process.wait()
    return code if code >= 0 else 128 - code


def _descendants(leader: psutil.Process) -> dict[int, psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return {child.pid: child for child in leader.children(recursive=True)}
    return {}


def _end(leader: subprocess.Popen[bytes], others: Sequence[psutil.Process]) -> None:
    """Ask all to end, then make them. psutil knows a process from a later one of its number."""
    for act in ("terminate", "kill"):
        deadline = time.monotonic() + GRACE_SECONDS
        for process in (leader, *others):
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(process, act)()
        while time.monotonic() < deadline:
            if leader.poll() is not None and not any(map(_is_alive, others)):
                return
            time.sleep(_POLL_SECONDS / 2)


def _is_alive(process: psutil.Process) -> bool:
    """Whether it can still do anything: one that nobody has buried yet cannot."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def main(argv: Sequence[str]) -> int:
    """Guard the command `argv` until it ends or standard input does."""
    ended = threading.Event()

    def watch() -> None:
        with contextlib.suppress(OSError):
            while sys.stdin.buffer.read(1):
                pass
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: ended.set())
    threading.Thread(target=watch, name="asker watch", daemon=True).start()
    code = run_guarded(argv, ended)
    # The thread may hold the lock of standard input, at which the interpreter's end would fail.
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    import os

    os._exit(main(sys.argv[1:]))
