"""Losses of pairs over the batch of all workers, each anchor once in the group.

Every worker gathers the rows of all, compares its *own* anchors with them, and with a memory's, in
blocks of anchors that fit a budget, and agrees with the others on two numbers. No matrix of all
pairs exists, and no mean is one of means: a mean over terms above zero has one divisor in the
whole group, where averaging the workers' losses would have one for each.

An ordinary wrapper gathers rows and computes all pairs on every worker: W times the work. Here the
pairs are shared out, so that the gradient of a row is in W pieces, which a reduce-scatter adds up.

Dimensions: r rows of this worker, B of all workers in worker order, M of the memory, R = B + M that
an anchor is compared with, m anchors of a block, D features, W workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_dml.errors import UsageError
from dist_dml.losses.pairs import AnchorLoss, PairLoss, compare, labelled_pairs_of
from dist_dml.parallel.collectives import (
    PendingGather,
    PendingReduction,
    gather_equal,
    gather_uneven,
    scale_gradient,
)

# Numbers of the rows' dtype for each pair of a block, at the peak of its backward. Counted in
# float32: 5 to 7 for losses of cosines, 10 for contrastive and triplet losses of distances (whose
# root and clamp are kept), 12 with all semi-hard triplets, 14 for FastAP; in float64, where masks
# weigh half, 2 fewer.
NUMBERS_A_PAIR = 16


class PairMemory(NamedTuple):
    """Rows of earlier batches that anchors are compared with as well; they are no anchors.

    The same on every worker, or the value is that of no single process. Not the rows of this batch:
    an anchor would be its own copy's positive.

    Attributes:
        rows: embeddings as the batch's are: normalised for cosines. They get no gradient.
        labels: of those rows.
    """

    rows: Float[Tensor, "M D"]
    labels: Int[Tensor, " M"]


def anchors_of_block(num_compared: int, block_mebibytes: float, element_size: int) -> int:
    """m: anchors whose `NUMBERS_A_PAIR` * m * R numbers fit the budget.

    Args:
        num_compared: R.
        block_mebibytes: the budget, in MiB.
        element_size: bytes of a number.

    Raises:
        UsageError: if the budget cannot hold one anchor.
    """
    of_anchor = NUMBERS_A_PAIR * max(1, num_compared) * element_size
    anchors = int(block_mebibytes * 2**20 / of_anchor)
    if anchors < 1:
        least = math.ceil(of_anchor / 2**20 * 10) / 10
        raise UsageError(
            f"loss.block_mebibytes={block_mebibytes:g} cannot hold one anchor against "
            f"{num_compared} rows; set it to {least:g} or more, or make the batch or the memory "
            "smaller"
        )
    return anchors


def pair_parallel_loss(
    rows: Float[Tensor, "r D"],
    labels: Int[Tensor, " r"],
    row_counts: tuple[int, ...],
    loss: PairLoss,
    group: ProcessGroup | None,
    memory: PairMemory | None,
    block_mebibytes: float,
    ignored: int,
) -> Float[Tensor, ""]:
    """The loss of all workers' rows: the same bits on every worker.

    Equal to `sum(values) / max(sum(weights), 1)` of one process that has the whole batch, in value
    and gradients. The gradient of `rows` is that of the whole loss *times the number of workers*,
    because the engines average over workers afterwards (as `ClassParallelClassifier.forward`).

    A row that is ignored counts nowhere, neither as an anchor nor in the divisor: the loss equals
    that of the batch without it, whatever weight a loss gives to an anchor that has no pairs.

    Costs 8*r*R*D operations, forward and backward together (2*r*M*D fewer, as a memory gets no
    gradient): blocks are computed again in the backward. Moves one all-gather of rows and labels,
    one of two numbers, and one reduce-scatter of rows. Holds `block_mebibytes`, the rows of all
    workers and, in the backward, three times their size: their gradient, one block's, and what
    either is made from.

    Args:
        rows: this worker's embeddings, float32 or float64, in which everything but the two agreed
            sums (float64) is computed; normalised for a loss of cosines.
        labels: of those rows.
        row_counts: rows of every worker; may be uneven, and 0 for some.
        loss: called twice for each block, so it must choose the same both times: a miner draws no
            random numbers, or keyed ones.
        group: the workers, or None for one process.
        memory: see `PairMemory`. It must not change before the backward, which raises otherwise.
        block_mebibytes: of the tensors of m x R numbers, taken to be `NUMBERS_A_PAIR`.
        ignored: label of rows that take no part.

    Raises:
        UsageError: if the budget cannot hold one anchor; on all workers alike.
        RuntimeError: in the backward, of PyTorch, if `memory` was overwritten meanwhile.
    """
    workers = 1 if group is None else group.size()
    rank = 0 if group is None else group.rank()
    assert len(row_counts) == workers
    assert row_counts[rank] == len(rows) == len(labels)
    num_compared = sum(row_counts) + (0 if memory is None else len(memory.rows))
    block = anchors_of_block(num_compared, block_mebibytes, rows.element_size())
    scaled = scale_gradient(rows, workers)
    travelling = PendingGather(scaled.detach(), row_counts, group)
    all_labels = gather_uneven(labels, row_counts, group)
    if memory is None:
        memory = PairMemory(rows.new_empty(0, rows.shape[1]), labels.new_empty(0))
    problem = _Problem(loss, row_counts, group, block, ignored)
    # A cast makes a copy; otherwise these are the memory's own rows, and their changes are noticed.
    kept = memory.rows.detach().to(rows.dtype)
    compared_labels = torch.cat((all_labels, memory.labels))
    result = _PairParallelLoss.apply(scaled, travelling.wait(), kept, compared_labels, problem)
    return cast(Tensor, result)


@dataclass(frozen=True)
class _Problem:
    """What stays the same for all blocks."""

    loss: PairLoss
    row_counts: tuple[int, ...]
    group: ProcessGroup | None
    block: int
    ignored: int

    @property
    def own(self) -> range:
        """The places of this worker's anchors among the rows of all."""
        rank = 0 if self.group is None else self.group.rank()
        first = sum(self.row_counts[:rank])
        return range(first, first + self.row_counts[rank])

    def blocks(self) -> Iterator[slice]:
        """This worker's anchors, block by block, as places among the rows of all."""
        own = self.own
        for first in range(own.start, own.stop, self.block):
            yield slice(first, min(first + self.block, own.stop))

    def of_block(
        self,
        anchors: Float[Tensor, "m D"],
        batch: Float[Tensor, "B D"],
        memory: Float[Tensor, "M D"],
        labels: Int[Tensor, " R"],
        places: slice,
    ) -> AnchorLoss:
        """Values and weights of the anchors at `places`; 0 for those that are ignored.

        The batch and the memory are compared apart, so that the memory's rows cost no product for a
        gradient that nobody takes.
        """
        values = compare(anchors, batch, self.loss.comparison)
        if len(memory):
            values = torch.cat((values, compare(anchors, memory, self.loss.comparison)), 1)
        of_anchors = labels[places]
        own = torch.arange(places.start, places.stop, device=labels.device)
        found = self.loss.of_anchors(
            labelled_pairs_of(values, of_anchors, labels, own, self.ignored)
        )
        counted = of_anchors != self.ignored
        weights = torch.where(counted, found.weights.detach(), 0)
        return AnchorLoss(torch.where(counted, found.values, 0), weights)

    def reduced(self, gradient: Float[Tensor, "B D"]) -> Float[Tensor, "r D"]:
        """This worker's rows of the sum over workers."""
        if self.group is None or self.group.size() == 1:
            return gradient
        return PendingReduction(gradient, self.row_counts, self.group).wait()


class _PairParallelLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, leaf: Tensor, rows: Tensor, memory: Tensor, labels: Tensor, problem: _Problem
    ) -> Tensor:
        own = problem.own
        # Sums over thousands of anchors, and counts of more pairs than float32 can count.
        found = rows.new_zeros(2, len(own), dtype=torch.float64)
        for places in problem.blocks():
            part = slice(places.start - own.start, places.stop - own.start)
            values, weights = problem.of_block(rows[places], rows, memory, labels, places)
            found[0, part], found[1, part] = values, weights
        # Added up by each worker in worker order: an all-reduce promises no order.
        total, weight = gather_equal(found.sum(1), problem.group).sum(0)
        divisor = weight.clamp_min(1)
        ctx.problem = problem
        # Saved, not kept: PyTorch refuses a backward after the memory has been overwritten.
        ctx.save_for_backward(rows, memory, labels, divisor)
        return (total / divisor).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        rows, memory, labels, divisor = ctx.saved_tensors
        problem: _Problem = ctx.problem
        factor = (gradients[0] / divisor).to(rows.dtype)
        gradient = torch.zeros_like(rows)
        for places in problem.blocks():
            with torch.enable_grad():
                # Two leaves: as an anchor and as what others are compared with.
                anchors = rows[places].detach().requires_grad_()
                batch = rows.detach().requires_grad_()
                values = problem.of_block(anchors, batch, memory, labels, places).values
            if not values.requires_grad:  # A constant, of a block without any pair.
                continue
            of_anchors, of_batch = torch.autograd.grad(
                values, (anchors, batch), factor.expand_as(values)
            )
            gradient += of_batch
            gradient[places] += of_anchors
        return problem.reduced(gradient), None, None, None, None
