"""A failure seen by one worker stops all, within seconds, with the first worker's reason."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from dist_dml.errors import print_failure

_POLL_SECONDS = 0.5
# How long a worker that lost its peers waits for the reason that one of them may be writing.
_REASON_SECONDS = 3.0
# How long the first failure stays for the others to read its reason; one that hangs cannot hold it.
_READ_SECONDS = 10.0


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
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._acknowledged = False

    def report(self, reason: str, exit_code: int) -> None:
        """Write and print the reason if it is the first; give the others time to see it."""
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
        if first == mine:
            print_failure(reason)
            self._wait_for_readers()
        else:
            self._acknowledge()

    def _wait_for_readers(self) -> None:
        """Stay until all others have read the reason: the store may live in this process."""
        deadline = time.monotonic() + _READ_SECONDS
        try:
            while time.monotonic() < deadline:
                if self._store.add(self._seen_key, 0) >= self._size - 1:
                    return
                time.sleep(_POLL_SECONDS / 5)
        except (RuntimeError, dist.DistError):
            return  # The store went first; nobody reads any more.

    def _acknowledge(self) -> None:
        """Count this worker among the readers, once, though two threads may come here."""
        with self._lock:
            acknowledged, self._acknowledged = self._acknowledged, True
        if acknowledged:
            return
        with contextlib.suppress(RuntimeError, dist.DistError):
            self._store.add(self._seen_key, 1)

    def first_reason(self) -> dict | None:
        """The first failure, if one is known within a few seconds."""
        deadline = time.monotonic() + _REASON_SECONDS
        while time.monotonic() < deadline:
            if (failure := self._read()) is not None:
                return failure
            time.sleep(_POLL_SECONDS / 2)
        return None

    def watch(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._watch, name="failure watch", daemon=True).start()

    def close(self) -> None:
        """Stop watching, as the run is over."""
        self._closed.set()
        with self._lock:
            pass  # A look that is under way may still meet a store that is going away.

    def _read(self) -> dict | None:
        with self._lock:
            if self._closed.is_set() or not self._store.check([self._key]):
                return None
            return json.loads(self._store.get(self._key))

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_SECONDS):
            try:
                failure = self._read()
            except (RuntimeError, dist.DistError):
                if self._closed.is_set():
                    return
                # The worker that keeps the store died without a word (killed, out of memory).
                failure = {
                    "reason": "the worker that keeps the meeting point is gone: it was killed or "
                    "its machine failed; look at its own output, then start again with "
                    "--resume auto",
                    "exit_code": 1,
                    "rank": self._rank,
                    "host": "",
                }
            if failure is not None:
                self._end(failure)

    def _end(self, failure: dict) -> None:
        if failure["rank"] == self._rank and failure["host"]:
            return  # This worker's own report: its main thread is on its way out.
        elsewhere = failure["host"] not in ("", socket.gethostname())
        # Where worker 0 died without a word, the next one of its machine speaks for it.
        speaks_for_dead = not failure["host"] and self._local_rank <= 1
        if speaks_for_dead or (elsewhere and self._local_rank == 0):
            print_failure(failure["reason"])
        sys.stdout.flush()
        sys.stderr.flush()
        self._acknowledge()
        os._exit(failure["exit_code"])
