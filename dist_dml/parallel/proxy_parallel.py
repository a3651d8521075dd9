"""Losses of rows against proxies that are sharded by class, each pair once in the group.

Every worker gathers the rows of all and compares them with its *own* proxies, tile by tile. Rows
are the anchors. What a row needs of other workers is small: its values against the K proxies of its
own class, from the worker that has them, and the few merged parts of `losses.proxy_rules`. No
worker ever holds another's proxies, and the proxies' gradient is complete where they live.

Dimensions: r rows of this worker, B of all workers in worker order, c classes of this worker, K
proxies of a class, t classes of a tile, n rows of a block, P parts of a row, D features, W workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dist_dml.losses.pairs import Comparison, compare
from dist_dml.losses.proxy_rules import OwnProxies
from dist_dml.parallel.collectives import (
    PendingReduction,
    gather_equal,
    merge_over_workers,
    scale_gradient,
)
from dist_dml.parallel.proxy_problem import ProxyProblem


def proxy_parallel_loss(
    rows: Float[Tensor, "r D"],
    all_rows: Float[Tensor, "B D"],
    labels: Int[Tensor, " B"],
    proxies: Float[Tensor, "c K D"],
    present: Bool[Tensor, " c"],
    problem: ProxyProblem,
) -> Float[Tensor, ""]:
    """The loss of all workers' rows against all workers' proxies: the same bits on every worker.

    Equal to the sum over rules of `sum(values) / max(sum(weights), 1)` of one process that has all
    rows and proxies (`chance_constraints.against_proxies`). The gradient of `rows` is that of the
    whole loss *times the number of workers*, because the engines average over workers afterwards;
    that of `proxies` is complete and as it is.

    Costs 6*B*c*K*D operations forward and 2 more in the backward, which computes tiles again. Moves
    B*K numbers, P*B numbers and, in the backward, one reduce-scatter of rows. Holds
    `block_mebibytes`, the rows' gradient and one of the proxies.

    Args:
        rows: this worker's rows, transformed; carries the gradient.
        all_rows: the same rows of all workers, without gradient.
        labels: of those, global class ids.
        proxies: of this worker's classes, as they are trained: not transformed.
        present: classes that have proxies; the others' take no part.
        problem: see there.

    Raises:
        UsageError: if the budget cannot hold one row against one class.
    """
    scaled = scale_gradient(rows, len(problem.row_counts))
    result = _ProxyParallelLoss.apply(scaled, all_rows, labels, proxies, present, problem)
    return cast(Tensor, result)


class _ProxyParallelLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        leaf: Tensor,
        rows: Tensor,
        labels: Tensor,
        proxies: Tensor,
        present: Tensor,
        problem: ProxyProblem,
    ) -> Tensor:
        own = _own_of_all(rows, labels, proxies, present, problem)
        parts = _parts_of_all(rows, labels, proxies, present, problem, own)
        counted = problem.counted(labels)
        total = torch.zeros((), dtype=torch.float64, device=rows.device)
        divisors = []
        for rule, of_rule in zip(problem.rules, parts, strict=True):
            found = rule.of_rows(own, counted, of_rule)
            divisors.append(found.weights.sum().clamp_min(1))
            total = total + found.values.sum() / divisors[-1]
        ctx.problem = problem
        ctx.save_for_backward(rows, labels, proxies, present, *own, *parts, *divisors)
        return total.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        problem: ProxyProblem = ctx.problem
        rows, labels, proxies, present, own_values, there, *rest = ctx.saved_tensors
        own, count = OwnProxies(own_values, there), len(problem.rules)
        parts, divisors = rest[:count], rest[count:]
        factors = [(gradients[0] / divisor).to(rows.dtype) for divisor in divisors]
        of_rows, of_proxies = torch.zeros_like(rows), torch.zeros_like(proxies)
        slopes = _sum(
            factor * rule.own_slopes(own, of_rule)
            for rule, of_rule, factor in zip(problem.rules, parts, factors, strict=True)
        )
        _add_own_(of_rows, of_proxies, slopes, rows, labels, proxies, problem)
        size = problem.block_sizes(rows, proxies)
        for classes in _slices(len(proxies), size[1]):
            with torch.enable_grad():
                trained = proxies[classes].detach().requires_grad_()
                moved = problem.transform(trained).flatten(0, 1)
            of_moved = torch.zeros_like(moved)
            for block in _slices(len(rows), size[0]):
                with torch.enable_grad():
                    anchors = rows[block].detach().requires_grad_()
                    tile = moved.detach().requires_grad_()
                    values = compare(anchors, tile, problem.comparison)
                other = _other(labels[block], classes, present, proxies.shape[1], problem)
                near = OwnProxies(own.values[block], own.there[block])
                with torch.no_grad():
                    slopes = _sum(
                        factor * rule.other_slopes(values.detach(), other, near, of[:, block])
                        for rule, of, factor in zip(problem.rules, parts, factors, strict=True)
                    )
                of_anchors, of_tile = torch.autograd.grad(values, (anchors, tile), slopes)
                of_rows[block] += of_anchors
                of_moved += of_tile
            (gradient,) = torch.autograd.grad(moved, trained, of_moved)
            of_proxies[classes] += gradient
        group = problem.partition.group
        if group is not None and group.size() > 1:
            of_rows = PendingReduction(of_rows, problem.row_counts, group).wait()
        return of_rows, None, None, of_proxies, None, None


def _sum(terms: Iterator[Tensor]) -> Tensor:
    """The sum of one or more tensors."""
    total = next(terms)
    for term in terms:
        total = total + term
    return total


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _other(
    labels: Int[Tensor, " n"],
    classes: slice,
    present: Bool[Tensor, " c"],
    per_class: int,
    problem: ProxyProblem,
) -> Bool[Tensor, "n tK"]:
    """Which proxies of a tile are of another class than each row, if both take part."""
    first = problem.partition.start + classes.start
    ids = torch.arange(first, first + classes.stop - classes.start, device=labels.device)
    differs = (labels[:, None] != ids) & problem.counted(labels)[:, None] & present[classes]
    return differs.repeat_interleave(per_class, dim=1)


def _own_values(
    rows: Float[Tensor, "n D"], proxies: Float[Tensor, "n K D"], comparison: Comparison
) -> Float[Tensor, "n K"]:
    """`pairs.compare` of each row with its own proxies only."""
    if comparison in ("cosine", "inner"):
        return (proxies @ rows[:, :, None]).squeeze(2)
    squares = (rows[:, None] - proxies).square().sum(2)
    if comparison == "squared_l2":
        return squares
    return torch.where(squares > 0, squares, torch.ones_like(squares)).sqrt() * (squares > 0)


def _own_blocks(
    labels: Int[Tensor, " B"], proxies: Float[Tensor, "c K D"], problem: ProxyProblem
) -> Iterator[tuple[slice, Int[Tensor, " n"], Bool[Tensor, " n"]]]:
    """Blocks of rows, the place of each row's class among this worker's, and whether it is there.

    All rows, not those of this worker's classes alone, which only the device can count.
    """
    partition = problem.partition
    of_row = 8 * proxies.shape[1] * proxies.shape[2] * proxies.element_size()
    step = max(1, int(problem.block_mebibytes * 2**20) // of_row)
    for block in _slices(len(labels), step):
        places = labels[block] - partition.start
        ours = (places >= 0) & (places < partition.size) & problem.counted(labels[block])
        yield block, places.clamp(0, partition.size - 1), ours


def _own_of_all(
    rows: Float[Tensor, "B D"],
    labels: Int[Tensor, " B"],
    proxies: Float[Tensor, "c K D"],
    present: Bool[Tensor, " c"],
    problem: ProxyProblem,
) -> OwnProxies:
    """Every row against its class's proxies, on every worker."""
    found = rows.new_zeros(len(rows), proxies.shape[1] + 1)
    for block, places, ours in _own_blocks(labels, proxies, problem):
        there = ours & present[places]
        moved = problem.transform(proxies[places])
        values = _own_values(rows[block], moved, problem.comparison)
        found[block, :-1] = torch.where(there[:, None], values, 0)
        found[block, -1] = there.to(rows.dtype)
    # One worker has a row's class, the others add zeros: exact in any order.
    found = gather_equal(found, problem.partition.group).sum(0)
    return OwnProxies(found[:, :-1].contiguous(), found[:, -1] > 0)


def _add_own_(
    of_rows: Float[Tensor, "B D"],
    of_proxies: Float[Tensor, "c K D"],
    slopes: Float[Tensor, "B K"],
    rows: Float[Tensor, "B D"],
    labels: Int[Tensor, " B"],
    proxies: Float[Tensor, "c K D"],
    problem: ProxyProblem,
) -> None:
    """Add the gradients that come from the rows' own proxies, where this worker has these."""
    for block, places, ours in _own_blocks(labels, proxies, problem):
        with torch.enable_grad():
            anchors = rows[block].detach().requires_grad_()
            trained = proxies[places].detach().requires_grad_()
            values = _own_values(anchors, problem.transform(trained), problem.comparison)
        of_values = torch.where(ours[:, None], slopes[block], 0)
        of_anchors, of_trained = torch.autograd.grad(values, (anchors, trained), of_values)
        of_rows[block] += of_anchors
        # Not `index_add_`, whose order is left open on CUDA.
        of_proxies.index_put_((places,), of_trained, accumulate=True)


def _parts_of_all(
    rows: Float[Tensor, "B D"],
    labels: Int[Tensor, " B"],
    proxies: Float[Tensor, "c K D"],
    present: Bool[Tensor, " c"],
    problem: ProxyProblem,
    own: OwnProxies,
) -> list[Float[Tensor, "_ B"]]:
    """The merged parts of every rule, over tiles and workers."""
    size = problem.block_sizes(rows, proxies)
    parts: list[Tensor | None] = [None] * len(problem.rules)
    for classes in _slices(len(proxies), size[1]):
        moved = problem.transform(proxies[classes]).flatten(0, 1)
        blocks: list[list[Tensor]] = [[] for _ in problem.rules]
        for block in _slices(len(rows), size[0]):
            values = compare(rows[block], moved, problem.comparison)
            other = _other(labels[block], classes, present, proxies.shape[1], problem)
            near = OwnProxies(own.values[block], own.there[block])
            for found, rule in zip(blocks, problem.rules, strict=True):
                found.append(rule.of_others(values, other, near))
        for at, rule in enumerate(problem.rules):
            tile, before = torch.cat(blocks[at], 1), parts[at]
            parts[at] = tile if before is None else rule.merged(torch.stack([before, tile]))
    return [
        merge_over_workers(cast(Tensor, of_rule), rule.merged, problem.partition.group)
        for of_rule, rule in zip(parts, problem.rules, strict=True)
    ]
