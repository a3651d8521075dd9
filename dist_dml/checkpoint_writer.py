"""Checkpoints that are written while training goes on: a copy, a thread, one at a time.

What the training waits for is the copy to main memory, and a checkpoint before that is not written
yet. The threads of all workers agree in a process group of their own (`World.background`), so that
their messages never mix with those of a step.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dist_dml.checkpoint import Contents, Snapshot, on_cpu, take_snapshot, write_snapshot
from dist_dml.checkpoint_manifest import prune_checkpoints
from dist_dml.config import CheckpointConfig
from dist_dml.engine import Engine
from dist_dml.errors import RunError
from dist_dml.parallel.heads import Head
from dist_dml.parallel.world import World


@dataclass(frozen=True)
class Saved:
    """How a save ended.

    Attributes:
        step: of the checkpoint.
        seconds: from the copy to the rename.
        blocked_seconds: of these, how long the training waited.
        mebibytes: of this worker's tensors.
        problem: why there is none; empty if it was written.
    """

    step: int
    seconds: float
    blocked_seconds: float
    mebibytes: float
    problem: str = ""


class CheckpointWriter:
    """Saves the checkpoints of one run. All methods are called by all workers together.

    A save that fails costs nothing but itself: earlier checkpoints stay, and so does what is copied
    (the next save copies anew). Takes the memory of one copy of this worker's state, kept from the
    first save on: fresh memory would cost a page fault every 4 KiB.

    Args:
        folder: of all checkpoints.
        config: the checkpoint section.
        world: all workers.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, world: World) -> None:
        self._folder, self._config, self._world = folder, config, world
        # Workers without a group of their own for it (as in tests) write in the foreground.
        self._in_background = config.background and (
            world.size == 1 or world.background is not None
        )
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._ended: list[Saved] = []

    def save(self, contents: Contents, engine: Engine, head: Head) -> None:
        """Copy the state and begin to write it; waits for a save that is under way."""
        started = time.perf_counter()
        self.wait()
        keep = self._copy if self._in_background else on_cpu
        snapshot = take_snapshot(engine, head, self._world, keep)
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)  # The copies have left the device.
        if not self._in_background:
            self._write(contents, snapshot, started, None)
            return
        blocked = time.perf_counter() - started
        self._thread = threading.Thread(
            target=self._write,
            args=(contents, snapshot, started, blocked),
            name="checkpoint",
            daemon=True,
        )
        self._thread.start()

    def news(self) -> list[Saved]:
        """The saves that have ended since the last call. Waits for nothing."""
        if self._thread is not None and not self._thread.is_alive():
            self._thread = None
        ended, self._ended = self._ended, []
        return ended

    def wait(self, seconds: float | None = None) -> None:
        """Until the save that is under way has ended, or for so long."""
        if self._thread is not None:
            self._thread.join(seconds)
        self._thread = None

    def _write(
        self, contents: Contents, snapshot: Snapshot, started: float, blocked: float | None
    ) -> None:
        group = self._world.background if self._in_background else self._world.group
        problem = ""
        try:
            write_snapshot(self._folder, contents, snapshot, self._world.rank, group)
            if self._world.is_first:
                best = contents.progress.best_step
                prune_checkpoints(self._folder, self._config.keep_last, best)
        except (RunError, RuntimeError, OSError) as error:
            # A RuntimeError: another worker is gone, which ends this one too, elsewhere.
            problem = str(error)
        seconds = time.perf_counter() - started
        size = snapshot.num_bytes / 2**20
        waited = seconds if blocked is None else blocked
        self._ended.append(Saved(contents.progress.step, seconds, waited, size, problem))

    def _copy(self, name: str, value: Tensor) -> Tensor:
        """A copy in memory that is used again by the next save."""
        value = value.detach()
        kept = self._copies.get(name)
        if kept is None or kept.shape != value.shape or kept.dtype != value.dtype:
            # Page-locked memory, where there is a device, is copied to at the speed of the bus.
            on_device = value.device.type == "cuda"
            kept = torch.empty(value.shape, dtype=value.dtype, pin_memory=on_device)
            self._copies[name] = kept
        return kept.copy_(value, non_blocking=True)


def kept_copy_bytes(config: CheckpointConfig, state_bytes: int) -> int:
    """Main memory that the copies of a worker's state take.

    Args:
        config: the checkpoint section.
        state_bytes: of the state.
    """
    return state_bytes if config.background else 0
