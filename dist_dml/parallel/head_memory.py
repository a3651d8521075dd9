"""The memory of a class-parallel head on one worker, item by item, and the most classes that fit.

Dimensions: as in `parallel.cost`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from dist_dml.parallel.backend_costs import BACKENDS, Backend
from dist_dml.parallel.cost import SIZE, HeadShape, SweepPlan
from dist_dml.parallel.machine import Machine

# The rest goes to the allocator's gaps, the context of CUDA or the interpreter (section 7.3 of the
# project's reference on sharded classifiers takes the same share).
USABLE = 0.93
_ROWS = "rows, their gradient, statistics"


class MemoryItem(NamedTuple):
    """One thing that occupies memory."""

    name: str
    size: float
    """Bytes."""


def row_bytes(shape: HeadShape) -> float:
    """Gathered rows of all micro-batches, a micro-batch's gradient and copies, statistics."""
    gathered = 4.0 * shape.rows * shape.embedding_dim
    other = 4.0 * shape.sweep_rows * (2 * shape.embedding_dim + 4)
    numbers = 4 * shape.row_numbers  # Own, sent, received and merged.
    return gathered + other + 4.0 * shape.sweep_rows * numbers


def tile_bytes(
    shape: HeadShape, tile_classes: int, row_chunk: int, backend: Backend = BACKENDS["torch"]
) -> float:
    """Logits of a tile, the loss's buffers, and the tile's weight gradient with its copies."""
    columns = tile_classes * shape.centres
    rounded = shape.operand_dtype == "bfloat16"
    of_weights = columns * shape.embedding_dim * (4.0 * 2 + (2 if rounded else 0))
    copies = shape.buffers + (0.5 if rounded and backend.logit_roundings[0] else 0)
    return float(backend.logit_bytes) * row_chunk * columns * (1 + copies) + of_weights


def memory_of(
    shape: HeadShape, plan: SweepPlan, backend: Backend = BACKENDS["torch"]
) -> list[MemoryItem]:
    """What the head of the worker with most classes holds.

    There is no gradient of the size of the weights unless `shape.in_place` is false. With sampled
    classes all weights and states are there still; only logits and traffic shrink.
    """
    numbers = float(shape.own_classes) * shape.centres * shape.embedding_dim
    items = [MemoryItem("class weights", numbers * SIZE[shape.weight_dtype])]
    items += [MemoryItem(f"class {name}", numbers * size) for name, size in shape.states()]
    if not shape.in_place:
        items.append(MemoryItem("class gradient", numbers * 4))
    if shape.bias:
        states = len([name for name, _ in shape.states() if name != "compensation"])
        items.append(MemoryItem("bias and its state", 4.0 * shape.own_classes * (2 + states)))
    if shape.active_share < 1:
        items.append(MemoryItem("ids of active classes", 8.0 * shape.columns / shape.centres))
    if plan.sweep == "keep":
        items.append(MemoryItem("kept logits", 4.0 * shape.sweep_rows * shape.columns))
    items.append(MemoryItem("tile", tile_bytes(shape, plan.tile_classes, plan.row_chunk, backend)))
    items.append(MemoryItem(_ROWS, row_bytes(shape)))
    return items


def total_bytes(items: list[MemoryItem]) -> float:
    """Their sum."""
    return sum(item.size for item in items)


def largest_num_classes(
    shape: HeadShape, machine: Machine, budget_bytes: float, other_bytes: float = 0.0
) -> int:
    """The most classes C of all workers that fit; 0 if none do.

    Args:
        shape: everything but C.
        machine: of a worker; 93% of its memory is counted on.
        budget_bytes: what tiles, rows and kept logits may use (`loss.tile_mebibytes`).
        other_bytes: what a worker holds besides (the embedder).
    """
    there = machine.memory_bytes * USABLE - other_bytes - budget_bytes

    def of_weights(num_classes: int) -> float:
        many = replace(shape, num_classes=num_classes)
        step = SweepPlan("recompute", 1, 1, "")
        items = memory_of(many, step)
        return total_bytes([item for item in items if item.name not in ("tile", _ROWS)])

    low, high = 0, 1
    while of_weights(high) <= there:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if of_weights(middle) <= there else (low, middle)
    return low


def mebibytes(size: float) -> str:
    """`1.5 MiB`, `870 MiB`, `3.25 GiB`."""
    if size >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.0f} MiB" if size >= 100 * 2**20 else f"{size / 2**20:.3g} MiB"
