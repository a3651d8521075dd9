"""What this process's control groups (cgroups, versions 1 and 2) allow it: containers, Slurm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Version 1 states "no limit" as the largest multiple of a page.
_UNLIMITED = 2**60


@dataclass(frozen=True)
class Allowance:
    """Limits of this process; None where there is none.

    Attributes:
        cores: processor time per time.
        memory_bytes: the least limit of the groups that it is in.
        memory_free: least that any of the groups has left. Files that the kernel drops before it
            kills do not count (what is in use is what Kubernetes calls the working set).
        killed: processes that the kernel has killed there for want of memory.
        processes: most processes and threads.
    """

    cores: float | None = None
    memory_bytes: int | None = None
    memory_free: int | None = None
    killed: int = 0
    processes: int | None = None


def allowance(system: Path = Path("/")) -> Allowance:
    """Read the limits of this process's groups and of all groups around them.

    Args:
        system: root of /proc and /sys.
    """
    cores: list[float] = []
    memory: list[tuple[int, int]] = []
    processes: list[int] = []
    killed = 0
    for folder in _folders(system, "cpu"):
        if (limit := _cores(folder)) is not None:
            cores.append(limit)
    for folder in _folders(system, "memory"):
        limit = _number(folder, "memory.max", "memory.limit_in_bytes")
        if limit is not None:
            memory.append((limit, _used(folder)))
        killed = max(killed, _killed(folder))
    for folder in _folders(system, "pids"):
        if (limit := _number(folder, "pids.max")) is not None:
            processes.append(limit)
    return Allowance(
        cores=min(cores, default=None),
        memory_bytes=min((limit for limit, _ in memory), default=None),
        memory_free=min((max(0, limit - used) for limit, used in memory), default=None),
        killed=killed,
        processes=min(processes, default=None),
    )


def _folders(system: Path, controller: str) -> Iterator[Path]:
    """The group of a controller and those around it, as far as they can be seen from here."""
    top = system / "sys/fs/cgroup"
    try:
        lines = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, place = rest.partition(":")
        if controllers == "" and (top / "cgroup.controllers").exists():
            mount = top
        elif controller in controllers.split(","):
            mounts = (top / controllers, top / controller)
            mount = next((path for path in mounts if path.is_dir()), top)
        else:
            continue
        parts = [part for part in place.split("/") if part not in ("", "..")]
        # Inside a container the path is often the host's, and only its root is there.
        for length in range(len(parts), -1, -1):
            if (folder := mount.joinpath(*parts[:length])).is_dir():
                yield folder


def _cores(folder: Path) -> float | None:
    words = _words(folder / "cpu.max")
    if len(words) == 2:
        return None if words[0] == "max" else int(words[0]) / int(words[1])
    quota = _number(folder, "cpu.cfs_quota_us")
    period = _number(folder, "cpu.cfs_period_us")
    return quota / period if quota is not None and quota > 0 and period else None


def _used(folder: Path) -> int:
    used = _number(folder, "memory.current", "memory.usage_in_bytes") or 0
    words = _words(folder / "memory.stat")
    # Version 1 counts a group's own files by the second name, and its children's too by the first.
    for name in ("total_inactive_file", "inactive_file"):
        if name in words:
            return max(0, used - int(words[words.index(name) + 1]))
    return used


def _killed(folder: Path) -> int:
    for name in ("memory.events", "memory.oom_control"):
        words = _words(folder / name)
        if "oom_kill" in words:
            return int(words[words.index("oom_kill") + 1])
    return 0


def _number(folder: Path, *names: str) -> int | None:
    for name in names:
        words = _words(folder / name)
        if words and words[0].lstrip("-").isdigit():
            return int(words[0]) if int(words[0]) < _UNLIMITED else None
    return None


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
