"""What an evaluation asks of a classifier that is split by class: probabilities and distances.

Every worker passes the same rows and gets the same answers. No gradients.

Dimensions: n rows, C classes of all workers, c of this one, D features, T largest probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dist_dml.losses.composed import ComposedLoss
from dist_dml.losses.cross_entropy import CrossEntropy
from dist_dml.losses.largest import largest_entries
from dist_dml.losses.metric_softmax import MetricSoftmax
from dist_dml.losses.softmax import RowLoss
from dist_dml.metric_parameters import MetricParameters
from dist_dml.parallel.class_problem import ClassParallelProblem
from dist_dml.parallel.collectives import gather_equal, gather_uneven
from dist_dml.parallel.torch_sweeps import row_statistics, tiles_of

# Rows that a sweep takes at a time.
_ROWS = 1024


def plain_loss(problem: ClassParallelProblem, base: RowLoss) -> RowLoss:
    """`base` over the class logits of a problem: its centres pooled, without margin or prior.

    Margins and priors are devices of training; probabilities are those of the bare logits.
    """
    loss = problem.loss
    if isinstance(loss, ComposedLoss) and loss.pooling is not None:
        return ComposedLoss(base, pooling=loss.pooling)
    return base


def _row_blocks(
    rows: Tensor, problem: ClassParallelProblem
) -> Iterator[tuple[slice, ClassParallelProblem]]:
    """Blocks of rows, and the problem with a budget that is sure to hold a tile for them."""
    demand = problem.demand(_ROWS, rows.shape[1])
    least = (demand.of_rows() + 64 * demand.of_class()) * rows.element_size()
    problem = replace(problem, tile_bytes=max(problem.tile_bytes, int(least)))
    for start in range(0, len(rows), _ROWS):
        yield slice(start, start + _ROWS), problem


@torch.no_grad()
def label_distances(
    rows: Float[Tensor, "n D"],
    labels: Int[Tensor, " n"],
    problem: ClassParallelProblem,
    parameters: MetricParameters,
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """`L_m(softmax(logits), one-hot label)` of each row, and whether the label's logit is largest.

    Equal to `MetricLoss(parameters).to_label(log_probabilities(...), labels)`, without a row of
    logits: any number of classes. Costs 4*n*c*K*D operations (two sweeps).
    """
    problem = replace(problem, loss=plain_loss(problem, MetricSoftmax(parameters)))
    values, correct = [rows.new_empty(0)], [labels.new_empty(0, dtype=torch.bool)]
    for block, sized in _row_blocks(rows, problem):
        statistics, _ = row_statistics(rows[block], labels[block], sized)
        assert isinstance(sized.loss, RowLoss)
        label, rival = sized.loss.label_and_rival(statistics)
        values.append(sized.loss.values(statistics))
        correct.append(label > rival)
    return torch.cat(values), torch.cat(correct)


@torch.no_grad()
def label_parts(
    rows: Float[Tensor, "n D"], labels: Int[Tensor, " n"], problem: ClassParallelProblem
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Means of -z_y and log sum_k exp(z_k): the parts of cross-entropy (paper B, Table 2).

    Costs 2*n*c*K*D operations, one sweep.
    """
    counter = plain_loss(problem, CrossEntropy(problem.partition.num_classes))
    problem = replace(problem, loss=counter)
    tightness, contrastive = rows.new_zeros(()), rows.new_zeros(())
    for block, sized in _row_blocks(rows, problem):
        statistics, _ = row_statistics(rows[block], labels[block], sized)
        assert isinstance(sized.loss, RowLoss)
        label = sized.loss.label_and_rival(statistics)[0]
        tightness -= label.sum()
        contrastive += (sized.loss.values(statistics) + label).sum()
    count = max(len(rows), 1)
    return tightness / count, contrastive / count


@torch.no_grad()
def log_probabilities(
    rows: Float[Tensor, "n D"], problem: ClassParallelProblem
) -> Float[Tensor, "n C"]:
    """Log-softmax over all classes, in the rows' dtype but exact to its last digit.

    Holds n * C numbers on every worker: for few classes only.
    """
    group, sizes = problem.partition.group, class_sizes(problem)
    parts = []
    for block, sized in _row_blocks(rows, problem):
        tiles = [logits.clone() for _, logits in _class_logits(rows[block], sized)]
        own = torch.cat(tiles, dim=1)
        whole = gather_uneven(own.T.contiguous(), sizes, group).T
        parts.append(_log_softmax(whole))
    return torch.cat(parts) if parts else rows.new_empty(0, problem.partition.num_classes)


@torch.no_grad()
def top_log_probabilities(
    rows: Float[Tensor, "n D"], problem: ClassParallelProblem, top: int
) -> tuple[Float[Tensor, "n T"], Int[Tensor, "n T"]]:
    """The `top` largest log-probabilities of each row, descending, and their class ids.

    Equal to `log_probabilities(rows, problem).topk(top)`, without a row of logits.
    """
    group, start = problem.partition.group, problem.partition.start
    counter = CrossEntropy(problem.partition.num_classes)
    normalising = replace(problem, loss=plain_loss(problem, counter))
    values, ids = [rows.new_empty(0, top)], [torch.empty(0, top, dtype=torch.int64).to(rows.device)]
    for block, sized in _row_blocks(rows, normalising):
        best = rows.new_full((len(rows[block]), top), float("-inf"))
        best_ids = torch.zeros_like(best, dtype=torch.int64)
        for first, logits in _class_logits(rows[block], sized):
            found, columns = largest_entries(logits, top)
            found_ids = columns + start + first
            best, best_ids = _largest(
                torch.cat((best, found), 1), torch.cat((best_ids, found_ids), 1), top
            )
        every = gather_equal(best, group).transpose(0, 1).flatten(1)
        every_id = gather_equal(best_ids, group).transpose(0, 1).flatten(1)
        best, best_ids = _largest(every, every_id, top)
        # The cross-entropy of the top class is -log of its probability, to the last digit: it is
        # made of the others' sum. A normaliser minus a logit would round it to 6e-8.
        assert isinstance(sized.loss, RowLoss)
        of_top = sized.loss.values(row_statistics(rows[block], best_ids[:, 0], sized)[0])
        values.append(best - best[:, :1] - of_top[:, None])
        ids.append(best_ids)
    return torch.cat(values), torch.cat(ids)


def _log_softmax(logits: Float[Tensor, "n C"]) -> Float[Tensor, "n C"]:
    """Log-softmax whose largest entry is exact where it is -1e-30: from the others' sum.

    In float32, `logits.log_softmax(1)` rounds it to multiples of 6e-8. A metric with a small p
    counts a difference of 1e-9 as most of a whole one.
    """
    exact = logits.double()
    peak, place = exact.max(1, keepdim=True)
    exact = exact - peak
    others = exact.exp().scatter_(1, place, 0.0).sum(1, keepdim=True)
    return (exact - others.log1p()).to(logits.dtype)


def _largest(values: Tensor, ids: Tensor, top: int) -> tuple[Tensor, Tensor]:
    kept, places = values.topk(top, dim=1)
    return kept, ids.gather(1, places)


def _class_logits(
    rows: Tensor, problem: ClassParallelProblem
) -> Iterator[tuple[int, Float[Tensor, "n t"]]]:
    """First local class and class logits of each tile, centres pooled; gone with the next tile."""
    loss = problem.loss
    pooling = loss.pooling if isinstance(loss, ComposedLoss) else None
    labels = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for start, _, logits, _ in tiles_of(rows, labels, problem):
        if pooling is not None:
            yield start, pooling.pool_(logits.unflatten(1, (-1, pooling.centres)))
        else:
            yield start, logits


def class_sizes(problem: ClassParallelProblem) -> tuple[int, ...]:
    """Classes of every worker."""
    partition = problem.partition
    own = torch.tensor(partition.size, device=problem.shard.weight.device)
    return tuple(gather_equal(own, partition.group).tolist())
