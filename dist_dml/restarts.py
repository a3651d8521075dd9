"""Whether a launcher has started these workers again, and whether it is the same launch.

A restarted worker goes on with its own run by itself, without `--resume auto`; a second launch into
the folder of another run is refused as ever.
"""

from __future__ import annotations

import os
import socket


def restart_count() -> int:
    """How often this launch has been started again: torchrun's agent counts restarts of its
    workers, Slurm those of a requeued job. 0 for a first start.
    """
    counts = (os.environ.get(name, "") for name in _COUNTS)
    return sum(int(text) for text in counts if text.isdigit())


_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


def launch_identity() -> str:
    """What stays the same when a launch starts its workers again; empty without such a launcher."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if run not in ("", "none"):
        return f"torchelastic {run}"
    if job := os.environ.get("SLURM_JOB_ID", ""):
        return f"slurm {job}"
    if run:  # Without --rdzv-id all launches are called `none`: the agent is the workers' parent.
        return f"torchelastic {socket.gethostname()} {os.getppid()}"
    return ""
