"""Exact losses over all classes from one worker's share of them.

Two sweeps over tiles of this worker's classes and one agreement between them: nothing of the size
of the classes travels, and a full row of logits never exists. The sweeps know no loss by name.

Dimensions: R rows of all workers, C classes of all workers, c of this one, D features, k
statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dist_dml.losses.softmax import RowLoss, TileTarget
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.collectives import gather_equal
from dist_dml.parallel.sweep_torch import (
    ClassShard,
    tile_bounds,
    tile_classes_within,
    tile_gradient_,
    tile_logits,
)


@dataclass(frozen=True)
class ClassParallelProblem:
    """What stays the same for all rows of a sweep.

    Attributes:
        loss: the row loss.
        partition: this worker's class ids.
        shard: this worker's weights and gradients.
        tile_bytes: most memory beyond weights, gradients and optimizer state.
        accumulate: add to the shard's gradients instead of overwriting them.
    """

    loss: RowLoss
    partition: ClassPartition
    shard: ClassShard
    tile_bytes: int
    accumulate: bool = False


def class_parallel_loss(
    rows: Float[Tensor, "R D"], labels: Int[Tensor, " R"], problem: ClassParallelProblem
) -> tuple[Float[Tensor, " R"], Bool[Tensor, " R"]]:
    """The loss of each row against all C classes, and whether its label has the largest logit.

    Equal to the loss over the concatenated logits of all workers. Every worker passes the same rows
    and gets the same values. Backward gives *this worker's part* of the rows' gradient (the sum
    over workers is the whole) and writes the whole gradient of its own classes into the shard.
    Costs 8*R*c*D operations forward and backward together (logits are computed twice), one
    all-gather of k numbers a row, and at most `problem.tile_bytes` of memory. Accumulates in the
    rows' dtype, which is float32 or float64.

    Raises:
        UsageError: if `tile_bytes` cannot hold a small tile.
    """
    values, correct = cast(tuple[Tensor, Tensor], _ClassParallelLoss.apply(rows, labels, problem))
    return values, correct


class _ClassParallelLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, labels: Tensor, problem: ClassParallelProblem
    ) -> tuple[Tensor, Tensor]:
        statistics = _statistics(rows, labels, problem)
        ctx.problem = problem
        ctx.save_for_backward(rows, labels, statistics)
        correct = problem.loss.correct(statistics)
        ctx.mark_non_differentiable(correct)
        return problem.loss.values(statistics), correct

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        rows, labels, statistics = ctx.saved_tensors
        return _backward_sweep(rows, labels, statistics, gradients[0], ctx.problem), None, None


def _tiles(rows: Tensor, problem: ClassParallelProblem) -> tuple[list[tuple[int, int]], Tensor]:
    """The bounds of all tiles and the one buffer that their logits share."""
    size = problem.partition.size
    num_rows, num_features = rows.shape
    tile = min(
        size,
        tile_classes_within(problem.tile_bytes, num_rows, num_features, rows.element_size()),
    )
    return list(tile_bounds(size, tile)), rows.new_empty(len(rows) * tile)


def _statistics(rows: Tensor, labels: Tensor, problem: ClassParallelProblem) -> Tensor:
    """The forward sweep and the agreement: (k, R), the same on every worker.

    The workers' statistics are gathered and merged in worker order by the loss's own rule, not
    all-reduced: any loss can state a merge, and the result is bitwise the same on all workers.
    """
    loss, first_class = problem.loss, problem.partition.start
    bounds, buffer = _tiles(rows, problem)
    merged: Tensor | None = None
    for start, stop in bounds:
        logits = tile_logits(rows, problem.shard, start, stop, buffer)
        target = TileTarget.of(labels, first_class + start, first_class + stop)
        statistics = loss.tile_statistics(logits, target)
        merged = statistics if merged is None else loss.merge(merged, statistics)
    assert merged is not None, "a partition owns at least one class"
    whole, *others = gather_equal(merged, problem.partition.group)
    for other in others:
        whole = loss.merge(whole, other)
    return whole


def _backward_sweep(
    rows: Tensor,
    labels: Tensor,
    statistics: Tensor,
    upstream: Tensor,
    problem: ClassParallelProblem,
) -> Tensor:
    first_class = problem.partition.start
    bounds, buffer = _tiles(rows, problem)
    row_gradient = torch.zeros_like(rows)
    for start, stop in bounds:
        logits = tile_logits(rows, problem.shard, start, stop, buffer)
        target = TileTarget.of(labels, first_class + start, first_class + stop)
        problem.loss.gradient_(logits, target, statistics, upstream)
        tile_gradient_(rows, problem.shard, start, stop, logits, row_gradient, problem.accumulate)
    return row_gradient
