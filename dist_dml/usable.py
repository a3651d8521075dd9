"""Cores and memory that this process may use: what machine, container and scheduler allow."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from dist_dml.control_groups import allowance


def usable_cores(system: Path = Path("/")) -> int:
    """Whole cores that this process may keep busy, at least 1.

    The least of the machine's, those that it may be scheduled on, and the processor time that its
    control groups allow, rounded down: a thread more than the quota makes all wait for the next
    period.

    Args:
        system: root of /proc and /sys.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = allowance(system).cores
    return max(1, min(cores or 1, int(quota) if quota is not None else cores or 1))


def usable_memory(system: Path = Path("/")) -> int:
    """Bytes that can be taken before the machine swaps or a control group kills.

    Files that the kernel holds in memory and can drop count as free, in both.

    Args:
        system: root of /proc and /sys.
    """
    free = psutil.virtual_memory().available
    allowed = allowance(system).memory_free
    return free if allowed is None else min(free, allowed)
