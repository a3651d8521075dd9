"""The sweeps of a class-parallel step in torch operations, for every loss.

Dimensions: R rows of all workers, N of all micro-batches, n classes of this worker that take part,
t of a tile, K centres of a class, D features, k statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_dml.losses.proxies import ColumnLoss
from dist_dml.losses.softmax import (
    RowLoss,
    TileTarget,
    softmax_form,
    statistics_of_no_class,
)
from dist_dml.parallel.class_problem import ClassParallelProblem, RowBatch
from dist_dml.parallel.class_sweeps import GradientTarget, UpdateTarget
from dist_dml.parallel.class_update import update_tile_
from dist_dml.parallel.collectives import gather_equal, merge_over_workers
from dist_dml.parallel.sweep_torch import (
    Tile,
    TileSpace,
    add_row_gradient_,
    add_weight_gradient_,
    load_tile,
    project_,
    tile_bounds,
    tile_logits,
)

# Tiles whose statistics are merged in one go: a merge is many operations on few numbers, and took a
# tenth of a step with L1's power sums when it was made for every tile.
_MERGED_AT_ONCE = 4
# Classes whose term on centres is made at a time.
_SPREAD_CLASSES = 64


def chunks_of(num_rows: int, chunk: int) -> Iterator[slice]:
    """Slices of rows; one empty slice for no rows."""
    for start in range(0, max(1, num_rows), max(1, chunk)):
        yield slice(start, min(start + chunk, num_rows))


def target_of(
    labels: Int[Tensor, " R"], problem: ClassParallelProblem, start: int, stop: int
) -> TileTarget:
    """Where the labels lie in a tile of the classes that take part."""
    first, active = problem.partition.start, problem.shard.active
    if active is None:
        return TileTarget.of(labels, first + start, first + stop, first)
    ids = active[start:stop]
    place = torch.searchsorted(ids, labels - first).clamp_max(len(ids) - 1)
    present = ids[place] == labels - first
    return TileTarget(torch.where(present, place, 0), present, -1, ids, labels < 0)


def tiles_of(
    rows: Tensor, labels: Tensor, problem: ClassParallelProblem
) -> Iterator[tuple[int, int, Tensor, TileTarget]]:
    """Bounds in this worker's classes, logits of all rows and targets of each tile.

    All logits share one buffer: those of a tile are gone when the next one is asked for.
    """
    tile = problem.tile_for(rows.shape[0], rows.shape[1], rows.element_size())
    space = TileSpace(rows, problem.shard, tile, len(rows), with_gradient=False)
    everything = slice(0, len(rows))
    for start, stop in tile_bounds(problem.shard.num_classes, tile):
        loaded = load_tile(space, start, stop)
        logits = tile_logits(space, loaded, rows, everything, space.logits)
        yield start, stop, logits, target_of(labels, problem, start, stop)


def row_statistics(
    rows: Float[Tensor, "R D"], labels: Int[Tensor, " R"], problem: ClassParallelProblem
) -> tuple[Float[Tensor, "k R"], Tensor | None]:
    """A row loss's statistics over all classes, the same on every worker; no gradient. And the
    logits, if they are kept: (n * K * R,), tile after tile.

    The workers' statistics are merged in worker order by the loss's own rule
    (`collectives.merge_over_workers`).
    """
    loss, group = problem.loss, problem.partition.group
    assert isinstance(loss, RowLoss)
    own, kept = _own_statistics(rows, labels, problem, loss)
    whole = merge_over_workers(own, loss.merge, group)
    if not loss.refined:
        return whole, kept
    refined = _refinement(rows, labels, whole, problem, loss)
    refined = merge_over_workers(refined, lambda parts: parts.sum(0), group)
    return torch.cat((whole, refined)), kept


def _own_statistics(
    rows: Tensor, labels: Tensor, problem: ClassParallelProblem, loss: RowLoss
) -> tuple[Tensor, Tensor | None]:
    """Of this worker's classes. A function of its own, so that its buffers end with it."""
    chunk, number = problem.chunk_rows(len(rows)), problem.shard.num_classes
    if number == 0:  # Only of sampled classes there may be none.
        form = softmax_form(loss)
        assert form is not None
        return statistics_of_no_class(form, labels, rows.dtype), None
    tile = problem.tile_for(rows.shape[0], rows.shape[1], rows.element_size())
    space = TileSpace(rows, problem.shard, tile, chunk, with_gradient=False)
    kept = None
    if problem.sweep == "keep":
        kept = rows.new_empty(len(rows) * number * problem.shard.centres)
    parts: list[list[Tensor]] = [[] for _ in chunks_of(len(rows), chunk)]
    for start, stop in tile_bounds(number, tile):
        loaded = load_tile(space, start, stop)
        for of_chunk, own in zip(parts, chunks_of(len(rows), chunk), strict=True):
            logits = tile_logits(space, loaded, rows, own, space.logits)
            if kept is not None:
                _kept_tile(kept, rows, loaded, own).copy_(logits)
            target = target_of(labels[own], problem, start, stop)
            of_chunk.append(loss.tile_statistics(logits, target))
            if len(of_chunk) == _MERGED_AT_ONCE:
                of_chunk[:] = [loss.merge(torch.stack(of_chunk))]
    whole = [one[0] if len(one) == 1 else loss.merge(torch.stack(one)) for one in parts]
    return whole[0] if len(whole) == 1 else torch.cat(whole, dim=1), kept


def _kept_tile(kept: Tensor, rows: Tensor, tile: Tile, chunk: slice) -> Tensor:
    """The place of a tile's logits, of a chunk of rows, among those that are kept."""
    columns = len(tile.weight)
    centres = columns // (tile.stop - tile.start)
    first = tile.start * centres * len(rows) + chunk.start * columns
    size = (chunk.stop - chunk.start) * columns
    return kept[first : first + size].view(-1, columns)


def _refinement(
    rows: Tensor, labels: Tensor, whole: Tensor, problem: ClassParallelProblem, loss: RowLoss
) -> Tensor:
    """This worker's part of the numbers that need the merged ones."""
    tile = problem.tile_for(rows.shape[0], rows.shape[1], rows.element_size())
    chunk = problem.chunk_rows(len(rows))
    space = TileSpace(rows, problem.shard, tile, chunk, with_gradient=False)
    sums: list[Tensor | None] = [None for _ in chunks_of(len(rows), chunk)]
    for start, stop in tile_bounds(problem.shard.num_classes, tile):
        loaded = load_tile(space, start, stop)
        for index, own in enumerate(chunks_of(len(rows), chunk)):
            logits = tile_logits(space, loaded, rows, own, space.logits)
            target = target_of(labels[own], problem, start, stop)
            part = loss.tile_refinement(logits, target, whole[:, own])
            before = sums[index]
            sums[index] = part if before is None else before + part
    return torch.cat([part for part in sums if part is not None], dim=1)


def column_sums(
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


def backward_sweep(batch: RowBatch, problem: ClassParallelProblem) -> Float[Tensor, "R D"]:
    """This worker's part of the gradient of the batch's rows. Fills `problem.target` with the
    gradient of this and all earlier batches of the step; without a target, the batch joins those.
    """
    earlier, shard = problem.memory.batches, problem.shard
    row_gradient = torch.zeros_like(batch.rows)
    waits = problem.target is None
    batches = [batch] if waits else [*earlier, batch]
    most = max(len(one.rows) for one in batches)
    tile = problem.tile_for(most, batch.rows.shape[1], batch.rows.element_size())
    chunk = problem.chunk_rows(most)
    space = TileSpace(batch.rows, shard, tile, chunk, with_gradient=not waits)
    finite = torch.stack([one.finite for one in batches]).all()
    spreads = [one.of_spread for one in batches if one.of_spread is not None]
    of_spread = torch.stack(spreads).sum() if spreads else None
    bias_gradient = None
    if shard.bias is not None and not waits:
        bias_gradient = batch.rows.new_zeros(shard.num_classes)
    filtered = 0
    mass = batch.rows.new_zeros(())
    for start, stop in tile_bounds(shard.num_classes, tile):
        loaded, is_first = load_tile(space, start, stop), True
        for one in batches:
            if space.rounded and len(batches) > 1:
                space.rows16 = one.rows.to(space.rows16.dtype)
            for own in chunks_of(len(one.rows), chunk):
                if one.kept is None:
                    logits = tile_logits(space, loaded, one.rows, own, space.logits)
                else:
                    logits = _kept_tile(one.kept, one.rows, loaded, own)
                target = target_of(one.labels[own], problem, start, stop)
                left_out = _filtered_(logits, target, one, own, problem)
                if left_out is not None:
                    mass += left_out
                    continue
                _logit_gradient_(logits, target, one, own, problem)
                if bias_gradient is not None:
                    bias_gradient[start:stop] += logits.sum(0)
                if loaded.factors is not None:
                    logits.mul_(loaded.factors)
                if one is batch:
                    add_row_gradient_(space, loaded, logits, row_gradient[own])
                if not waits:
                    add_weight_gradient_(space, logits, one.rows, own, is_first)
                is_first = False
        if is_first and not waits:  # Nothing was added: only momentum and decay move these.
            filtered += stop - start
        if not waits:
            assert space.gradient is not None
            if is_first:
                space.gradient.zero_()
            gradient = space.gradient[: len(loaded.weight)]
            _use_gradient_(gradient, loaded, problem, finite, of_spread)
    if waits:
        earlier.append(batch)
    else:
        earlier.clear()
        memory = problem.memory
        memory.bias_gradient, memory.finite = bias_gradient, finite
        memory.filtered_classes, memory.filtered_mass = filtered, mass
    return row_gradient


def _logit_gradient_(
    logits_: Tensor,
    target: TileTarget,
    batch: RowBatch,
    chunk: slice,
    problem: ClassParallelProblem,
) -> None:
    if isinstance(problem.loss, ColumnLoss):
        problem.loss.gradient_(logits_, target, batch.agreed, batch.upstream)
    else:
        problem.loss.gradient_(logits_, target, batch.agreed[:, chunk], batch.upstream[chunk])


def _filtered_(
    logits_: Tensor,
    target: TileTarget,
    batch: RowBatch,
    chunk: slice,
    problem: ClassParallelProblem,
) -> Tensor | None:
    """The probability, weighted as the loss is, that a chunk of a tile is left out with; None where
    it is not left out. On a CPU, where looking at a number costs nothing."""
    form = softmax_form(problem.loss)
    if batch.normaliser is None or form is None or form.needs_gap or bool(target.present.any()):
        return None
    normaliser = batch.normaliser[chunk]
    if form.logit_shift is not None:
        return None
    if float((logits_.amax(1) - normaliser).max()) >= math.log(problem.filter_below):
        return None
    shares = logits_.sub_(normaliser[:, None]).exp_().sum(1)
    return (shares * batch.upstream[chunk].abs()).sum()


def _use_gradient_(
    gradient: Tensor,
    tile: Tile,
    problem: ClassParallelProblem,
    finite: Tensor,
    of_spread: Tensor | None,
) -> None:
    """A tile's complete gradient: written down, added, or used for its update at once."""
    shard, target = problem.shard, problem.target
    if shard.scale is not None:
        project_(gradient, tile)
    if problem.spread is not None and of_spread is not None:
        centres = tile.weight.view(-1, shard.centres, tile.weight.shape[1])
        for part in chunks_of(len(centres), _SPREAD_CLASSES):
            term = problem.spread.gradient(centres[part]).flatten(0, 1).mul_(of_spread)
            own = slice(part.start * shard.centres, part.stop * shard.centres)
            gradient[own].add_(term)
    rows = shard.rows(tile.start, tile.stop)
    if isinstance(target, GradientTarget):
        if target.accumulate:
            target.gradient[rows] += gradient
        else:
            target.gradient[rows] = gradient.to(target.gradient.dtype)
        return
    assert isinstance(target, UpdateTarget)
    update = UpdateTarget(target.step, target.state, target.apply & finite)
    update_tile_(update, shard.weight, rows, gradient)


def spread_value(rows: Float[Tensor, "R D"], problem: ClassParallelProblem) -> Float[Tensor, ""]:
    """The term on centres of all workers' classes."""
    if problem.spread is None:
        return rows.new_zeros(())
    shard = problem.shard
    count, width = shard.centres, shard.weight.shape[1]
    per_class = (5 * count * width + 3 * count * count) * rows.element_size()
    of_rows = problem.demand(*rows.shape).of_rows() * rows.element_size()
    tile = max(1, (problem.tile_bytes - of_rows) // per_class)
    parts = [
        problem.spread.value(
            shard.weight[shard.rows(*bounds)].to(rows.dtype).view(-1, count, width)
        )
        for bounds in tile_bounds(shard.num_classes, tile)
    ]
    return gather_equal(torch.stack(parts).sum(), problem.partition.group).sum()
