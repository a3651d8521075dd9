"""Shards of an object store as local files: bounded, shared by processes, and never stale."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from dist_dml.credentials import expand
from dist_dml.data.faults import StorageFault
from dist_dml.data.locked_files import (
    HolderStalled,
    has_name,
    locked_file,
    pause,
    remove_unlocked,
)
from dist_dml.data.remote import read_blocks
from dist_dml.data.remote_client import STALL_SECONDS, RemoteFile
from dist_dml.data.retry import Retry, hide_secrets, plain_urls
from dist_dml.data_config import StorageConfig
from dist_dml.errors import UsageError

MEBIBYTE = 2**20
_WHOLE, _PART, _FAILED, _ROOM = ".shard", ".part", ".failed", "room.lock"
_MOST_EVICTIONS = 8
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class ShardCache:
    """A folder of whole shards, each called by a hash of URL, size and tag. Picklable.

    A changed object has another name, so an old file is never taken for it. A shard is fetched by
    one process, which holds a lock on its unfinished file; the system releases the lock if that
    process dies. What is used least recently leaves first. Files that are open stay readable.

    Attributes:
        folder: created on first use.
        limit_bytes: of whole and unfinished shards together. Files that were evicted and that some
            process still holds open take space beyond it, until that process opens its next shard.
        retry: for the store.
    """

    folder: Path
    limit_bytes: int
    retry: Retry

    @classmethod
    def of_config(cls, storage: StorageConfig) -> ShardCache:
        """The cache that a configuration describes."""
        folder = storage.cache or os.path.join(tempfile.gettempdir(), "dist_dml")
        retry = Retry(storage.retries, storage.retry_seconds)
        return cls(Path(folder), storage.cache_mebibytes * MEBIBYTE, retry)

    def check_limit(self, bytes_of_two_windows: int) -> None:
        """Refuse a limit below what two windows of shards need: each would evict the other.

        Raises:
            UsageError: states both numbers and the keys.
        """
        if bytes_of_two_windows > self.limit_bytes:
            needed = -(-bytes_of_two_windows // MEBIBYTE)
            raise UsageError(
                f"data.storage.cache_mebibytes={self.limit_bytes // MEBIBYTE} cannot hold two "
                f"windows of shards, which take {needed} MiB; set it to {needed} or more, or lower "
                "data.window_shards or data.storage.ahead_shards"
            )

    def path(self, file: RemoteFile) -> Path:
        """Where a shard lies once it is here."""
        identity = "\0".join((file.url, str(file.size), file.tag))
        if "${" in file.url:  # Whose value may be another host. Not its secrets: they get renewed.
            identity += "\0" + plain_urls(expand(file.url, "shard URL"))
        return self.folder / (hashlib.sha256(identity.encode()).hexdigest()[:32] + _WHOLE)

    def fetch(self, file: RemoteFile, stop: threading.Event | None = None) -> None:
        """Bring a shard here unless it is, and mark it as used.

        Raises:
            UsageError, StorageFault, Interrupted: as `open`.
        """
        os.close(self.open(file, stop))

    def open(self, file: RemoteFile, stop: threading.Event | None = None) -> int:
        """A descriptor of the whole shard, which is fetched if need be. It outlives eviction.

        Raises:
            UsageError: the folder cannot be used, or the limit is below this shard's size.
            StorageFault: the store does not give the shard, it changed, the disk is full, or
                another process fetches it and has stalled.
            Interrupted: `stop` was set.
        """
        self._prepare(file)
        for _ in range(_MOST_EVICTIONS):
            descriptor = self._open_whole(file)
            if descriptor is None:
                descriptor = self._fetched(file, stop)
            if descriptor is not None:
                return descriptor
        raise StorageFault(
            f"{hide_secrets(file.url)} left data.storage.cache={self.folder} as often as it came; "
            f"raise data.storage.cache_mebibytes={self.limit_bytes // MEBIBYTE}"
        )

    def drop(self, file: RemoteFile) -> None:
        """Forget a shard whose file is damaged; the next `open` fetches it again."""
        self.path(file).unlink(missing_ok=True)

    def _prepare(self, file: RemoteFile) -> None:
        if file.size > self.limit_bytes:
            raise UsageError(
                f"{hide_secrets(file.url)} has {file.size:,} bytes, more than "
                f"data.storage.cache_mebibytes={self.limit_bytes // MEBIBYTE} holds; raise it"
            )
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = self.folder.stat().st_uid
        except OSError as error:
            raise self._unusable(error) from None
        if self.folder.parent == Path(tempfile.gettempdir()) and owner != os.getuid():
            # Anybody can make a folder of this name there, and put other images into it.
            raise UsageError(
                f"data.storage.cache={self.folder} belongs to another user; set data.storage.cache "
                "to a folder of your own"
            )

    def _unusable(self, error: OSError) -> UsageError:
        return UsageError(
            f"data.storage.cache={self.folder} cannot be used ({error.strerror}); set "
            "data.storage.cache to a local folder that you can write to"
        )

    def _open_whole(self, file: RemoteFile) -> int | None:
        try:
            descriptor = os.open(self.path(file), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(error) from None
        if os.fstat(descriptor).st_size != file.size:  # A power failure can leave it short.
            os.close(descriptor)
            self.drop(file)
            return None
        mark_used(descriptor)
        return descriptor

    def _fetched(self, file: RemoteFile, stop: threading.Event | None) -> int | None:
        """A descriptor of the shard, fetched here; None if another process did it meanwhile."""
        path = self.path(file)
        part_path = path.with_suffix(_PART)
        # A live holder writes, or is in its retries; only a stalled one does neither for so long.
        patience = (self.retry.retries + 2) * STALL_SECONDS + self.retry.pauses()
        began = time.time()
        try:
            with locked_file(part_path, patience, stop) as part, _removed_after(part, part_path):
                if path.exists():
                    return None
                self._try(part, file, began, stop)
                # Not a duplicate of `part`, which would keep the lock.
                descriptor = os.open(part_path, os.O_RDONLY | os.O_CLOEXEC)
                part_path.replace(path)
                return descriptor
        except HolderStalled:
            raise StorageFault(
                f"{hide_secrets(file.url)}: another process fetches it into {self.folder} and has "
                f"not got on for {patience:.0f} s; end it, or use another data.storage.cache"
            ) from None
        except OSError as error:
            raise self._unusable(error) from None

    def _try(self, part: int, file: RemoteFile, began: float, stop: threading.Event | None) -> None:
        """Fetch a shard; once only if this process has seen another one fail at it.

        One after the other, the processes of a machine would else wait for a store that is gone
        for as many times as long as the configuration says as there are processes.
        """
        failed, retry = self.path(file).with_suffix(_FAILED), self.retry
        waited = time.time() - began
        with suppress(FileNotFoundError):
            # One that failed early has less patience than this process, and says nothing.
            if failed.stat().st_mtime > began and waited >= retry.pauses() / 2:
                retry = replace(retry, retries=0)
        try:
            self._fill(part, file, retry, stop)
        except StorageFault as error:
            with suppress(OSError):
                failed.touch()  # While the lock is held: who waits for it sees it.
            if retry is self.retry:
                raise
            raise StorageFault(
                f"{error}; before, another process of this machine has tried for {waited:.1f} s"
            ) from None
        with suppress(OSError):
            failed.unlink()

    def _fill(
        self, part: int, file: RemoteFile, retry: Retry, stop: threading.Event | None
    ) -> None:
        os.ftruncate(part, 0)  # What a dead process left.
        while not self._reserve(part, file.size):
            pause(stop)
        position = 0
        with closing(read_blocks(file, retry, stop)) as blocks:
            for block in blocks:
                self._write(part, block, position)
                position += len(block)

    def _write(self, part: int, block: bytes, position: int) -> None:
        """Write all of a block, giving up other shards while the disk is full."""
        written = 0
        while written < len(block):
            try:
                written += os.pwrite(part, memoryview(block)[written:], position + written)
            except OSError as error:
                if error.errno not in _DISK_FULL:
                    raise
                with self._room():
                    removed = _remove_oldest(self._files(_WHOLE), len(block))
                if not removed:
                    raise StorageFault(
                        f"data.storage.cache={self.folder}: the disk is full ({error.strerror}); "
                        "make room, name a folder on another disk, or lower "
                        f"data.storage.cache_mebibytes={self.limit_bytes // MEBIBYTE}"
                    ) from None

    def _reserve(self, part: int, size: int) -> bool:
        """Make an unfinished file count with its final size, once others have left room for it."""
        with self._room():
            for _, abandoned, path in self._files(_PART):
                if abandoned:  # Not a file that was just made: its process is about to lock it.
                    remove_unlocked(path)
            # In this order: one that gets its final name meanwhile counts twice, not never.
            unfinished, whole = self._files(_PART), self._files(_WHOLE)
            excess = sum(held for _, held, _ in whole + unfinished) + size - self.limit_bytes
            if excess > sum(held for _, held, _ in whole):
                return False  # Too much is being fetched at once; it will end.
            _remove_oldest(whole, excess)
            os.ftruncate(part, size)
            return True

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Alone among all processes: what is counted cannot grow meanwhile."""
        with locked_file(self.folder / _ROOM, STALL_SECONDS):
            yield

    def _files(self, suffix: str) -> list[tuple[int, int, Path]]:
        """Time of last use (ns), size and path of the files of one kind."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(suffix):
                    with suppress(FileNotFoundError):
                        status = entry.stat()
                        found.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
        return found


def mark_used(descriptor: int) -> None:
    """Note that an open shard is in use: it leaves the cache after those that are not."""
    with suppress(OSError):  # A folder that users share: not ours to date.
        os.utime(descriptor)


def _remove_oldest(files: list[tuple[int, int, Path]], size: int) -> int:
    """Remove the least recently used until `size` bytes are gone. Returns the bytes removed."""
    removed = 0
    for _, file_size, path in sorted(files):
        if removed >= size:
            break
        path.unlink(missing_ok=True)
        removed += file_size
    return removed


@contextmanager
def _removed_after(part: int, path: Path) -> Iterator[None]:
    """Remove an unfinished file before its lock is released, unless it got its final name."""
    try:
        yield
    finally:
        if has_name(part, path):
            path.unlink()
