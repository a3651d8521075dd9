"""What this host lets a worker have: cores, memory, shared memory, files, locked memory."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from dist_dml.config import Config
from dist_dml.control_groups import Allowance, allowance
from dist_dml.doctor.findings import Finding, Setting, gibibytes, note, ok, problem, warning
from dist_dml.parallel.world import Ranks

# What Docker and Kubernetes give a container unless told.
CONTAINER_SHM = 64 * 2**20
# Python, torch, a forkserver, and sockets of three process groups with every other worker.
_BASE_FILES, _SHARDS, _TENSORS = 128, 256, 6
_LEAST_MEMORY = 2 * 2**30


def core_findings(setting: Setting) -> Iterator[Finding]:
    """Cores that this host has, and those that its workers may use."""
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set[int]()
    yield from cores(
        os.cpu_count() or 1,
        len(affinity) or os.cpu_count() or 1,
        allowance(setting.system),
        setting.config,
        setting.ranks,
        setting.environment,
    )
    load, usable = os.getloadavg()[0], len(affinity) or 1
    if load > 0.5 * usable:
        measured = f"{load:.1f} processes waiting or running before this command, {usable} cores"
        remedy = "measure again when the others are done: rates of this report are too low"
        yield note("load", measured, remedy, load=load)


def cores(
    count: int,
    affinity: int,
    allowed: Allowance,
    config: Config,
    ranks: Ranks,
    environment: Mapping[str, str],
) -> Iterator[Finding]:
    """Findings about the cores of one host.

    Args:
        count: of the machine.
        affinity: that this process may be scheduled on.
        allowed: by control groups.
        config: engine.threads and data.loader_processes.
        ranks: how many workers share the host.
        environment: OMP_NUM_THREADS.
    """
    workers = ranks.local_size
    quota = allowed.cores
    usable = min(affinity, quota) if quota is not None else affinity
    limits = [f"{count} in the machine"]
    limits += [f"{affinity} for this process"] * (affinity != count)
    limits += [f"{quota:g} by its control group"] if quota is not None else []
    measured = ", ".join(limits)
    values = {"cores": count, "affinity": affinity, "quota": quota}
    threads = config.engine.threads or max(1, int(usable) // workers)
    if threads * workers > max(1, usable):
        fitting = max(1, int(usable // workers))
        remedy = f"engine.threads={fitting}"
        if workers > usable:
            remedy = f"start at most {max(1, int(usable))} worker(s) on this host, or give it cores"
        yield warning(
            "cores",
            f"{measured}; {workers} worker(s) of {threads} threads would wait for one another",
            remedy,
            **values,
        )
    else:
        yield ok("cores", f"{measured}; {workers} worker(s) of {threads} threads", **values)
    busy = workers * (1 + config.data.loader_processes)
    if busy > 2 * usable:
        yield note(
            "processes",
            f"{workers} worker(s) and data.loader_processes={config.data.loader_processes} each "
            f"are {busy} busy processes on {usable:g} cores",
            "fewer data.loader_processes (0 decodes in a thread of the worker), or more cores",
        )
    text = environment.get("OMP_NUM_THREADS", "")
    if text.isdigit() and int(text) * workers > max(1, usable):
        fitting = max(1, int(usable // workers))
        yield warning(
            "OMP_NUM_THREADS",
            f"{text} threads for each of {workers} worker(s), on {usable:g} cores",
            f"OMP_NUM_THREADS={fitting}, or unset it: dist_dml sets its own number",
        )
    if allowed.processes is not None and allowed.processes < 256 * workers:
        yield warning(
            "pids.max",
            f"the control group allows {allowed.processes} processes and threads for {workers} "
            "worker(s)",
            "raise the container's limit (docker --pids-limit, Kubernetes podPidsLimit)",
        )


def memory_findings(setting: Setting) -> Iterator[Finding]:
    """Memory of the machine and of this process's control group."""
    there = psutil.virtual_memory()
    yield from memory(
        there.total, there.available, allowance(setting.system), setting.ranks.local_size
    )


def memory(total: int, available: int, allowed: Allowance, workers: int) -> Iterator[Finding]:
    """Findings about the memory of one host.

    Args:
        total: bytes of the machine.
        available: bytes of it without swapping.
        allowed: by control groups.
        workers: that share it.
    """
    limit = allowed.memory_bytes
    values = {"total": total, "available": available, "limit": limit}
    measured = f"{gibibytes(available)} available of {gibibytes(total)}"
    free = available
    if limit is not None and limit < total:
        free = available if allowed.memory_free is None else min(available, allowed.memory_free)
        measured += f"; the control group ends at {gibibytes(limit)}, {gibibytes(free)} of it free"
    if free < _LEAST_MEMORY * workers:
        yield warning(
            "memory",
            f"{measured}, for {workers} worker(s)",
            "give the container or the job more memory (--memory, resources.limits, sbatch --mem), "
            "or start fewer workers",
            **values,
        )
    elif limit is not None and limit < available:
        yield note(
            "memory",
            measured,
            "the check before a training counts the machine's free memory, which is more: keep "
            "`dist-dml estimate` below the control group's limit",
            **values,
        )
    else:
        yield ok("memory", measured, **values)
    if allowed.killed:
        yield warning(
            "killed",
            f"the kernel has killed {allowed.killed} process(es) of this control group for want of "
            "memory",
            "more memory, or lower data.loader_processes, data.prefetch or data.batch_size",
        )


def shared_memory_findings(setting: Setting) -> Iterator[Finding]:
    """/dev/shm against what the loader processes of this host put there."""
    place = setting.system / "dev/shm"
    if not place.is_dir():
        yield problem(
            "/dev/shm",
            "there is none, and loader processes hand their batches over in it",
            "mount a tmpfs there, or data.loader_processes=0",
        )
        return
    usage = shutil.disk_usage(place)
    yield shared_memory(usage.total, usage.free, loader_bytes(setting.config, setting.ranks))


def loader_bytes(config: Config, ranks: Ranks) -> int:
    """Bytes of shared memory that the loader processes of one host hold at most (docs/data.md).

    (prefetch + 1) micro-batches of C x S x S bytes a row, for each process of each worker.
    """
    data = config.data
    rows = -(-data.batch_size // (ranks.size * config.training.accumulate))
    batch = rows * data.image.channels * data.image.size**2
    return ranks.local_size * data.loader_processes * (data.prefetch + 1) * batch


def shared_memory(total: int, free: int, needed: int) -> Finding:
    """The finding about a shared memory of this size.

    Args:
        total: its bytes.
        free: bytes of it.
        needed: by `loader_bytes`.
    """
    measured = f"{gibibytes(free)} free of {gibibytes(total)}; loaders need {gibibytes(needed)}"
    larger = (
        "docker run --shm-size=8g (or --ipc=host); Kubernetes: an emptyDir with medium: Memory "
        "at /dev/shm"
    )
    values = {"total": total, "free": free, "needed": needed}
    if free < needed:
        fewer = "or fewer data.loader_processes, data.prefetch; 0 processes need none"
        measured += ": a worker would die of a bus error"
        return problem("/dev/shm", measured, f"{larger}; {fewer}", **values)
    if total <= CONTAINER_SHM:
        measured += "; this is a container's default, and NCCL needs its share too"
        return warning("/dev/shm", measured, larger, **values)
    if free < 2 * needed:
        return note("/dev/shm", measured, f"{larger}, before loaders grow", **values)
    return ok("/dev/shm", measured, **values)


def file_findings(setting: Setting) -> Iterator[Finding]:
    """Open files, and memory that may be locked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield open_files(soft, hard, files_needed(setting.config, setting.ranks))
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    adapters = sorted(path.name for path in _listed(setting.system / "sys/class/infiniband"))
    if adapters and locked != resource.RLIM_INFINITY:
        yield warning(
            "locked memory",
            f"{gibibytes(locked)} may be locked, and {', '.join(adapters)} need(s) pages that are",
            "ulimit -l unlimited (docker --ulimit memlock=-1; Slurm: PropagateResourceLimits)",
        )


def files_needed(config: Config, ranks: Ranks) -> int:
    """Descriptors that one process of a training holds at most: shards, batches, connections."""
    data = config.data
    batches = _TENSORS * data.loader_processes * (data.prefetch + 1)
    return _BASE_FILES + _SHARDS + batches + 8 * ranks.size


def open_files(soft: int, hard: int, needed: int) -> Finding:
    """The finding about a limit of open files.

    Args:
        soft: the limit in force.
        hard: as far as it may be raised.
        needed: by `files_needed`.
    """
    unlimited = resource.RLIM_INFINITY
    shown = "unlimited" if soft == unlimited else str(soft)
    most = "unlimited" if hard == unlimited else str(hard)
    measured = f"{shown} open files (up to {most}); a process of a training needs {needed}"
    values = {"soft": soft, "hard": hard, "needed": needed}
    wanted = max(4096, 2 * needed)
    if hard == unlimited or hard >= wanted:
        remedy = f"ulimit -n {wanted} before the launcher"
    else:
        remedy = f"raise the hard limit (limits.conf, docker --ulimit nofile={wanted})"
    if soft != unlimited and soft < needed:
        return problem("ulimit -n", measured, remedy, **values)
    if soft != unlimited and soft < 1024:
        return warning("ulimit -n", measured, remedy, **values)
    return ok("ulimit -n", measured, **values)


def temporary_findings(_: Setting) -> Iterator[Finding]:
    """The folder for temporary files: forkservers, compilers and caches put things there."""
    import tempfile

    try:
        folder = Path(tempfile.gettempdir())
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(b"x")
    except OSError as error:
        yield problem(
            "temporary files", str(error), "TMPDIR=FOLDER that can be written, with space"
        )
        return
    free = shutil.disk_usage(folder).free
    if free < 2**30:
        measured = f"{gibibytes(free)} free in {folder}"
        yield warning("temporary files", measured, "free space there, or TMPDIR=FOLDER", free=free)
    else:
        yield ok("temporary files", f"{folder}, {gibibytes(free)} free", free=free)


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
