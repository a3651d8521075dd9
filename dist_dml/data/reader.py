"""From a place in a shard to the pixels of an image: reads by offset, locally or from a cache."""

from __future__ import annotations

import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from dist_dml.data.decode import decode
from dist_dml.data.faults import BadSample, StorageFault
from dist_dml.data.index import Index
from dist_dml.data.remote import check_clients, is_remote, read_range
from dist_dml.data.remote_client import RemoteFile
from dist_dml.data.retry import hide_secrets
from dist_dml.data.shard_cache import MEBIBYTE, ShardCache, mark_used
from dist_dml.data_config import DataConfig, StorageConfig
from dist_dml.errors import RunError, UsageError

_OPEN_SHARDS = 256
_USED_SECONDS = 10.0
"""How often the use of a cached shard is noted; a window lasts minutes."""


class Reader:
    """Reads images of a data set by (shard, offset, size). Picklable; opens tars on first use.

    At most 256 tars are open at a time, so that a process stays below its limit of descriptors.

    Attributes:
        files: the tar of each shard code: a local path, or what to fetch into the cache.
        cache: where remote shards are kept.
    """

    def __init__(
        self,
        files: Sequence[str | RemoteFile],
        channels: int,
        cache: ShardCache | None = None,
    ) -> None:
        """
        Args:
            files: the tar of each shard code.
            channels: 1 decodes to grey, 3 to RGB.
            cache: for remote shards; its retries are for local ones too. Default: the one of an
                empty configuration.
        """
        self.files = tuple(files)
        self.cache = cache or ShardCache.of_config(StorageConfig())
        self._channels = channels
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._used: dict[int, float] = {}

    def __getstate__(self) -> tuple[tuple[str | RemoteFile, ...], int, ShardCache]:
        return self.files, self._channels, self.cache

    def __setstate__(self, state: tuple[tuple[str | RemoteFile, ...], int, ShardCache]) -> None:
        self.__init__(*state)

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes of a tar from `offset` on. 10-25 us where the page cache holds them.

        Raises:
            BadSample: if the tar ends before.
            StorageFault: if the bytes cannot be had, after the retries.
        """
        file = self.files[shard]
        if isinstance(file, RemoteFile):
            return self._read_cached(shard, file, offset, size)
        return self.cache.retry.run(
            file, lambda: self._pread(shard, offset, size), names_may_return=True
        )

    def checked_bytes(self, shard: int, offset: int, size: int, checksum: int) -> bytes:
        """`read`, refusing bytes that are not those that were indexed.

        The copy of a remote shard is not trusted in that: the store itself is asked for the bytes,
        and a copy that is at fault is dropped.

        Raises:
            BadSample: if the tar ends before, or its bytes are not those that were indexed.
            StorageFault: if the bytes cannot be had, after the retries.
        """
        data = self.read(shard, offset, size)
        if zlib.crc32(data) == checksum:
            return data
        file = self.files[shard]
        if isinstance(file, RemoteFile):
            data = read_range(file, offset, size, self.cache.retry)
            if zlib.crc32(data) == checksum:
                self._close(shard)
                self.cache.drop(file)
                return data
        raise BadSample("its bytes changed after they were indexed (checksum differs)", "checksum")

    def image(
        self, shard: int, offset: int, size: int, checksum: int
    ) -> UInt8[np.ndarray, "H W C"]:
        """The decoded image at a place, in the reader's number of channels.

        Raises:
            BadSample: if its bytes are not those that were indexed, or not an image.
            StorageFault: if the bytes cannot be had, after the retries.
        """
        return decode(self.checked_bytes(shard, offset, size, checksum), self._channels)

    def _read_cached(self, shard: int, file: RemoteFile, offset: int, size: int) -> bytes:
        now = time.monotonic()
        if now > self._used.get(shard, 0.0) + _USED_SECONDS and shard in self._descriptors:
            mark_used(self._descriptors[shard])
            self._used[shard] = now
        try:
            return self._pread(shard, offset, size)
        except OSError as error:
            raise StorageFault(f"{self.cache.path(file)}: {error.strerror}") from None

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        try:
            descriptor = self._descriptor(shard)
            data = os.pread(descriptor, size, offset)
            while 0 < len(data) < size:
                more = os.pread(descriptor, size - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except OSError:
            self._close(shard)  # A network file system can lose a handle for good (ESTALE).
            raise
        if len(data) != size:
            raise BadSample(f"the shard ends after {len(data)} of its {size} bytes", "cut_short")
        return data

    def _descriptor(self, shard: int) -> int:
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
            return self._descriptors[shard]
        if len(self._descriptors) >= _OPEN_SHARDS:
            self._close(next(iter(self._descriptors)))
        file = self.files[shard]
        if isinstance(file, RemoteFile):
            self._close_evicted()  # The disk may need the space now,
            descriptor = self.cache.open(file)
            self._close_evicted()  # and this one may have taken the place of others.
        else:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        self._descriptors[shard] = descriptor
        return descriptor

    def _close(self, shard: int) -> None:
        if shard in self._descriptors:
            os.close(self._descriptors.pop(shard))
        self._used.pop(shard, None)

    def _close_evicted(self) -> None:
        """An open file keeps its space on the disk, also when it has no name any more."""
        for shard, descriptor in list(self._descriptors.items()):
            if isinstance(self.files[shard], RemoteFile) and not os.fstat(descriptor).st_nlink:
                self._close(shard)


def open_reader(index: Index, channels: int, storage: StorageConfig | None = None) -> Reader:
    """A reader of all shards of a data set. `storage` None takes the defaults.

    Raises:
        UsageError: the client for its URLs is not installed.
    """
    files = shard_files(index)
    check_clients([file.url for file in files if isinstance(file, RemoteFile)])
    return Reader(files, channels, ShardCache.of_config(storage or StorageConfig()))


def shard_files(index: Index) -> list[str | RemoteFile]:
    """The tar of each shard code: its path, or URL, size and tag as they were indexed."""
    entries = zip(index.shards, index.metadata["shards"], strict=True)
    return [
        RemoteFile(name, entry["bytes"], entry.get("tag") or "")
        if is_remote(name)
        else str(index.folder / name)
        for name, entry in entries
    ]


def check_storage(index: Index, split: str, data: DataConfig) -> None:
    """Refuse a way of reading remote shards for which the cache is too small.

    Raises:
        UsageError: states the sizes and what to change.
    """
    files = shard_files(index)
    sizes = sorted(
        file.size
        for code in np.unique(index.shard[index.select(split)])
        if isinstance(file := files[code], RemoteFile)
    )
    cache = ShardCache.of_config(data.storage)
    if data.locality == "global" and sum(sizes) > cache.limit_bytes:
        needed = -(-sum(sizes) // MEBIBYTE)
        raise UsageError(
            f"data.locality=global reads the {len(sizes)} remote shards of split {split!r} "
            f"({needed:,} MiB) in any order, and data.storage.cache_mebibytes="
            f"{data.storage.cache_mebibytes} cannot hold them; set data.locality=window, or "
            f"data.storage.cache_mebibytes={needed}"
        )
    if data.locality == "window":
        present = data.window_shards
        cache.check_limit(sum(sizes[-present - max(present, data.storage.ahead_shards) :]))


def read_image(index: Index, reader: Reader, sample_id: int) -> UInt8[np.ndarray, "H W C"]:
    """The stored image of one sample, before any transform.

    Raises:
        RunError: names shard, key and reason.
    """
    columns = (index.shard, index.offset, index.size, index.checksum)
    try:
        return reader.image(*(int(column[sample_id]) for column in columns))
    except BadSample as error:
        raise bad_sample_error(index, sample_id, str(error)) from None
    except StorageFault as error:
        raise storage_error(index, sample_id, str(error)) from None


def bad_sample_error(index: Index, sample_id: int, reason: str) -> RunError:
    """The one line that stops a run at an unreadable sample."""
    return RunError(
        f"{_place(index, sample_id)} cannot be read: {reason}; "
        f"repair or remove it and run `dist-dml index {index.folder}`"
    )


def storage_error(index: Index, sample_id: int, reason: str) -> RunError:
    """The one line that stops a run when the storage does not give a sample's bytes."""
    return RunError(f"{_place(index, sample_id)} cannot be had: {reason}")


def _place(index: Index, sample_id: int) -> str:
    shard = hide_secrets(index.shards[index.shard[sample_id]])
    return f"shard {shard}: key {index.key(sample_id)}"
