"""Exact losses over all classes from one worker's share of them.

Sweeps over tiles of this worker's classes and agreements between them: nothing of the size of the
classes travels, and a full row of logits never exists. The sweeps know no loss by name. Losses of
softmax form may run on a backend of kernels (`class_kernels`), all others on torch operations
(`torch_sweeps`).

Dimensions: R rows of all workers, r of this one, C classes of all workers, c of this one, K centres
of a class, D features, k statistics.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dist_dml.losses.proxies import ColumnLoss
from dist_dml.losses.softmax import TileTarget, softmax_form
from dist_dml.parallel.class_kernels import forward_by_kernels, weights_by_kernels
from dist_dml.parallel.class_problem import ClassParallelProblem, RowBatch
from dist_dml.parallel.collectives import PendingReduction, merge_over_workers
from dist_dml.parallel.torch_sweeps import (
    backward_sweep,
    column_sums,
    row_statistics,
    spread_value,
)


def class_parallel_loss(
    rows: Float[Tensor, "R D"],
    labels: Int[Tensor, " R"],
    problem: ClassParallelProblem,
    own_rows: Float[Tensor, "r D"] | None = None,
    row_counts: tuple[int, ...] = (),
) -> tuple[Float[Tensor, "*values"], Bool[Tensor, " R"], Float[Tensor, ""]]:
    """The loss against all C classes, whether each label has the largest logit, and the term on
    centres (0 without one).

    Equal to the loss over the concatenated logits of all workers: one value a row for a row loss,
    a single one for a column loss. Every worker passes the same rows and gets the same values.
    Backward fills `problem.target`: it updates this worker's classes in place, or writes their
    gradient, or does neither and remembers the batch for a later one. Costs 8*R*c*K*D operations
    forward and backward together (6 with `keep`, 10 for a loss that is refined), one all-gather of
    k numbers a row (two), and at most `problem.tile_bytes` of memory. Accumulates in the rows'
    dtype, which is float32 or float64.

    Args:
        rows: of all workers.
        labels: of all rows, global class ids.
        problem: what stays the same for all rows.
        own_rows: this worker's part of `rows`. Given, its gradient is *the sum over workers*, which
            travels while the weights are swept where the backend allows; without, `rows` get *this
            worker's part* of theirs.
        row_counts: rows of every worker, with `own_rows`.

    Raises:
        UsageError: if `tile_bytes` cannot hold a small tile.
    """
    leaf = rows if own_rows is None else own_rows
    result = _ClassParallelLoss.apply(leaf, rows.detach(), labels, problem, row_counts)
    return cast(tuple[Tensor, Tensor, Tensor], result)


class _ClassParallelLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        leaf: Tensor,
        rows: Tensor,
        labels: Tensor,
        problem: ClassParallelProblem,
        row_counts: tuple[int, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, kernels, kept = problem.loss, None, None
        if isinstance(loss, ColumnLoss):
            agreed, peaks = column_sums(rows, labels, problem)
            values, statistics = loss.value(agreed), agreed
        else:
            if problem.backend is not None:
                kernels = forward_by_kernels(rows, labels, problem, ctx.needs_input_grad[0])
                own, kept = kernels.statistics, kernels.kept
                statistics = merge_over_workers(own, loss.merge, problem.partition.group)
            else:
                statistics, kept = row_statistics(rows, labels, problem)
            values, peaks = loss.values(statistics), loss.label_and_rival(statistics)
            agreed = loss.gradient_terms(statistics)
        ctx.problem, ctx.row_counts, ctx.kernels = problem, row_counts, kernels
        ctx.kept = kept
        ctx.save_for_backward(rows, labels, agreed, statistics, values)
        correct = peaks[0] > peaks[1]  # A tie is wrong: zero weights must not score 100%.
        ctx.mark_non_differentiable(correct)
        return values, correct, spread_value(rows, problem)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        rows, labels, agreed, statistics, values = ctx.saved_tensors
        upstream, _, of_spread = gradients
        problem: ClassParallelProblem = ctx.problem
        # The same on every worker, as all have the same values: no worker updates alone.
        finite = torch.isfinite(values).all()
        normaliser = None
        if (
            problem.filter_below > 0
            and ctx.kernels is None
            and (form := softmax_form(problem.loss))
        ):
            nowhere = TileTarget.of(torch.full_like(labels, -1), 0, 1)
            normaliser = form.row_rule(statistics, nowhere, torch.ones_like(values)).normaliser
        batch = RowBatch(rows, labels, agreed, upstream, finite, ctx.kept, of_spread, normaliser)
        exchange = _Exchange(problem, ctx.row_counts)
        if ctx.kernels is None:
            exchange.start(backward_sweep(batch, problem))
        else:
            weights_by_kernels(batch, statistics, ctx.kernels, problem, exchange.start)
        if problem.target is not None and problem.after is not None:
            problem.after()
        return exchange.result(), None, None, None, None


class _Exchange:
    """The sum over workers of the rows' gradients, on its way while something else is computed."""

    def __init__(self, problem: ClassParallelProblem, row_counts: tuple[int, ...]) -> None:
        self._group, self._row_counts = problem.partition.group, row_counts
        self._gradient: Tensor | None = None
        self._pending: PendingReduction | None = None

    def start(self, gradient: Tensor) -> None:
        """Take this worker's part of the gradient of all rows."""
        if self._group is None or not self._row_counts:
            self._gradient = gradient
        else:
            self._pending = PendingReduction(gradient, self._row_counts, self._group)

    def result(self) -> Tensor | None:
        """This worker's rows of the sum, or its part of the gradient where there is no exchange."""
        return self._gradient if self._pending is None else self._pending.wait()
