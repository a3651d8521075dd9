"""Pairwise cross-entropy (paper B, eq. 12) with rows of all workers and classes split over them.

PCE is no `PairLoss`: its soft means couple all rows. Its double sums over pairs are squares of sums
over classes, and a class's sums are its owner's, so that no pairs and no full row of logits exist.

Dimensions: r rows of this worker, R of all in worker order, c classes of this worker, D features.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_dml.errors import UsageError
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.collectives import (
    PendingGather,
    PendingReduction,
    gather_equal,
    gather_uneven,
    scale_gradient,
)


def class_parallel_pce(
    rows: Float[Tensor, "r D"],
    labels: Int[Tensor, " r"],
    row_counts: tuple[int, ...],
    probabilities: Float[Tensor, "R c"],
    partition: ClassPartition,
    ridge: float,
    ignored: int,
) -> Float[Tensor, ""]:
    """PCE of all workers' rows: the same bits on every worker.

    Equal to `losses.pairwise_cross_entropy.pairwise_cross_entropy` of the rows that are not
    ignored, in value and in the gradient of the rows, with the probabilities held fixed as in the
    paper's bound optimisation. The gradient is that of the whole loss *times the number of
    workers*, because the engines average over workers afterwards.

    Costs 8 * R * c * D operations a worker; moves one gather of rows and labels, R numbers, and one
    reduce-scatter of rows; holds a few buffers of R x c.

    Args:
        rows: this worker's embeddings, as they come.
        labels: of those rows.
        row_counts: rows of every worker; may be uneven.
        probabilities: p_ik of every worker's rows for the classes of this worker.
        partition: this worker's classes.
        ridge: lambda, above 0.
        ignored: label of rows that take no part.

    Raises:
        UsageError: if `ridge` is not above 0.
    """
    if not ridge > 0:
        raise UsageError(
            f"pairwise cross-entropy got ridge {ridge}, but lambda must be above 0; choose it"
        )
    group = partition.group
    workers = 1 if group is None else group.size()
    assert probabilities.shape == (sum(row_counts), partition.size)
    scaled = scale_gradient(rows, workers)
    travelling = PendingGather(scaled.detach(), row_counts, group)
    every = gather_uneven(labels, row_counts, group)
    found = _ClassParallelPce.apply(
        scaled,
        travelling.wait(),
        every,
        probabilities.detach(),
        row_counts,
        partition,
        ridge,
        ignored,
    )
    return cast(Tensor, found)


class _ClassParallelPce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        leaf: Tensor,
        rows: Tensor,
        labels: Tensor,
        probabilities: Tensor,
        row_counts: tuple[int, ...],
        partition: ClassPartition,
        ridge: float,
        ignored: int,
    ) -> Tensor:
        group: ProcessGroup | None = partition.group
        known = labels != ignored
        count = known.sum().clamp_min(1)
        own = known & (labels >= partition.start) & (labels < partition.stop)
        with torch.enable_grad():
            features = rows.detach().requires_grad_()
            hard = features.new_zeros(partition.size, features.shape[1]).index_add(
                0, labels[own] - partition.start, features[own]
            )
            soft = torch.where(known[:, None], probabilities, 0).mT @ features / count
            squares = (hard / count).square().sum() + soft.square().sum()
            mass = (features @ soft.mT / ridge).logsumexp(1)
        # Of all classes: what each worker's are of it is the weight of its gradient.
        whole = gather_equal(mass.detach(), group).logsumexp(0)
        with torch.enable_grad():
            shares = torch.where(known, (mass.detach() - whole).exp() / count, 0)
            part = (shares * mass).sum() - squares / (2 * ridge)
        (gradient,) = torch.autograd.grad(part, features)
        ctx.save_for_backward(gradient)
        ctx.row_counts, ctx.group = row_counts, group
        # Added up by each worker in worker order: an all-reduce promises no order.
        total = gather_equal(squares.detach(), group).sum(0)
        return torch.where(known, whole, 0).sum() / count - total / (2 * ridge)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        scaled = gradients[0] * gradient
        if ctx.group is not None and ctx.group.size() > 1:
            scaled = PendingReduction(scaled, ctx.row_counts, ctx.group).wait()
        return scaled, *[None] * 7
