"""The collectives of a step, each the exact adjoint of its forward. Rows may be uneven.

Dimensions: r rows of this worker, R of all workers in worker order, D features, W workers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.distributed import ProcessGroup


class PendingGather:
    """All workers' rows in worker order, on their way while something else is computed.

    Costs one all-gather of the rows, padded to the largest count. No gradient: that of this
    worker's rows is what `PendingReduction` brings back.

    Args:
        rows: this worker's rows; `row_counts[rank]` of them. Any dtype and number of dimensions.
        row_counts: rows of every worker, known from the plan, so that no worker has to ask.
        group: the workers, or None for one process.
    """

    def __init__(
        self,
        rows: Shaped[Tensor, "r *rest"],
        row_counts: tuple[int, ...],
        group: ProcessGroup | None,
    ) -> None:
        self._gathered, self._work, self._row_counts = rows, None, row_counts
        if group is None or group.size() == 1:
            return
        largest = max(row_counts)
        # Kept until `wait`: the transfer reads it.
        self._padded = rows.contiguous()
        if len(rows) < largest:
            self._padded = rows.new_zeros(largest, *rows.shape[1:])
            self._padded[: len(rows)] = rows
        self._gathered = rows.new_empty(len(row_counts) * largest, *rows.shape[1:])
        self._work = dist.all_gather_single(
            self._gathered, self._padded, group=group, async_op=True
        )

    def wait(self) -> Shaped[Tensor, "R *rest"]:
        """The rows, once they are all there."""
        if self._work is None:
            return self._gathered
        self._work.wait()
        if min(self._row_counts) == max(self._row_counts):
            return self._gathered
        parts = self._gathered.unflatten(0, (len(self._row_counts), -1))
        return torch.cat(
            [part[:count] for part, count in zip(parts, self._row_counts, strict=True)]
        )


def gather_uneven(
    rows: Shaped[Tensor, "r *rest"], row_counts: tuple[int, ...], group: ProcessGroup | None
) -> Shaped[Tensor, "R *rest"]:
    """All workers' rows in worker order; no gradient. See `PendingGather`."""
    return PendingGather(rows, row_counts, group).wait()


def gather_to_first(
    rows: Shaped[Tensor, "r *rest"], row_counts: tuple[int, ...], group: ProcessGroup | None
) -> list[Shaped[Tensor, "n *rest"]]:
    """Every worker's rows, in worker order, on the first worker; an empty list on the others.

    Costs what the largest part does, times W, on the first worker alone. No gradient.
    """
    if group is None or group.size() == 1:
        return [rows]
    padded = rows.new_zeros(max(row_counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in row_counts] if group.rank() == 0 else None
    dist.gather(padded, parts, group=group, group_dst=0)
    return [part[:count] for part, count in zip(parts or [], row_counts, strict=False)]


class PendingReduction:
    """This worker's rows of the sum over workers, on its way while something else is computed.

    The adjoint of `PendingGather`: exact for a loss that every worker computes a part of. Costs one
    reduce-scatter of the rows, padded to the largest count.

    Args:
        rows: (R, D) this worker's part of the sum.
        row_counts: rows of every worker.
        group: the workers.
    """

    def __init__(
        self, rows: Float[Tensor, "R D"], row_counts: tuple[int, ...], group: ProcessGroup
    ) -> None:
        rank, largest = group.rank(), max(row_counts)
        self._padded = rows.contiguous()
        if min(row_counts) < largest:
            self._padded = rows.new_zeros(len(row_counts) * largest, *rows.shape[1:])
            start = 0
            for worker, count in enumerate(row_counts):
                first = worker * largest
                self._padded[first : first + count] = rows[start : start + count]
                start += count
        own = rows.new_empty(largest, *rows.shape[1:])
        work = dist.reduce_scatter_single(own, self._padded, group=group, async_op=True)
        assert work is not None
        self._work = work
        self._own = own[: row_counts[rank]]

    def wait(self) -> Float[Tensor, "r D"]:
        """The rows, once they are all added up."""
        self._work.wait()
        return self._own


def gather_equal(
    values: Shaped[Tensor, "*shape"], group: ProcessGroup | None
) -> Shaped[Tensor, "W *shape"]:
    """Every worker's `values`, stacked in worker order; no gradient."""
    if group is None or group.size() == 1:
        return values[None]
    stacked = values.new_empty(group.size(), *values.shape)
    dist.all_gather_single(stacked, values.contiguous()[None], group=group)
    return stacked


def merge_over_workers(
    values: Float[Tensor, "k R"],
    merge: Callable[[Float[Tensor, "W k r"]], Float[Tensor, "k r"]],
    group: ProcessGroup | None,
) -> Float[Tensor, "k R"]:
    """`merge` of all workers' numbers of each row, the same bits on every worker; no gradient.

    Not an all-reduce: any rule can be given, and numbers are merged in worker order. Each worker
    merges its share of the rows for all (an all-to-all), and gathers what the others merged:
    2 (W - 1) / W * k R numbers received, the least that any agreement takes. Two workers simply
    exchange what they have, which is as many in one message.

    Args:
        values: of this worker.
        merge: from n workers' numbers to those of their union, row by row.
        group: the workers, or None for one process.
    """
    if group is None or group.size() == 1:
        return values
    workers, (numbers, rows) = group.size(), values.shape
    if workers == 2:
        return merge(gather_equal(values, group))
    share = -(-rows // workers)
    padded = values.new_zeros(workers, numbers, share)
    for worker in range(workers):
        part = values[:, worker * share : (worker + 1) * share]
        padded[worker, :, : part.shape[1]] = part
    received = torch.empty_like(padded)
    dist.all_to_all_single(received, padded, group=group)
    merged = gather_equal(merge(received), group)
    return merged.transpose(0, 1).flatten(1)[:, :rows].contiguous()


def return_rows(
    values: Shaped[Tensor, "R *rest"], row_counts: tuple[int, ...], group: ProcessGroup | None
) -> Shaped[Tensor, "W r *rest"]:
    """What every worker, in worker order, has to say of this worker's rows; no gradient.

    The way back of `gather_uneven`: each worker has computed something for the rows of all.
    Costs one all-to-all, padded to the largest count.

    Args:
        values: of this worker, for the rows of all workers in worker order.
        row_counts: rows of every worker.
        group: the workers, or None for one process.
    """
    if group is None or group.size() == 1:
        return values[None]
    workers, largest = group.size(), max(row_counts)
    padded = values.new_zeros(workers, largest, *values.shape[1:])
    for worker, part in enumerate(values.split(list(row_counts))):
        padded[worker, : len(part)] = part
    received = torch.empty_like(padded)
    dist.all_to_all_single(received, padded, group=group)
    return received[:, : row_counts[group.rank()]]


def gather_objects(value: Any, group: ProcessGroup | None) -> list[Any]:
    """Every worker's small Python value, in worker order (pickled among our own workers only)."""
    if group is None or group.size() == 1:
        return [value]
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def barrier(group: ProcessGroup | None) -> None:
    """Wait until every worker has come here."""
    if group is not None and group.size() > 1:
        dist.barrier(group=group)


def scale_gradient(values: Float[Tensor, "*shape"], factor: float) -> Float[Tensor, "*shape"]:
    """`values`, whose gradient arrives multiplied by `factor`."""
    return values if factor == 1 else _ScaleGradient.apply(values, factor)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient * ctx.factor, None
