"""Which rows a training has consumed, as one number that no layout of workers changes.

Every row that is trained on has a mark, a 64-bit mix of its step, its position in the batch and its
sample. The ledger is the sum of all marks modulo 2^64: workers add up their own rows and the sums
are added, in any order. A batch that is left out, repeated, or whose rows come from elsewhere
changes it, whatever the number of workers, restarts and loader processes.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from dist_dml.data.plan import Plan
from dist_dml.keyed_random import key_of, row_keys
from dist_dml.parallel.collectives import gather_objects
from dist_dml.parallel.world import World

_MODULUS = 2**64


class BatchLedger:
    """This worker's marks since the last `total`, and what all workers had before.

    Args:
        before: `Progress.ledger` of where training starts, the same on every worker.
    """

    def __init__(self, before: int = 0) -> None:
        self._before, self._own = before, 0

    def add(
        self, step: int, positions: Int64[Tensor, " r"], sample_ids: Int64[Tensor, " r"]
    ) -> None:
        """Rows of this worker that a step was computed from. Some microseconds, on the host."""
        self._own = (self._own + marks_of(step, positions, sample_ids)) % _MODULUS

    def total(self, world: World) -> int:
        """The sum over all workers up to here; by all workers together."""
        self._before = (self._before + sum(gather_objects(self._own, world.group))) % _MODULUS
        self._own = 0
        return self._before


def marks_of(step: int, positions: Int64[Tensor, " r"], sample_ids: Int64[Tensor, " r"]) -> int:
    """The sum of some rows' marks, modulo 2^64."""
    keys = row_keys(key_of(0, "ledger", step), positions)
    # Mixed once more with the sample, so that exchanged samples do not cancel.
    return int(row_keys(0, keys ^ (sample_ids * 2 + 1)).sum()) % _MODULUS


def ledger_of_plan(plan: Plan, steps: Iterable[int]) -> int:
    """What the ledger is after these steps of a plan, if no image was damaged."""
    total = 0
    for step in steps:
        for positions, ids in plan.micro_batches(step):
            places = torch.from_numpy(np.asarray(positions, np.int64))
            total += marks_of(step, places, torch.from_numpy(np.asarray(ids, np.int64)))
    return total % _MODULUS
