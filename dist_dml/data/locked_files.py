"""Files that one process of a machine works on at a time; the system frees those of the dead."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dist_dml.data.retry import Interrupted

_POLL_SECONDS = 0.05


class HolderStalled(Exception):
    """The process that holds a lock neither writes nor ends."""


@contextmanager
def locked_file(path: Path, patience: float, stop: threading.Event | None = None) -> Iterator[int]:
    """An exclusive lock on the file that has this name, made empty if there is none.

    Yields a descriptor for reading and writing. The holder may rename or remove the file: who waits
    for it then looks for the name anew. Threads exclude each other as processes do.

    Args:
        path: on a file system with `flock`; network ones of this century have it.
        patience: seconds without a change of the file after which its holder counts as stalled.
        stop: ends the waiting.

    Raises:
        HolderStalled: see `patience`.
        Interrupted: `stop` was set.
        OSError: the file cannot be made or locked.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _wait_for_lock(descriptor, patience, stop)
            if has_name(descriptor, path):
                yield descriptor
                return
        finally:
            # Releases the lock: nobody has duplicated the descriptor.
            os.close(descriptor)


def remove_unlocked(path: Path) -> bool:
    """Remove a file that no living process has locked. Returns whether it did."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if has_name(descriptor, path):
                path.unlink()
                return True
        finally:
            os.close(descriptor)
    return False


def has_name(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def pause(stop: threading.Event | None) -> None:
    """Wait for 50 ms.

    Raises:
        Interrupted: `stop` was set.
    """
    if stop is None:
        time.sleep(_POLL_SECONDS)
    elif stop.wait(_POLL_SECONDS):
        raise Interrupted


def _wait_for_lock(descriptor: int, patience: float, stop: threading.Event | None) -> None:
    written, since = -1, time.monotonic()
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            last = os.fstat(descriptor).st_mtime_ns
        if last != written:
            written, since = last, time.monotonic()
        if time.monotonic() - since > patience:
            raise HolderStalled
        pause(stop)
