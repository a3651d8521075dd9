"""The data set: can its shards be read, and how many images a second does one process make."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from dist_dml.credentials import expand
from dist_dml.data.faults import BadSample, StorageFault
from dist_dml.data.index import Index
from dist_dml.data.opening import open_index
from dist_dml.data.reader import Reader, open_reader
from dist_dml.data.remote import read_range
from dist_dml.data.remote_client import RemoteFile
from dist_dml.data.retry import Retry
from dist_dml.doctor.findings import Finding, Setting, ok, problem, skipped, warning
from dist_dml.doctor.storage import file_system, is_network

_SECONDS = 1.5
_MOST_IMAGES = 2000
_REMOTE_IMAGES = 8
# Fewer than this of a process are less than a step of most networks needs.
_SLOW_IMAGES = 50.0


@dataclass(frozen=True)
class Pace:
    """What was read in a while.

    Attributes:
        images: number of them.
        size: their bytes.
        seconds: for all.
        bad: the first that could not be read, in words; "" for none.
        num_bad: of these.
    """

    images: int
    size: int
    seconds: float
    bad: str = ""
    num_bad: int = 0

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / max(self.seconds, 1e-9)


def shard_findings(setting: Setting) -> Iterator[Finding]:
    """Opens the data set and reads some images of it, first their bytes, then their pixels."""
    data = setting.config.data
    if not data.path:
        remedy = "give --data FOLDER, or data.path=FOLDER"
        yield skipped("data", "no data set was named (data.path is empty)", remedy)
        return
    started = time.perf_counter()
    index = open_index(data)  # Refusals are findings of their own, with their remedies.
    opened = time.perf_counter() - started
    ids = index.select(data.split)
    shards = len(np.unique(index.shard[ids]))
    yield ok(
        "data",
        f"{len(ids):,} images of split {data.split!r} in {shards} shard(s), opened in "
        f"{opened:.2f} s",
        images=len(ids),
        shards=shards,
    )
    reader = open_reader(index, data.image.channels, data.storage)
    chosen = np.random.default_rng(0).permutation(ids)[:_MOST_IMAGES]
    if any(isinstance(file, RemoteFile) for file in reader.files):
        yield from _remote(index, reader, chosen)
        return
    yield from _local(index, reader, chosen, setting)


def _local(
    index: Index, reader: Reader, chosen: Int[np.ndarray, " n"], setting: Setting
) -> Iterator[Finding]:
    data = setting.config.data
    place = Path(expand(data.path, "data.path"))
    kind = file_system(place.resolve(), setting.system)
    _forget(index, reader, chosen)
    read = pace(index, chosen, lambda place: reader.checked_bytes(*place))
    # Each image is in the page cache now: what remains is the decoder.
    made = pace(index, chosen[: read.images + read.num_bad], lambda place: reader.image(*place))
    where = f" from {kind}" if kind else ""
    yield ok(
        "reading",
        f"{read.rate:,.0f} images/s, {read.size / max(read.seconds, 1e-9) / 1e6:,.1f} MB/s{where}, "
        f"by offset in random order, past the page cache ({read.images} images)",
        images_per_second=read.rate,
        bytes_per_second=read.size / max(read.seconds, 1e-9),
    )
    processes = max(1, data.loader_processes) * setting.ranks.local_size
    measured = (
        f"{made.rate:,.0f} images/s in one process, checked and decoded; {processes} loader(s) of "
        "this host at most as many times that"
    )
    values = {"images_per_second": made.rate, "loaders": processes}
    if made.images and made.rate < _SLOW_IMAGES:
        remedy = "pack the images at their training size (dist-dml pack ... --size), more loaders"
        if is_network(kind):
            remedy += ", or a copy of the shards on a local disk"
        yield warning("decoding", measured, remedy, **values)
    else:
        yield ok("decoding", measured, **values)
    yield from damaged(made if made.bad else read, setting.config.data.path)


def _remote(index: Index, reader: Reader, chosen: Int[np.ndarray, " n"]) -> Iterator[Finding]:
    """A few images from the store itself: a whole shard could take minutes."""
    once = Retry(0, 0.0)

    def fetch(place: tuple[int, int, int, int]) -> bytes:
        file = reader.files[place[0]]
        if isinstance(file, RemoteFile):
            return read_range(file, place[1], place[2], once)
        return reader.checked_bytes(*place)

    read = pace(index, chosen[:_REMOTE_IMAGES], fetch, seconds=8.0)
    if read.images:
        each = read.seconds / read.images
        yield ok(
            "store",
            f"{each * 1e3:,.0f} ms to ask for one image ({read.images} asked); a training fetches "
            "whole shards into its cache",
            seconds_per_request=each,
        )
    if read.bad:
        yield problem(
            "store",
            f"{read.num_bad} of {read.images + read.num_bad} images could not be had: {read.bad}",
            "look at the URL, the credentials and the proxy of this host",
        )


def damaged(found: Pace, path: str) -> Iterator[Finding]:
    """A finding where images could not be read or decoded.

    Args:
        found: what was tried.
        path: of the data set, as configured.
    """
    if found.bad:
        yield warning(
            "damaged images",
            f"{found.num_bad} of {found.images + found.num_bad}, the first: {found.bad}",
            f"dist-dml verify {path} decodes all; --fix leaves damaged ones out",
        )


def pace(
    index: Index,
    chosen: Int[np.ndarray, " n"],
    take: Callable[[tuple[int, int, int, int]], Any],
    seconds: float = _SECONDS,
) -> Pace:
    """How fast `take` gets samples, until a time is over or all were taken.

    Args:
        index: the data set.
        chosen: sample ids, in this order.
        take: gets shard, offset, size and checksum of one.
        seconds: the time.
    """
    images = size = num_bad = 0
    bad = ""
    columns = (index.shard, index.offset, index.size, index.checksum)
    started = time.perf_counter()
    for sample in chosen.tolist():
        place = tuple(int(column[sample]) for column in columns)
        try:
            take((place[0], place[1], place[2], place[3]))
            images, size = images + 1, size + place[2]
        except (BadSample, StorageFault) as error:
            num_bad += 1
            bad = bad or f"{index.shards[place[0]]}: key {index.key(sample)}: {error}"
        if time.perf_counter() - started > seconds:
            break
    return Pace(images, size, time.perf_counter() - started, bad, num_bad)


def _forget(index: Index, reader: Reader, chosen: Int[np.ndarray, " n"]) -> None:
    """Ask the system to drop these samples from its page cache, so that the disk is measured."""
    if not hasattr(os, "posix_fadvise"):
        return
    by_shard = chosen[np.argsort(index.shard[chosen], kind="stable")]
    opened, descriptor = -1, -1
    with contextlib.suppress(OSError):
        for sample in by_shard.tolist():
            shard = int(index.shard[sample])
            if shard != opened:
                if descriptor >= 0:
                    os.close(descriptor)
                descriptor = -1
                descriptor = os.open(str(reader.files[shard]), os.O_RDONLY | os.O_CLOEXEC)
                opened = shard
            # Whole pages: a part of one is kept.
            start = int(index.offset[sample]) // mmap.PAGESIZE * mmap.PAGESIZE
            end = int(index.offset[sample]) + int(index.size[sample]) + mmap.PAGESIZE
            os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)
    if descriptor >= 0:
        os.close(descriptor)
