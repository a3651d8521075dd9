"""Which sweep, tile and chunk of rows cost least on a machine, by `parallel.cost`.

Dimensions: as in `parallel.cost`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from dist_dml.errors import UsageError
from dist_dml.parallel.cost import BACKENDS, Backend, HeadShape, SweepPlan, sweep_cost
from dist_dml.parallel.head_memory import mebibytes, row_bytes, tile_bytes
from dist_dml.parallel.machine import Machine

# Thinner tiles make products too thin to be worth running; the last resorts of a small budget.
_FEWEST_TILE_CLASSES = 256
_LAST_RESORTS = (16, 32, 64, 128)
_FEWEST_ROWS = 64
# Kept logits take memory, and where the model saw a tie they were 8 to 50% slower (2026-11, CPU).
_WORTH_KEEPING = 1.1


def choose_sweep(
    shape: HeadShape,
    machine: Machine,
    budget_bytes: float,
    backend: Backend = BACKENDS["torch"],
    sweep: Literal["auto", "keep", "recompute", "row_chunked"] = "auto",
    tile_classes: int = 0,
    row_chunk: int = 0,
) -> SweepPlan:
    """The sweep, tile and chunk of rows with the least `sweep_cost` within a budget of memory.

    Keeping the logits saves a product and costs 8 bytes a logit; it is taken where they fit the
    budget and the model says that it is faster by a tenth. Rows are cut where a tile of 256 classes
    and all rows does not fit the cache or the budget.

    Args:
        shape: the work.
        machine: of a worker; `known_machine` for a training.
        budget_bytes: most memory beyond weights and state (`loss.tile_mebibytes`).
        backend: who sweeps.
        sweep: what the configuration asks for (`classes.sweep`).
        tile_classes: what it asks for, 0 for a choice.
        row_chunk: what it asks for, 0 for a choice.

    Raises:
        UsageError: if no plan fits the budget.
    """
    free = budget_bytes - row_bytes(shape)
    plans = [
        plan
        for plan in _candidates(shape, machine, free, backend, tile_classes, row_chunk)
        if sweep in ("auto", plan.sweep)
    ]
    if not plans:
        raise UsageError(_too_small(shape, budget_bytes, sweep, tile_classes, row_chunk))
    every = [sweep_cost(shape, machine, plan, backend) for plan in plans]
    # A host that is hardly ahead of its GPU is late whenever something disturbs it.
    spare = 0.25 if machine.device == "cuda" else 0.0
    costs = [
        (cost.total_seconds + spare * cost.seconds["launches"])
        * (_WORTH_KEEPING if plan.sweep == "keep" else 1.0)
        for plan, cost in zip(plans, every, strict=True)
    ]
    # Of what is as fast to 2%, the first: smaller tiles come before larger ones.
    best = next(i for i, cost in enumerate(costs) if cost <= 1.02 * min(costs))
    chosen = plans[best]
    others: dict[str, float] = {}
    for plan, cost in zip(plans, every, strict=True):
        others[plan.sweep] = min(others.get(plan.sweep, math.inf), cost.total_seconds)
    reason = _reason(shape, machine, chosen, every[best].total_seconds, others, free, backend)
    return chosen._replace(reason=reason)


def _candidates(
    shape: HeadShape,
    machine: Machine,
    free: float,
    backend: Backend,
    tile_classes: int,
    row_chunk: int,
) -> Iterator[SweepPlan]:
    """Plans that fit, smaller tiles first."""
    classes, rows = shape.columns // shape.centres, shape.sweep_rows
    near = machine.cache_bytes * (1 if backend.of_core else machine.cores)
    small = min(_FEWEST_TILE_CLASSES, classes)
    chunk = row_chunk or rows
    while not row_chunk and backend.chunks and chunk > _FEWEST_ROWS:
        if tile_bytes(shape, small, chunk, backend) <= min(near, free):
            break
        chunk = -(-chunk // 2)
    sizes = [small << power for power in range(64) if small << power < classes] + [classes]
    if tile_bytes(shape, small, min(chunk, rows), backend) > free:
        sizes = list(_LAST_RESORTS)
    fused = backend.forward_updates == 0
    for tile in [min(tile_classes, classes)] if tile_classes else sizes:
        for part in dict.fromkeys((min(row_chunk, rows) or rows, min(chunk, rows))):
            size = tile_bytes(shape, tile, part, backend)
            # A fused kernel is fused because its tile stays in the cache.
            leaves = fused and size > near and (tile > small or part > chunk)
            if size > free or (leaves and not tile_classes):
                continue
            yield SweepPlan("recompute" if part == rows else "row_chunked", tile, part, "")
            kept = 4.0 * rows * shape.columns
            whole = backend.keeps and part == rows and shape.micro_batches == 1
            if whole and kept + size <= free:
                yield SweepPlan("keep", tile, part, "")


def _too_small(
    shape: HeadShape, budget: float, sweep: str, tile_classes: int, row_chunk: int
) -> str:
    if sweep == "keep" and shape.micro_batches > 1:
        return (
            "classes.sweep=keep with training.accumulate above 1: the weights' gradient is made "
            "at the end of the batch, when early logits are gone; use auto or recompute"
        )
    chunk = row_chunk or (min(shape.sweep_rows, _FEWEST_ROWS) if sweep != "keep" else 0)
    needed = row_bytes(shape) + tile_bytes(shape, tile_classes or 16, chunk or shape.sweep_rows)
    if sweep == "keep":
        needed += 4.0 * shape.sweep_rows * shape.columns
    return (
        f"loss.tile_mebibytes={budget / 2**20:.3g} is too small for {shape.sweep_rows} rows of "
        f"{shape.embedding_dim} features with classes.sweep={sweep}; set it to "
        f"{max(needed / 2**20, 0.1):.1f} or more, or lower data.batch_size"
    )


def _reason(
    shape: HeadShape,
    machine: Machine,
    plan: SweepPlan,
    seconds: float,
    others: dict[str, float],
    free: float,
    backend: Backend,
) -> str:
    """Why this plan, in one line."""
    kept = 4.0 * shape.sweep_rows * shape.columns
    if not backend.keeps:
        why = f"the {backend.name} kernels keep no logits"
    elif plan.sweep == "keep":
        why = f"logits of {mebibytes(kept)} fit the budget and save a product"
    elif shape.micro_batches > 1:
        why = "early micro-batches' logits are gone at the end of the batch"
    elif "keep" in others:
        why = (
            f"keeping logits of {mebibytes(kept)} is not worth its memory: {seconds * 1e3:.3g} ms "
            f"without, {others['keep'] * 1e3:.3g} ms with them"
        )
    else:
        why = f"logits of {mebibytes(kept)} exceed the {mebibytes(max(free, 0))} that are left"
    size = tile_bytes(shape, plan.tile_classes, plan.row_chunk, backend)
    near = machine.cache_bytes * (1 if backend.of_core else machine.cores)
    place = "within" if size <= near else "beyond"
    why += f"; a tile takes {mebibytes(size)}, {place} {mebibytes(near)} of cache"
    return why
