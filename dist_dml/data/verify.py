"""`dist-dml verify`: read and decode every image of a data set, and say which are damaged."""

from __future__ import annotations

import argparse
import zlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt32

from dist_dml.data.decode import decode
from dist_dml.data.faults import BadSample, StorageFault
from dist_dml.data.index import Index, load_unchecked
from dist_dml.data.progress import ProgressLine
from dist_dml.data.quarantine import (
    QUARANTINE_FILE,
    QuarantineEntry,
    quarantined_ids,
    write_quarantine,
)
from dist_dml.data.shard_changes import is_url
from dist_dml.data.tar_members import ForwardReader
from dist_dml.data_config import StorageConfig
from dist_dml.errors import UsageError
from dist_dml.process_pool import process_pool
from dist_dml.usable import usable_cores

_LOCAL_SAMPLES = 512
"""Images of a task. A remote shard is one task, streamed once."""
_SHOWN = 10
_WAITING = 4
"""Tasks in the queue for each process: arrays of 10^8 samples are not sent all at once."""


@dataclass(frozen=True)
class Verdict:
    """What is wrong with one sample."""

    sample_id: int
    kind: str
    """A kind of `BadSample`, or `storage`, which says nothing about the sample."""
    reason: str


@dataclass(frozen=True)
class _Task:
    """Images of one shard, in the order of their places."""

    location: str
    sample_ids: Int64[np.ndarray, " n"]
    offset: Int64[np.ndarray, " n"]
    size: Int64[np.ndarray, " n"]
    checksum: UInt32[np.ndarray, " n"]


def verify(index: Index, processes: int = 1) -> list[Verdict]:
    """Every sample that is damaged or cannot be read, in quarantine or not, ordered by id.

    Reads all bytes of the images and decodes them: as long as a quick epoch. Memory is bounded by
    4 tasks of 512 samples a process, and in it by one image.

    Args:
        index: of the data set.
        processes: decoding processes.
    """
    progress = ProgressLine("verify", float(len(index)), "images")
    verdicts: list[Verdict] = []
    for count, found in _checked(_tasks(index), processes):
        verdicts += found
        progress.advance(float(count))
    progress.finish()
    return sorted(verdicts, key=lambda verdict: verdict.sample_id)


def _tasks(index: Index) -> Iterator[_Task]:
    # Rows of a shard follow one another; a mixture is never verified as one.
    ends = np.cumsum([shard["samples"] for shard in index.metadata["shards"]]).tolist()
    start = 0
    for code, end in enumerate(ends):
        location = index.shard_location(code)
        rows = start + np.argsort(index.offset[start:end], kind="stable")
        step = max(len(rows), 1) if is_url(location) else _LOCAL_SAMPLES
        for first in range(0, len(rows), step):
            ids = rows[first : first + step]
            columns = (column[ids] for column in (index.offset, index.size, index.checksum))
            yield _Task(location, ids, *columns)
        start = end


def _checked(tasks: Iterator[_Task], processes: int) -> Iterator[tuple[int, list[Verdict]]]:
    """Check tasks in processes; yields the images of each and what is wrong with them."""
    if processes <= 1:
        for task in tasks:
            yield len(task.sample_ids), _check(task)
        return
    waiting: deque[tuple[int, Future[list[Verdict]]]] = deque()
    with process_pool(processes) as pool:
        for task in tasks:
            waiting.append((len(task.sample_ids), pool.submit(_check, task)))
            if len(waiting) >= _WAITING * processes:
                count, future = waiting.popleft()
                yield count, future.result()
        for count, future in waiting:
            yield count, future.result()


def _check(task: _Task) -> list[Verdict]:
    """What is wrong with the samples of a task; a shard that cannot be read is wrong in all."""
    verdicts = []
    done = 0
    try:
        with _opened(task.location) as reader:
            for row, offset, size, checksum in zip(
                task.sample_ids.tolist(),
                task.offset.tolist(),
                task.size.tolist(),
                task.checksum.tolist(),
                strict=True,
            ):
                reader.skip_to(offset)
                try:
                    _check_image(reader.read(size), size, checksum)
                except BadSample as bad:
                    verdicts.append(Verdict(row, bad.kind, bad.reason))
                done += 1
    except (OSError, StorageFault) as error:
        reason = getattr(error, "strerror", None) or str(error)
        verdicts += [
            Verdict(row, "storage", f"the shard cannot be read ({reason})")
            for row in task.sample_ids[done:].tolist()
        ]
    return verdicts


def _check_image(data: bytes, size: int, checksum: int) -> None:
    if len(data) != size:
        raise BadSample(f"the shard ends after {len(data)} of its {size} bytes", "cut_short")
    if zlib.crc32(data) != checksum:
        raise BadSample("its bytes changed after they were indexed (checksum differs)", "checksum")
    decode(data, 3)


@contextmanager
def _opened(location: str) -> Iterator[ForwardReader]:
    """A shard from its first byte on; one at a URL is streamed."""
    if not is_url(location):
        with open(location, "rb") as stream:
            yield ForwardReader(stream, seeks=True)
        return
    from dist_dml.data.remote import open_remote
    from dist_dml.data.retry import Retry

    defaults = StorageConfig()
    with open_remote(location, Retry(defaults.retries, defaults.retry_seconds)) as stream:
        yield ForwardReader(stream, seeks=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dist-dml verify`."""
    parser.add_argument("dataset", help="folder of a packed or indexed data set")
    parser.add_argument(
        "--processes", type=int, default=0, help="decoding processes (default: one a core)"
    )
    parser.add_argument(
        "--fix",
        action="store_true",
        help=f"list damaged samples in {QUARANTINE_FILE}, which takes them out of every split",
    )


def run(arguments: argparse.Namespace) -> int:
    """`dist-dml verify`. Returns 0 if all samples that are not in quarantine are sound, else 1."""
    index = load_unchecked(arguments.dataset)
    known = _known(index, arguments.fix)
    processes = arguments.processes or usable_cores()
    verdicts = verify(index, processes)
    damaged = [verdict for verdict in verdicts if verdict.kind != "storage"]
    entries = [QuarantineEntry.of(index, v.sample_id, v.kind, v.reason) for v in verdicts]
    _print(index, entries)
    if arguments.fix:
        _write(index, entries)
        known = {verdict.sample_id for verdict in damaged}
    left = sum(verdict.sample_id not in known for verdict in verdicts)
    if not left and verdicts:
        print(f"{index.folder}: all of them are in {QUARANTINE_FILE}")
    elif left and len(damaged) == len(verdicts):
        print(f"{index.folder}: `dist-dml verify {index.folder} --fix` leaves them out")
    return 1 if left else 0


def _known(index: Index, fix: bool) -> set[int]:
    """Samples that are in quarantine; a list that cannot be used is replaced by `--fix`."""
    try:
        return set(quarantined_ids(index.folder, index.fingerprint, len(index)).tolist())
    except UsageError:
        if not fix:
            raise
        return set()


def _print(index: Index, entries: Sequence[QuarantineEntry]) -> None:
    kinds = Counter(entry.kind for entry in entries)
    counts = ", ".join(f"{kind} {count:,}" for kind, count in kinds.most_common())
    listed = f": {counts}" if kinds else ""
    print(f"{index.folder}: {len(index):,} images, {len(entries):,} bad{listed}")
    for entry in entries[:_SHOWN]:
        print(f"  shard {entry.shard}: key {entry.key}: {entry.kind}: {entry.reason}")
    if len(entries) > _SHOWN:
        print(f"  and {len(entries) - _SHOWN:,} more")


def _write(index: Index, entries: Sequence[QuarantineEntry]) -> None:
    """A shard that cannot be read now may be back tomorrow: its samples are not in quarantine."""
    path = index.folder / QUARANTINE_FILE
    damaged = [entry for entry in entries if entry.kind != "storage"]
    if damaged:
        write_quarantine(path, damaged, index.fingerprint)
        print(f"{path}: {len(damaged):,} samples; delete it to take them back")
    else:
        path.unlink(missing_ok=True)
