"""The shards that are to be indexed, and the scan of each: kept, read from a disk, or streamed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from dist_dml.credentials import refuse_secret
from dist_dml.data.faults import StorageFault
from dist_dml.data.foreign_index import FOREIGN, Foreign, foreign_path
from dist_dml.data.retry import Retry, hide_secrets
from dist_dml.data.scanning import ShardScan, scan_members
from dist_dml.data.sidecar import read_sidecar, write_sidecar
from dist_dml.data.tar_members import ForwardReader, walk_members
from dist_dml.data_config import StorageConfig
from dist_dml.errors import RunError, UsageError
from dist_dml.process_pool import process_pool

_BUFFER = 1 << 20


@dataclass(frozen=True)
class ShardFile:
    """One shard as it is now.

    Attributes:
        location: absolute path, or URL.
        name: as `dataset.json` has it: relative to the index where it lies on the same disk.
        size: bytes.
        modified: time of the last change in nanoseconds, None for remote ones.
        tag: what an object store calls this version of it; empty if it does not.
    """

    location: str
    name: str
    size: int
    modified: int | None
    tag: str

    @property
    def shown(self) -> str:
        """`location` for messages: signed URLs contain secrets."""
        return self.location if self.modified is not None else hide_secrets(self.location)

    @property
    def base(self) -> str:
        """Its last path component: `train-000000.tar`."""
        path = self.location if self.modified is not None else urlsplit(self.location).path
        return path.rpartition("/")[2]

    def record(self, num_samples: int) -> dict[str, Any]:
        """Its entry in `dataset.json`."""
        found = {"name": self.name, "bytes": self.size, "samples": num_samples}
        if self.modified is not None:
            found["modified"] = self.modified
        if self.tag:
            found["tag"] = self.tag
        return found


def find_shards(sources: str | Path | Sequence[str | Path]) -> tuple[list[Path], Path]:
    """The tars of one folder, or the given tars, sorted by name; and the folder of the first.

    Raises:
        UsageError: if a path does not exist, or there is no tar.
    """
    paths = [Path(p) for p in ([sources] if isinstance(sources, (str, Path)) else sources)]
    for path in paths:
        if not path.exists():
            raise UsageError(f"shards {path}: no such file or folder; correct the path")
    shards = [s for path in paths for s in (path.glob("*.tar") if path.is_dir() else [path])]
    if not shards:
        raise UsageError(f"{paths[0] if paths else '.'}: holds no shards (*.tar); nothing to index")
    shards = sorted(set(shards), key=lambda shard: (shard.name, str(shard)))
    return shards, (paths[0] if paths[0].is_dir() else paths[0].parent)


def local_shards(paths: Sequence[Path], root: Path) -> list[ShardFile]:
    """The state of tars on a disk.

    Args:
        paths: from `find_shards`.
        root: folder of the index.
    """
    found = []
    for path in paths:
        state = path.stat()
        name = os.path.relpath(path, root)
        found.append(ShardFile(os.path.abspath(path), name, state.st_size, state.st_mtime_ns, ""))
    return found


def remote_shards(pattern: str) -> list[ShardFile]:
    """The tars of an object store or a web server, sorted by name.

    Args:
        pattern: a folder, a file, `s3://bucket/train-*.tar`, or `https://host/{000000..000127}.tar`;
            passwords and signatures as `${NAME}`, since the index keeps the URLs.

    Raises:
        UsageError: there is none, or the URL holds a secret itself.
        RunError: the storage cannot be asked.
    """
    from dist_dml.data.remote import list_remote

    refuse_secret(pattern, "--remote")
    path = pattern.partition("?")[0]
    if "${" in path.partition("://")[0] or "${" in path.rpartition("/")[2]:
        # Splits, kept scans and readers go by scheme and file name.
        raise UsageError(
            f"--remote {hide_secrets(pattern)}: write scheme and file name yourself; ${{NAME}} may "
            "stand between them, and behind a ?"
        )
    try:
        found = [file for file in list_remote(pattern, _retry()) if _is_tar(file.url)]
    except StorageFault as error:
        raise RunError(f"{hide_secrets(pattern)}: {error}") from None
    if not found:
        raise UsageError(f"{hide_secrets(pattern)}: holds no shards (*.tar); nothing to index")
    shards = [ShardFile(file.url, file.url, file.size, None, file.tag) for file in found]
    return sorted(shards, key=lambda shard: (shard.base, shard.location))


def _retry() -> Retry:
    defaults = StorageConfig()
    return Retry(defaults.retries, defaults.retry_seconds)


def _is_tar(url: str) -> bool:
    return urlsplit(url).path.endswith(".tar")


@dataclass(frozen=True)
class ScanJob:
    """What a scanning process is asked for.

    Attributes:
        shard: the tar.
        sidecar: where its scan is kept.
        label_key: key of the label in `.json` members, or column of img2dataset's Parquet.
        start: the foreign index that the scan is checked against.
        rescan: do not use the sidecar.
        damaged: whether damage refuses the shard or leaves samples out.
    """

    shard: ShardFile
    sidecar: Path
    label_key: str
    start: Foreign | None
    rescan: bool
    damaged: Literal["refuse", "skip"]


def scan_all(jobs: Sequence[ScanJob], processes: int) -> Iterator[ShardScan]:
    """Yield the scan of every shard, in order, several at a time."""
    if processes <= 1 or len(jobs) == 1:
        yield from map(scan_one, jobs)
        return
    with process_pool(min(processes, len(jobs))) as pool:
        try:
            yield from pool.map(scan_one, jobs)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # Thousands of shards may wait behind a bad one.
            raise


def scan_one(job: ScanJob) -> ShardScan:
    """The scan of one shard: the kept one, if it is of the same bytes.

    Raises:
        UsageError: the shard is damaged and `damaged` is `refuse`, it changed meanwhile, or the
            foreign index disagrees.
        RunError: the storage failed.
    """
    shard = job.shard
    made_from: dict[str, Any] = {
        "bytes": shard.size,
        "modified": shard.modified,
        "tag": shard.tag,
        "label_key": job.label_key,
    }
    if job.start is not None:
        path = foreign_path(shard.location, job.start)
        try:
            state = path.stat()
        except OSError:
            raise UsageError(
                f"shard {shard.location}: {path.name} is missing; leave out --from {job.start}"
            ) from None
        made_from["start"] = [job.start, state.st_size, state.st_mtime_ns]
    # Without time or tag nobody can say whether a shard of the same size is the same.
    known = shard.modified is not None or shard.tag
    scan = read_sidecar(job.sidecar, made_from) if known and not job.rescan else None
    if scan is None:
        scan = _scan_local(job) if shard.modified is not None else _scan_remote(job)
        write_sidecar(job.sidecar, scan, made_from)
    if scan.left_out and job.damaged == "refuse":
        first = scan.left_out[0]
        raise UsageError(f"shard {shard.shown}: {first.message} (--damaged skip leaves it out)")
    return scan


def _scan_local(job: ScanJob) -> ShardScan:
    shard = job.shard
    try:
        with open(shard.location, "rb", buffering=_BUFFER) as stream:
            reader = ForwardReader(stream, seeks=True)
            members = walk_members(reader)
            labels = None
            if job.start is not None:
                checked = FOREIGN[job.start](shard.location, members, job.label_key)
                members, labels = checked.members, checked.labels
            scan = scan_members(members, reader, job.label_key, labels)
            state = os.fstat(stream.fileno())
    except OSError as error:
        raise UsageError(
            f"shard {shard.location}: cannot be read ({error.strerror}); check the path"
        ) from None
    if (state.st_size, state.st_mtime_ns) != (shard.size, shard.modified):
        raise UsageError(
            f"shard {shard.location}: changed while it was scanned; index it when it is whole"
        )
    return scan


def _scan_remote(job: ScanJob) -> ShardScan:
    """Stream the tar once; memory is bounded by its largest image's first MiB."""
    from dist_dml.data.remote import open_remote, stat_remote

    shard, retry = job.shard, _retry()
    try:
        with open_remote(shard.location, retry) as stream:
            reader = ForwardReader(stream, seeks=False)
            scan = scan_members(walk_members(reader), reader, job.label_key)
        now = stat_remote(shard.location, retry)
    except StorageFault as error:
        raise RunError(f"shard {shard.shown}: {error}; index again when it is back") from None
    read = shard.size if any(not sample.key for sample in scan.left_out) else reader.position
    if (read, now.size, now.tag) != (shard.size, shard.size, shard.tag):
        raise RunError(
            f"shard {shard.shown}: {shard.size} bytes were listed, {read} came and {now.size} are "
            "there now: it changed meanwhile; index it again"
        )
    return scan
