"""Exact losses over all classes from one worker's share of them.

Sweeps over tiles of this worker's classes and agreements between them: nothing of the size of the
classes travels, and a full row of logits never exists. The sweeps know no loss by name.

Dimensions: R rows of all workers, C classes of all workers, c of this one, K centres of a class, D
features, k statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dist_dml.losses.proxies import CentreSpread, ColumnLoss
from dist_dml.losses.softmax import RowLoss, TileTarget
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.collectives import gather_equal
from dist_dml.parallel.sweep_torch import (
    ClassShard,
    TileDemand,
    tile_bounds,
    tile_classes_within,
    tile_gradient_,
    tile_logits,
)

# Tiles whose statistics are merged in one go: a merge is many operations on few numbers, and took a
# tenth of a step with L1's power sums when it was made for every tile.
_MERGED_AT_ONCE = 4


@dataclass(frozen=True)
class ClassParallelProblem:
    """What stays the same for all rows of a sweep.

    Attributes:
        loss: the loss, of rows or of columns.
        partition: this worker's class ids.
        shard: this worker's weights and gradients.
        tile_bytes: most memory beyond weights, gradients and optimizer state.
        accumulate: add to the shard's gradients instead of overwriting them.
        spread: a further term on the centres of each class.
    """

    loss: RowLoss | ColumnLoss
    partition: ClassPartition
    shard: ClassShard
    tile_bytes: int
    accumulate: bool = False
    spread: CentreSpread | None = None

    def demand(self, num_rows: int, num_features: int) -> TileDemand:
        """What a sweep holds for so many rows."""
        cosine = self.shard.scale is not None
        return demand_of(self.loss, num_rows, num_features, self.shard.tile_dtype, cosine)


def demand_of(
    loss: RowLoss | ColumnLoss,
    num_rows: int,
    num_features: int,
    tile_dtype: torch.dtype | None,
    cosine: bool,
) -> TileDemand:
    """What a loss holds during a sweep."""
    centres, numbers = (loss.centres, loss.row_numbers) if isinstance(loss, RowLoss) else (1, 6)
    rounded = tile_dtype is not None
    return TileDemand(num_rows, num_features, centres, loss.buffers, numbers, cosine, rounded)


def class_parallel_loss(
    rows: Float[Tensor, "R D"], labels: Int[Tensor, " R"], problem: ClassParallelProblem
) -> tuple[Float[Tensor, "*values"], Bool[Tensor, " R"], Float[Tensor, ""]]:
    """The loss against all C classes, whether each label has the largest logit, and the term on
    centres (0 without one).

    Equal to the loss over the concatenated logits of all workers: one value a row for a row loss,
    a single one for a column loss. Every worker passes the same rows and gets the same values.
    Backward gives *this worker's part* of the rows' gradient (the sum over workers is the whole)
    and writes the whole gradient of its own classes into the shard. Costs 8*R*c*K*D operations
    forward and backward together (logits are computed twice; 10 for a loss that is refined), one
    all-gather of k numbers a row (two), and at most `problem.tile_bytes` of memory. Accumulates in
    the rows' dtype, which is float32 or float64.

    Raises:
        UsageError: if `tile_bytes` cannot hold a small tile.
    """
    return cast(tuple[Tensor, Tensor, Tensor], _ClassParallelLoss.apply(rows, labels, problem))


class _ClassParallelLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, labels: Tensor, problem: ClassParallelProblem
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss = problem.loss
        if isinstance(loss, RowLoss):
            statistics = row_statistics(rows, labels, problem)
            values, peaks = loss.values(statistics), loss.label_and_rival(statistics)
            agreed = loss.gradient_terms(statistics)
        else:
            agreed, peaks = _column_sums(rows, labels, problem)
            values = loss.value(agreed)
        ctx.problem = problem
        ctx.save_for_backward(rows, labels, agreed)
        correct = peaks[0] > peaks[1]  # A tie is wrong: zero weights must not score 100%.
        ctx.mark_non_differentiable(correct)
        return values, correct, _spread(rows, problem)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        rows, labels, agreed = ctx.saved_tensors
        upstream, _, of_spread = gradients
        gradient = _backward_sweep(rows, labels, agreed, upstream, ctx.problem)
        _add_spread_gradient_(rows, of_spread, ctx.problem)
        return gradient, None, None


def tiles_of(
    rows: Tensor, labels: Tensor, problem: ClassParallelProblem
) -> Iterator[tuple[int, int, Tensor, TileTarget]]:
    """Bounds in this worker's classes, logits and targets of each tile.

    All logits share one buffer: those of a tile are gone when the next one is asked for.
    """
    demand = problem.demand(*rows.shape)
    size, first_class = problem.partition.size, problem.partition.start
    tile = min(size, tile_classes_within(problem.tile_bytes, demand, rows.element_size()))
    buffer = rows.new_empty(len(rows) * tile * problem.shard.centres)
    for start, stop in tile_bounds(size, tile):
        logits = tile_logits(rows, problem.shard, start, stop, buffer)
        target = TileTarget.of(labels, first_class + start, first_class + stop, first_class)
        yield start, stop, logits, target


def row_statistics(
    rows: Float[Tensor, "R D"], labels: Int[Tensor, " R"], problem: ClassParallelProblem
) -> Float[Tensor, "k R"]:
    """A row loss's statistics over all classes, the same on every worker; no gradient.

    The workers' statistics are gathered and merged in worker order by the loss's own rule, not
    all-reduced: any loss can state a merge, and the result is bitwise the same on all workers.
    """
    loss, group = problem.loss, problem.partition.group
    assert isinstance(loss, RowLoss)
    every = gather_equal(_own_statistics(rows, labels, problem, loss), group)
    whole = every[0] if len(every) == 1 else loss.merge(every)
    if not loss.refined:
        return whole
    parts = [
        loss.tile_refinement(logits, target, whole)
        for _, _, logits, target in tiles_of(rows, labels, problem)
    ]
    refined = gather_equal(torch.stack(parts).sum(0), group).sum(0)
    return torch.cat((whole, refined))


def _own_statistics(
    rows: Tensor, labels: Tensor, problem: ClassParallelProblem, loss: RowLoss
) -> Tensor:
    """Of this worker's classes. A function of its own, so that its buffer ends with it."""
    parts: list[Tensor] = []
    for _, _, logits, target in tiles_of(rows, labels, problem):
        parts.append(loss.tile_statistics(logits, target))
        if len(parts) == _MERGED_AT_ONCE:
            parts = [loss.merge(torch.stack(parts))]
    return parts[0] if len(parts) == 1 else loss.merge(torch.stack(parts))


def _column_sums(
    rows: Tensor, labels: Tensor, problem: ClassParallelProblem
) -> tuple[Tensor, Tensor]:
    """A column loss's sums over all classes, and each row's label and rival logits."""
    loss, group = problem.loss, problem.partition.group
    assert isinstance(loss, ColumnLoss)
    sums, peaks = [], []
    for _, _, logits, target in tiles_of(rows, labels, problem):
        label = target.read(logits)
        target.write_(logits, float("-inf"))
        peaks.append(torch.stack((label, logits.amax(1))))
        target.write_(logits, label)
        sums.append(loss.tile_sums(logits, target))
    total = gather_equal(torch.stack(sums).sum(0), group).sum(0)
    return total, gather_equal(torch.stack(peaks).amax(0), group).amax(0)


def _spread(rows: Tensor, problem: ClassParallelProblem) -> Tensor:
    """The term on centres of all workers' classes."""
    if problem.spread is None:
        return rows.new_zeros(())
    parts = [problem.spread.value(centres) for _, centres in _centre_tiles(rows, problem)]
    return gather_equal(torch.stack(parts).sum(), problem.partition.group).sum()


def _centre_tiles(rows: Tensor, problem: ClassParallelProblem) -> Iterator[tuple[slice, Tensor]]:
    """Rows of weights, and the centres (t, K, D) of as many classes as the budget allows."""
    shard = problem.shard
    count, width = shard.centres, shard.weight.shape[1]
    per_class = (5 * count * width + 3 * count * count) * rows.element_size()
    of_rows = problem.demand(*rows.shape).of_rows() * rows.element_size()
    tile = max(1, (problem.tile_bytes - of_rows) // per_class)
    for start, stop in tile_bounds(problem.partition.size, tile):
        own = shard.rows(start, stop)
        yield own, shard.weight[own].view(-1, count, width)


def _backward_sweep(
    rows: Tensor,
    labels: Tensor,
    agreed: Tensor,
    upstream: Tensor,
    problem: ClassParallelProblem,
) -> Tensor:
    shard = problem.shard
    row_gradient = torch.zeros_like(rows)
    for start, stop, logits, target in tiles_of(rows, labels, problem):
        problem.loss.gradient_(logits, target, agreed, upstream)
        tile_gradient_(rows, shard, start, stop, logits, row_gradient, problem.accumulate)
    return row_gradient


def _add_spread_gradient_(rows: Tensor, of_spread: Tensor, problem: ClassParallelProblem) -> None:
    """After the sweep, whose buffer is gone: the term on centres uses the same memory."""
    target = problem.shard.weight_gradient
    if problem.spread is None or target is None:
        return
    for own, centres in _centre_tiles(rows, problem):
        gradient = problem.spread.gradient(centres).flatten(0, 1)
        target[own].add_(gradient * of_spread)
