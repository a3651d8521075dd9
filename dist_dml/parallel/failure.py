"""A failure seen by one worker stops all, within seconds, with the first worker's reason."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from dist_dml.errors import print_failure

_POLL_SECONDS = 0.5
# How long a worker that lost its peers waits for the reason that one of them may be writing.
_REASON_SECONDS = 3.0
# How long the first failure stays for the others to read its reason; one that hangs cannot hold it.
_READ_SECONDS = 10.0
# A store whose machine is cut off answers neither yes nor no, and its calls do not end.
_SILENT_SECONDS = 2.0
_LAST_SECONDS = _REASON_SECONDS + _READ_SECONDS + 7.0


class _Silent(RuntimeError):
    """The store does not answer."""


class FailureBoard:
    """One entry in the workers' store: the first failure. Every worker watches it from a thread.

    A worker that waits in a collective cannot look, so the thread ends the process, with the first
    failure's exit code. Only the worker that failed first prints, and one worker on every other
    machine, so that each screen shows the reason once.
    """

    def __init__(
        self, store: TCPStore, rank: int, size: int, local_rank: int, attempt: str
    ) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._local_rank = local_rank
        self._seen_key = f"workers that know of it {attempt}"
        self._key = f"first failure {attempt}"
        self._attempt = attempt
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._ending = threading.Lock()
        self._bounded = False

    def bound(self, reason: str, exit_code: int) -> None:
        """End this process with its own reason in 20 s, unless it has ended: also where the store
        is beyond a link that is cut, whose calls neither answer nor fail."""
        if self._bounded:
            return
        self._bounded = True

        def end() -> None:
            # Not where the other thread that ends the process has said something already.
            if self._ending.acquire(blocking=False):
                print_failure(reason)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(exit_code)

        timer = threading.Timer(_LAST_SECONDS, end)
        timer.daemon = True
        timer.start()

    def report(self, reason: str, exit_code: int) -> NoReturn:
        """Make this the first failure, if there is none, and end this process with the first's."""
        self.bound(reason, exit_code)
        mine = {
            "reason": reason,
            "exit_code": exit_code,
            "rank": self._rank,
            "host": socket.gethostname(),
        }
        try:
            text = json.dumps(mine)
            first = json.loads(self._store.compare_set(self._key, "", text))
        except (RuntimeError, dist.DistError):
            first = mine  # The store died with its worker: say at least what is known here.
        self._end(first)

    def follow(self) -> None:
        """End this process if another's failure is known within a few seconds, else return."""
        deadline = time.monotonic() + _REASON_SECONDS
        while time.monotonic() < deadline:
            if (failure := self._look()) is not None:
                self._end(failure)
            time.sleep(_POLL_SECONDS / 2)

    def post(self, key: str, text: str) -> None:
        """Write something that other workers may read."""
        with contextlib.suppress(RuntimeError, dist.DistError), self._holding():
            if not self._closed.is_set():
                self._store.set(f"{key} {self._attempt}", text)

    def read(self, key: str) -> str | None:
        """What was posted; None if nothing was."""
        name = f"{key} {self._attempt}"
        with contextlib.suppress(RuntimeError, dist.DistError), self._holding():
            if not self._closed.is_set() and self._store.check([name]):
                return self._store.get(name).decode()
        return None

    def claim(self, key: str, text: str) -> str | None:
        """Post, unless somebody has; what is there in the end. None without an answer."""
        with contextlib.suppress(RuntimeError, dist.DistError), self._holding():
            if not self._closed.is_set():
                return self._store.compare_set(f"{key} {self._attempt}", "", text).decode()
        return None

    def watch(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._watch, name="failure watch", daemon=True).start()

    def close(self) -> None:
        """Stop watching, as the run is over."""
        self._closed.set()
        with contextlib.suppress(RuntimeError), self._holding():
            pass  # A look that is under way may still meet a store that is going away.

    @contextlib.contextmanager
    def _holding(self) -> Iterator[None]:
        """The lock. Raises `_Silent` where another thread has waited for the store for seconds."""
        if not self._lock.acquire(timeout=_SILENT_SECONDS):
            raise _Silent
        try:
            yield
        finally:
            self._lock.release()

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_SECONDS):
            if (failure := self._look()) is not None:
                self._end(failure)

    def _look(self) -> dict | None:
        """The first failure, or that of the worker that keeps the store; None while all is well."""
        try:
            with self._holding():
                if self._closed.is_set() or not self._store.check([self._key]):
                    return None
                return json.loads(self._store.get(self._key))
        except _Silent:
            return None
        except (RuntimeError, dist.DistError):
            if self._closed.is_set():
                return None
            # The worker that keeps the store died without a word (killed, out of memory).
            return {
                "reason": "the worker that keeps the meeting point is gone: it was killed or "
                "its machine failed; look at its own output, then start again with "
                "--resume auto",
                "exit_code": 1,
                "rank": None,
                "host": "",
            }

    def _end(self, failure: dict) -> NoReturn:
        # Never released: the other thread that comes here waits for the end of the process.
        self._ending.acquire()
        if self._speaks_for(failure):
            print_failure(failure["reason"])
        sys.stdout.flush()
        sys.stderr.flush()
        is_own = failure["rank"] == self._rank
        with contextlib.suppress(RuntimeError, dist.DistError):
            if not is_own:
                self._store.add(self._seen_key, 1)
            # The store may live in worker 0. If that left first, the others would take it for dead.
            if is_own or self._rank == 0:
                self._wait_for_readers()
        os._exit(failure["exit_code"])

    def _speaks_for(self, failure: dict) -> bool:
        """Whether this worker prints: the one that failed, one on every other machine."""
        if failure["host"] == "":
            # Where worker 0 died without a word, the next one of its machine speaks for it.
            return self._local_rank <= 1
        elsewhere = failure["host"] != socket.gethostname()
        return failure["rank"] == self._rank or (elsewhere and self._local_rank == 0)

    def _wait_for_readers(self) -> None:
        """Stay until all others have read the reason."""
        deadline = time.monotonic() + _READ_SECONDS
        while time.monotonic() < deadline and self._store.add(self._seen_key, 0) < self._size - 1:
            time.sleep(_POLL_SECONDS / 5)
