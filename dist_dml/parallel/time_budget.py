"""Training for a given time: how much of it is spent, the same on every worker."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work


class TimeBudget:
    """Worker 0's clock decides for all, so that they end after the same step.

    Costs a broadcast of 8 bytes a step, which is read a step later so that nobody waits for it: the
    step that ends a run of several workers is the one after that in which time ran out. Without a
    limit it costs nothing.

    Args:
        max_seconds: `training.max_seconds`; 0 for no limit.
        spent: seconds of training before now, of earlier runs: the same on every worker.
        device: where the group's messages lie.
        group: the workers, or None for one process.
    """

    def __init__(
        self, max_seconds: float, spent: float, device: torch.device, group: ProcessGroup | None
    ) -> None:
        self._max_seconds, self._spent = max_seconds, spent
        self._device, self._group = device, group
        self._pending: tuple[Tensor, Work] | None = None

    @property
    def share(self) -> float:
        """What is spent of the budget, from 0; 1 or more once it has run out. 0 without a limit."""
        return self._spent / self._max_seconds if self._max_seconds else 0.0

    def step_done(self, seconds: float) -> None:
        """After each step, by all workers together.

        Args:
            seconds: of training so far by this worker's clock, of all runs together.
        """
        if not self._max_seconds:
            return
        if self._group is None or self._group.size() == 1:
            self._spent = seconds
            return
        if self._pending is not None:
            number, work = self._pending
            work.wait()
            self._spent = float(number)
        number = torch.tensor(seconds, dtype=torch.float64, device=self._device)
        work = dist.broadcast(number, src=0, group=self._group, async_op=True)
        assert work is not None
        self._pending = number, work
