"""The collectives of a step, each the exact adjoint of its forward. Rows may be uneven.

Dimensions: r rows of this worker, R of all workers in worker order, D features, W workers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.distributed import ProcessGroup


def gather_rows(
    rows: Float[Tensor, "r D"], row_counts: tuple[int, ...], group: ProcessGroup | None
) -> Float[Tensor, "R D"]:
    """All workers' rows in worker order, differentiable.

    Equal to `torch.cat` of every worker's `rows`. The gradient of this worker's rows is the sum
    over all workers of their gradients of these rows (a reduce-scatter): exact for a loss that
    every worker computes a part of. Costs one all-gather forward and one reduce-scatter backward of
    the rows, padded to the largest count.

    Args:
        rows: this worker's rows; `row_counts[rank]` of them.
        row_counts: rows of every worker, known from the plan, so that no worker has to ask.
        group: the workers, or None for one process.
    """
    if group is None or group.size() == 1:
        return rows
    return _GatherRows.apply(rows, row_counts, group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, row_counts: tuple[int, ...], group: ProcessGroup) -> Tensor:
        ctx.row_counts, ctx.group = row_counts, group
        return gather_uneven(rows, row_counts, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return reduce_scatter_uneven(gradient, ctx.row_counts, ctx.group), None, None


def gather_uneven(
    rows: Shaped[Tensor, "r *rest"], row_counts: tuple[int, ...], group: ProcessGroup | None
) -> Shaped[Tensor, "R *rest"]:
    """`gather_rows` without a gradient, for any dtype and number of dimensions."""
    if group is None or group.size() == 1:
        return rows
    largest = max(row_counts)
    padded = rows.contiguous()
    if len(rows) < largest:
        padded = rows.new_zeros(largest, *rows.shape[1:])
        padded[: len(rows)] = rows
    gathered = rows.new_empty(len(row_counts) * largest, *rows.shape[1:])
    dist.all_gather_single(gathered, padded, group=group)
    if min(row_counts) == largest:
        return gathered
    parts = gathered.view(len(row_counts), largest, *rows.shape[1:])
    return torch.cat([part[:count] for part, count in zip(parts, row_counts, strict=True)])


def reduce_scatter_uneven(
    rows: Float[Tensor, "R D"], row_counts: tuple[int, ...], group: ProcessGroup
) -> Float[Tensor, "r D"]:
    """This worker's rows of the sum over workers of `rows`."""
    rank, largest = group.rank(), max(row_counts)
    if min(row_counts) == largest:
        padded = rows.contiguous()
    else:
        padded = rows.new_zeros(len(row_counts) * largest, *rows.shape[1:])
        start = 0
        for worker, count in enumerate(row_counts):
            padded[worker * largest : worker * largest + count] = rows[start : start + count]
            start += count
    own = rows.new_empty(largest, *rows.shape[1:])
    dist.reduce_scatter_single(own, padded, group=group)
    return own[: row_counts[rank]]


def gather_equal(
    values: Shaped[Tensor, "*shape"], group: ProcessGroup | None
) -> Shaped[Tensor, "W *shape"]:
    """Every worker's `values`, stacked in worker order; no gradient."""
    if group is None or group.size() == 1:
        return values[None]
    stacked = values.new_empty(group.size(), *values.shape)
    dist.all_gather_single(stacked, values.contiguous()[None], group=group)
    return stacked


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
