"""Remote shards brought to the cache before the plan needs them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from dist_dml.data.faults import StorageFault
from dist_dml.data.reader import Reader
from dist_dml.data.remote_client import RemoteFile
from dist_dml.data.retry import Interrupted
from dist_dml.data.shard_cache import ShardCache
from dist_dml.data_config import StorageConfig
from dist_dml.errors import UsageError

_THREADS = 4
_CLOSE_SECONDS = 10.0


@dataclass
class _Shared:
    """What the threads work on. They hold this and not the Prefetcher, which may then be freed."""

    cache: ShardCache
    files: tuple[str | RemoteFile, ...]
    waiting: list[int] = field(default_factory=list)
    """Codes to fetch, the next one first."""
    failed: dict[int, str] = field(default_factory=dict)
    condition: threading.Condition = field(default_factory=threading.Condition)
    stop: threading.Event = field(default_factory=threading.Event)


class Prefetcher:
    """Daemon threads that fetch the shards which come next, in order.

    A shard that cannot be fetched ahead is left to the reader that needs it: it tries again and
    raises. So the plan is served or the run ends, and nothing is skipped. Close it, or let it be
    freed: at the end of the program it stops by itself, in the middle of a fetch if need be.
    """

    def __init__(
        self, cache: ShardCache, files: Sequence[str | RemoteFile], num_threads: int = _THREADS
    ) -> None:
        """
        Args:
            cache: of the readers.
            files: the tar of each shard code; local ones are passed over.
            num_threads: shards that are fetched at a time; each takes about 10 MiB.
        """
        self._shared = _Shared(cache, tuple(files))
        self._codes: tuple[int, ...] = ()
        threads = [
            threading.Thread(target=_work, args=(self._shared,), name=f"fetch-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in threads:
            thread.start()
        # Also runs when the program ends, before daemon threads are frozen where they stand.
        self._finalizer = weakref.finalize(self, _stop, self._shared, threads)

    @classmethod
    def of_reader(cls, reader: Reader, storage: StorageConfig) -> Prefetcher | None:
        """One for the shards of a reader; None if all of them are local."""
        if not any(isinstance(file, RemoteFile) for file in reader.files):
            return None
        return cls(reader.cache, reader.files, min(_THREADS, storage.ahead_shards))

    @property
    def failures(self) -> dict[int, str]:
        """Shards that could not be fetched ahead, and why; the reader has the last word."""
        with self._shared.condition:
            return dict(self._shared.failed)

    def follow(self, codes: Sequence[int] | Int[np.ndarray, " s"]) -> None:
        """Fetch these shards, in this order. Returns at once; the same codes again cost nothing.

        How many there are is the bound: `Plan.shards_ahead` names those of the present window and
        the next few. Those of an earlier call that are not among them are not begun any more.
        """
        shared, before = self._shared, self._codes
        remote = (int(code) for code in codes if isinstance(shared.files[code], RemoteFile))
        self._codes = tuple(dict.fromkeys(remote))
        if self._codes == before:
            return
        with shared.condition:
            begun = set(before) - set(shared.waiting)
            shared.waiting[:] = [code for code in self._codes if code not in begun]
            for code in shared.waiting:
                shared.failed.pop(code, None)
            shared.condition.notify_all()

    def close(self) -> None:
        """Stop and wait for the threads."""
        self._finalizer()


def _work(shared: _Shared) -> None:
    while True:
        with shared.condition:
            while not shared.waiting and not shared.stop.is_set():
                shared.condition.wait()
            if shared.stop.is_set():
                return
            code = shared.waiting.pop(0)
        file = shared.files[code]
        assert isinstance(file, RemoteFile)
        try:
            shared.cache.fetch(file, shared.stop)
        except Interrupted:
            return
        except (StorageFault, UsageError) as error:
            with shared.condition:
                shared.failed[code] = str(error)
        except RuntimeError as error:
            # Python refuses new work a moment before it calls `_stop` at the end of the program.
            if "interpreter shutdown" in str(error):
                return
            raise


def _stop(shared: _Shared, threads: list[threading.Thread]) -> None:
    shared.stop.set()
    with shared.condition:
        shared.condition.notify_all()
    for thread in threads:
        if thread is not threading.current_thread():  # The collector may run in any thread.
            thread.join(_CLOSE_SECONDS)
