"""What all workers have to know after the same step: how much time is spent, who asks to stop."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work


class StepAgreement:
    """Worker 0's clock and any worker's wish decide for all, so that they end after the same step.

    Costs an all-reduce of 16 bytes a step between the hosts, which is read a step later so that
    nobody waits for it: the step that ends a run of several workers is the one after that in which
    time ran out or somebody asked.

    Args:
        max_seconds: `training.max_seconds`; 0 for no limit.
        spent: seconds of training before now, of earlier runs: the same on every worker.
        asked: whether this worker has been asked to stop.
        group: the workers' hosts (`World.control`), or None for one process.
    """

    def __init__(
        self,
        max_seconds: float,
        spent: float,
        asked: Callable[[], bool],
        group: ProcessGroup | None,
    ) -> None:
        self._max_seconds, self._spent, self._asked, self._group = max_seconds, spent, asked, group
        self._pending: tuple[Tensor, Work] | None = None
        self.stop = False
        """Whether any worker was asked to stop."""

    @property
    def share(self) -> float:
        """What is spent of the budget, from 0; 1 or more once it has run out. 0 without a limit."""
        return self._spent / self._max_seconds if self._max_seconds else 0.0

    def step_done(self, seconds: float) -> None:
        """After each step, by all workers together.

        Args:
            seconds: of training so far by this worker's clock, of all runs together.
        """
        if self._group is None or self._group.size() == 1:
            self._spent, self.stop = seconds, self._asked()
            return
        if self._pending is not None:
            numbers, work = self._pending
            work.wait()
            spent, stop = numbers.tolist()
            self._spent, self.stop = spent, stop > 0
        mine = [seconds if self._group.rank() == 0 else 0.0, float(self._asked())]
        numbers = torch.tensor(mine, dtype=torch.float64)
        work = dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._pending = numbers, work
