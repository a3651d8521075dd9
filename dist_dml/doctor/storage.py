"""The folder of runs: can it be written, how fast, how full, and what kind of disk is it."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from dist_dml.doctor.findings import Finding, Setting, gibibytes, note, ok, problem, warning

_BLOCK = 4 * 2**20
_MOST_BYTES = 128 * 2**20
_WRITE_SECONDS = 2.0
_LEAST_FREE, _LITTLE_FREE = 2**30, 10 * 2**30
# Slower than this, a checkpoint of 1 GiB takes more than 20 s.
_SLOW_BYTES = 50 * 2**20
_SLOW_SYNC_SECONDS = 0.1
_NETWORK = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "fuse", "9p", "glusterfs")
_LOST = ("tmpfs", "ramfs", "overlay")


def run_root_findings(setting: Setting) -> Iterator[Finding]:
    """Space, kind, rights, speed and locks of the disk that `run.root` is on."""
    given = Path(setting.config.run.root).absolute()
    folder = existing(given)
    shown = f"run.root={setting.config.run.root}"
    if not folder.is_dir():
        yield problem("run.root", f"{folder} is no folder", "name a folder with run.root=FOLDER")
        return
    kind = file_system(folder, setting.system)
    usage = shutil.disk_usage(folder)
    yield space(usage.free, usage.total, shown)
    yield kind_of_disk(kind, folder, setting.several_hosts)
    if (files := os.statvfs(folder)).f_files and files.f_favail < 10_000:
        measured = f"{files.f_favail} more files fit {folder}"
        yield warning("inodes", measured, "remove files there, or another run.root")
    yield from write_speed(folder, shown)


def existing(folder: Path) -> Path:
    """The folder itself, or the nearest one around it that exists: where it would be made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def file_system(folder: Path, system: Path = Path("/")) -> str:
    """The kind of file system that a folder lies on, as Linux calls it; "" if it does not say.

    Args:
        folder: that exists.
        system: root of /proc.
    """
    try:
        lines = (system / "proc/mounts").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    found, longest = "", -1
    real = folder.resolve()
    for line in lines:
        words = line.split()
        # Blanks in names are written as octal numbers.
        place = words[1].replace("\\040", " ") if len(words) > 2 else ""
        # Of two mounts on one place, the later one is seen.
        if place and real.is_relative_to(place) and len(place) >= longest:
            found, longest = words[2], len(place)
    return found


def is_network(kind: str) -> bool:
    """Whether a file system of this kind is on other machines."""
    return kind.startswith(_NETWORK)


def space(free: int, total: int, shown: str) -> Finding:
    """The finding about a disk with so many free bytes.

    Args:
        free: bytes.
        total: bytes.
        shown: the key and its value.
    """
    measured = f"{shown}: {gibibytes(free)} free of {gibibytes(total)}"
    remedy = "free space there, another run.root, or a lower checkpoint.keep_last"
    if free < _LEAST_FREE:
        return problem("free space", measured, remedy, free=free, total=total)
    if free < _LITTLE_FREE:
        return note("free space", measured, remedy, free=free, total=total)
    return ok("free space", measured, free=free, total=total)


def kind_of_disk(kind: str, folder: Path, several_hosts: bool) -> Finding:
    """The finding about a kind of file system.

    Args:
        kind: as `file_system` calls it.
        folder: that lies on it.
        several_hosts: whether workers of other hosts write there too.
    """
    measured = f"{folder} is on {kind or 'an unknown file system'}"
    if kind in _LOST and several_hosts:
        remedy = "run.root on a file system that all hosts share: each worker writes its classes"
        return problem("kind of disk", f"{measured}, which other hosts do not see", remedy)
    if kind in _LOST:
        remedy = "a mounted volume as run.root, if the runs are to outlive this container"
        return note("kind of disk", f"{measured}: it goes when the container does", remedy)
    return ok("kind of disk", measured, kind=kind)


def write_speed(folder: Path, shown: str) -> Iterator[Finding]:
    """Findings about writing up to 128 MiB for up to 2 s, and removing them.

    Args:
        folder: to write in.
        shown: the key and its value.
    """
    path = folder / f".dist_dml-doctor-{os.getpid()}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        yield problem(
            "writing",
            f"{shown} cannot be written ({error.strerror} in {folder})",
            "run.root=FOLDER that this user may write, or chown it",
        )
        return
    try:
        yield from _timed(descriptor)
        yield _locks(descriptor, folder)
    except OSError as error:
        yield problem(
            "writing", f"{shown}: {error.strerror}", "free space or quota there, another run.root"
        )
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


def _timed(descriptor: int) -> Iterator[Finding]:
    """A small write that must reach the disk, then a stream of large ones."""
    started = time.perf_counter()
    os.write(descriptor, b"x")
    os.fsync(descriptor)
    sync_seconds = time.perf_counter() - started
    block, written = os.urandom(_BLOCK), 0  # Nothing that a disk could compress.
    started = time.perf_counter()
    while written < _MOST_BYTES and time.perf_counter() - started < _WRITE_SECONDS:
        written += os.write(descriptor, block)
    os.fsync(descriptor)
    rate = written / (time.perf_counter() - started)
    measured = (
        f"{rate / 1e6:,.0f} MB/s to the disk ({written / 2**20:.0f} MiB written), "
        f"{sync_seconds * 1e3:.1f} ms for a small file to be safe"
    )
    values = {"bytes_per_second": rate, "sync_seconds": sync_seconds}
    if rate < _SLOW_BYTES or sync_seconds > _SLOW_SYNC_SECONDS:
        remedy = "a faster disk as run.root, or checkpoints less often (checkpoint.every_steps)"
        yield warning("writing", measured, remedy, **values)
    else:
        yield ok("writing", measured, **values)


def _locks(descriptor: int, folder: Path) -> Finding:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except OSError as error:
        return warning(
            "file locks",
            f"{folder} has none ({error.strerror}): two runs of one name are not kept apart",
            "mount it with locks (NFS: without nolock; Lustre: flock), or give each run its name",
        )
    return ok("file locks", "work")
