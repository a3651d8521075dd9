"""The plan: which samples form which global batch. A pure function of its fields, without I/O.

Workers and loader processes only cut the plan's batches into slices, so they cannot change what is
trained on. What an epoch draws, and in which order, is an *order*: `dist_dml.data.orders` (every
sample once, or with repeats), `.windows` (whole shards), `.balanced` (P classes x K samples) and
`.mixture` (several data sets).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Int, Int64

from dist_dml.data.balanced import BalancedOrder
from dist_dml.data.mixture import Mixture
from dist_dml.data.orders import (
    Order,
    RepeatedOrder,
    SequentialOrder,
    ShuffledOrder,
    SplitColumns,
    cuts,
    group_rows,
    position_type,
)
from dist_dml.data.windows import ShardOrder, WindowOrder
from dist_dml.data_config import DataConfig
from dist_dml.errors import UsageError
from dist_dml.keyed_random import key_of

_UNSET = {"order": "shuffled", "repeat_below": 0.0, "locality": "global"}
"""What a plan's identity leaves out where it is so: checkpoints from before these keys go on."""
_NEWER = ("num_samples", "steps_per_epoch")
"""Facts that the first checkpoints do not record; the fingerprint covers them."""


def row_counts(num_rows: int, num_workers: int) -> tuple[int, ...]:
    """Rows of each worker: they add up to `num_rows` and differ by at most one."""
    bounds = cuts(num_rows, num_workers)
    return tuple(stop - start for start, stop in pairwise(bounds))


def worker_slice(num_rows: int, rank: int, num_workers: int) -> slice:
    """The contiguous rows of worker `rank`; the slices of all workers are the rows in order."""
    bounds = cuts(num_rows, num_workers)
    return slice(bounds[rank], bounds[rank + 1])


@dataclass(frozen=True, eq=False)
class Plan:
    """The order of training samples over the whole run, cut into global batches.

    An epoch is `order.num_draws` draws, the same number in each; its last batch is short, or left
    out. Epochs follow each other, and steps count over the whole run.

    Attributes:
        sample_ids: the samples of the split.
        batch_size: rows of the global batch.
        accumulate: micro-batches of a global batch.
        seed: together with the epoch's number, decides the order.
        drop_last: leave out the short last batch of an epoch.
        order: of positions in `sample_ids`; None shuffles them by `seed`.
        rows_together: consecutive rows that stay in one micro-batch: the K of P x K.
    """

    sample_ids: Int[np.ndarray, " n"]
    batch_size: int
    accumulate: int = 1
    seed: int = 0
    drop_last: bool = False
    order: Order | None = None
    rows_together: int = 1

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise UsageError(
                f"data.batch_size={self.batch_size} with "
                f"data.drop_last={str(self.drop_last).lower()} makes no batch of "
                f"{self._order.num_draws} samples; lower data.batch_size or set "
                "data.drop_last=false"
            )

    @cached_property
    def _order(self) -> Order:
        return self.order or ShuffledOrder(len(self.sample_ids), self.seed)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Global batches of one epoch."""
        full, rest = divmod(self._order.num_draws, self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    @property
    def samples_per_epoch(self) -> int:
        """Rows of one epoch, repetitions counted; without `drop_last`, all draws of the order."""
        return min(self._order.num_draws, self.steps_per_epoch * self.batch_size)

    @property
    def max_micro_rows(self) -> int:
        """Most rows of a micro-batch."""
        groups = self.batch_size // self.rows_together
        return -(-groups // self.accumulate) * self.rows_together

    def num_rows(self, step: int) -> int:
        """Rows of the global batch of `step`: `batch_size`, or what is left in an epoch's last."""
        start = step % self.steps_per_epoch * self.batch_size
        return min(self.batch_size, self.samples_per_epoch - start)

    def global_batch(self, step: int) -> Int[np.ndarray, " B"]:
        """Sample ids of the global batch of `step`, which counts over the whole run.

        The first step of an epoch makes its order, which may take seconds for very many samples:
        `dist_dml.data.orders` has a table.
        """
        epoch, number = divmod(step, self.steps_per_epoch)
        start = number * self.batch_size
        return self.sample_ids[self._order.take(epoch, start, start + self.num_rows(step))]

    def micro_batches(self, step: int) -> list[tuple[Int[np.ndarray, " b"], Int[np.ndarray, " b"]]]:
        """The global batch in `accumulate` contiguous pieces of nearly the same size.

        They differ by at most one row, in P x K by at most one class with its K rows.

        Returns:
            For each piece the positions within the global batch, and the sample ids.
        """
        batch = self.global_batch(step)
        together = self.rows_together
        bounds = [together * cut for cut in cuts(len(batch) // together, self.accumulate)]
        return [(np.arange(start, stop), batch[start:stop]) for start, stop in pairwise(bounds)]

    def shards_ahead(self, step: int, count: int) -> Int64[np.ndarray, " s"]:
        """Codes of the shards that `step` and the following steps read, in the order of their
        windows and each once.

        First all shards of the windows that the batch of `step` is drawn from: any of them may
        still be needed. Then the `count` next ones, as far as they come within an epoch from there.
        Empty where the order has no windows: any sample may follow any other, and there is nothing
        to fetch ahead.
        """
        epoch, number = divmod(step, self.steps_per_epoch)
        start = epoch * self._order.num_draws + number * self.batch_size
        stop = start + self.num_rows(step)
        codes: dict[int, None] = {}
        needed = 0
        for first, shards in self._order.windows_from(start):
            if first >= stop and len(codes) >= needed + count:
                break
            if first >= stop + self._order.num_draws:
                break
            codes.update(dict.fromkeys(shards.tolist()))
            if first < stop:
                needed = len(codes)
        return np.array(list(codes)[: needed + count], np.int64)

    def identity(self) -> dict[str, Any]:
        """Everything that the batches depend on besides the samples themselves. JSON-able.

        A data set's fingerprint and split stand for the samples. What is as in the first plans (all
        samples shuffled) is left out, so that their checkpoints compare equal.
        """
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "accumulate": self.accumulate,
            "drop_last": self.drop_last,
            "num_samples": len(self.sample_ids),
            **self._order.identity(),
        }

    def check_rows(self, num_workers: int) -> None:
        """Refuse a run in which some micro-batch has fewer rows than there are workers.

        Raises:
            UsageError: states the batch, its rows and the keys that change it.
        """
        samples = self._order.num_draws
        full = min(self.batch_size, samples)
        last = self.num_rows(self.steps_per_epoch - 1)
        if self._least_rows(full) < num_workers:
            name, rows = "a global batch", full
            remedy = "lower training.accumulate or use fewer workers"
            if samples > self.batch_size:
                remedy = "raise data.batch_size, " + remedy
        elif self._least_rows(last) < num_workers:
            name, rows = "the last batch of an epoch", last
            remedy = "set data.drop_last=true or change data.batch_size"
            if self.accumulate > 1:
                remedy += " or training.accumulate"
        else:
            return
        raise UsageError(
            f"{name} has {rows} rows (data.batch_size={self.batch_size}, {samples} samples), in "
            f"training.accumulate={self.accumulate} micro-batches of at least "
            f"{self._least_rows(rows)}: expected a row for each of {num_workers} workers; {remedy}"
        )

    def _least_rows(self, rows: int) -> int:
        """Rows of the smallest micro-batch of a batch of `rows`."""
        return rows // self.rows_together // self.accumulate * self.rows_together


def build_plan(
    sample_ids: Int[np.ndarray, " n"],
    columns: SplitColumns,
    data: DataConfig,
    accumulate: int,
    seed: int,
) -> Plan:
    """The plan that a configuration asks for.

    Args:
        sample_ids: the samples that are trained on, of all parts of a mixture.
        columns: their classes, shards and parts.
        data: order, batch size, locality, repeats, weights.
        accumulate: micro-batches of a global batch.
        seed: of the order.

    Raises:
        UsageError: no batch comes about: too few samples or classes, or a part without samples.
    """
    together = data.samples_per_class if data.order == "balanced" else 1
    order = _mixture(columns, data, seed) if data.mixture else _order_of(columns, data, seed)
    return Plan(sample_ids, data.batch_size, accumulate, seed, data.drop_last, order, together)


def _mixture(columns: SplitColumns, data: DataConfig, seed: int) -> Mixture:
    """Each part in its own order; the first has the run's seed, as without a mixture."""
    orders: list[Order] = []
    parts: list[Int[np.ndarray, " p"]] = []
    for number in range(1 + len(data.mixture)):
        rows = np.flatnonzero(columns.part == number).astype(position_type(len(columns.part)))
        if not len(rows):
            name = f"data.mixture[{number - 1}].path" if number else "data.path"
            path, split = (
                (data.mixture[number - 1].path, data.mixture[number - 1].split)
                if number
                else (data.path, data.split)
            )
            raise UsageError(
                f"{name}={path} has no samples of split {split!r} to mix in; correct its split, or "
                "leave it out of data.mixture"
            )
        part = SplitColumns(columns.class_id[rows], columns.shard[rows], columns.part[rows])
        orders.append(_order_of(part, data, key_of(seed, "part", number) if number else seed))
        parts.append(rows)
    weights = (data.weight, *(part.weight for part in data.mixture))
    return Mixture(tuple(orders), tuple(parts), weights)


def _order_of(columns: SplitColumns, data: DataConfig, seed: int) -> Order:
    """The order of one data set. `DataConfig` has refused what does not go together."""
    number = len(columns.class_id)
    if data.order == "balanced":
        classes_per_batch = data.batch_size // data.samples_per_class
        classes = group_rows(columns.class_id)
        return BalancedOrder(classes, classes_per_batch, data.samples_per_class, seed)
    if data.locality == "window":
        shards = group_rows(columns.shard)
        if data.order == "sequential":
            return ShardOrder(shards)
        return WindowOrder(shards, data.window_shards, seed)
    if data.order == "sequential":
        return SequentialOrder(number)
    if data.repeat_below:
        return RepeatedOrder(group_rows(columns.class_id), data.repeat_below, seed)
    return ShuffledOrder(number, seed)


def plan_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between the facts of two plans, as "batch_size 128 -> 256", in their order.

    A key that one of them lacks has its default there. `num_samples` and `steps_per_epoch` count
    only where both have them: the first checkpoints do not.
    """
    differing = []
    for key in {**new, **old}:
        if key in _NEWER and (key not in old or key not in new):
            continue
        before, now = (facts.get(key, _UNSET.get(key)) for facts in (old, new))
        if before != now:
            differing.append(f"{key} {_shown(before)} -> {_shown(now)}")
    return differing


def _shown(value: Any) -> str:
    return "unset" if value is None else repr(value)
