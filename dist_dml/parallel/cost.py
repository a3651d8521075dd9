"""What a class-parallel step costs one worker. `parallel.sweep_choice` chooses by it.

A sweep over n logits columns takes 2 R n D operations a product. Forward: logits. Backward: logits
again, dL/dz, dL/dW. Hence 8 R n D a step, 6 where the logits are kept, and 2 more for losses that
need a second sweep for their value (`loss.sums=sweep`). Backends that pull make dL/dz beside the
logits of the forward sweep: the sum is the same, but with micro-batches it stays 8, where the
others compute the logits once more for each early micro-batch's dL/dz.

How times combine, `sweep_cost`: products, exponentials and passes over tiles add up, as they keep
the same units busy (`hidden` of the smaller ones run beside the largest). Traffic of weights and
state runs beside them: of the smaller of the two, `overlap` is hidden. Links add. Launches add on a
CPU; on a GPU the host runs ahead, and they only bind where they take longer than everything else.

Dimensions: R rows of the batch, m micro-batches, C classes, c of one worker, n of them that take
part, K centres, D features, t classes of a tile, W workers, k statistics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dist_dml.parallel.backend_costs import BACKENDS, Backend
from dist_dml.parallel.machine import DtypeName, Machine

SweepName = Literal["keep", "recompute", "row_chunked"]
# Larger pieces of memory are new ones every time: the C library keeps no more than this.
_HEAP_BYTES = 32 * 2**20
# Bytes of a number.
SIZE: dict[str, int] = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class HeadShape:
    """The work of one step, over all workers.

    Attributes:
        num_classes: C.
        embedding_dim: D.
        rows: R of the whole batch, over workers and micro-batches.
        workers: W.
        micro_batches: m.
        centres: K.
        operand_dtype: operands of the matrix products.
        weight_dtype: of the class weights.
        state_dtype: of momentum or Adam's first moment.
        optimizer: kind.
        momentum: whether `sgd` has any.
        kahan: whether bfloat16 weights keep what rounding took.
        bias: whether classes have one.
        in_place: whether tiles are updated at once; otherwise a float32 gradient of all weights
            exists.
        active_share: share of the classes that take part.
        row_numbers: k, float32 numbers a row that workers agree on.
        buffers: buffers of a tile's size that the loss uses beside the logits.
        refined: whether the loss's value needs a second sweep.
    """

    num_classes: int
    embedding_dim: int
    rows: int
    workers: int = 1
    micro_batches: int = 1
    centres: int = 1
    operand_dtype: DtypeName = "float32"
    weight_dtype: DtypeName = "float32"
    state_dtype: DtypeName = "float32"
    optimizer: Literal["sgd", "adam", "adamw", "adagrad"] = "sgd"
    momentum: bool = True
    kahan: bool = False
    bias: bool = False
    in_place: bool = True
    active_share: float = 1.0
    row_numbers: int = 3
    buffers: float = 0.0
    refined: bool = False

    @property
    def own_classes(self) -> int:
        """c of the worker that has most."""
        return -(-self.num_classes // self.workers)

    @property
    def columns(self) -> int:
        """Columns of this worker's logits: n K."""
        return math.ceil(self.own_classes * self.active_share) * self.centres

    @property
    def sweep_rows(self) -> int:
        """Rows of a micro-batch, over all workers."""
        return -(-self.rows // self.micro_batches)

    def states(self) -> list[tuple[str, float]]:
        """(name, bytes a class weight) of what lies beside the weights."""
        first = SIZE[self.state_dtype]
        found: dict[str, list[tuple[str, float]]] = {
            "sgd": [("momentum", first)] if self.momentum else [],
            "adam": [("exp_avg", first), ("exp_avg_sq", 4)],
            "adamw": [("exp_avg", first), ("exp_avg_sq", 4)],
            "adagrad": [("sum", 4 / self.embedding_dim)],
        }
        return found[self.optimizer] + ([("compensation", 2)] if self.kahan else [])


class SweepPlan(NamedTuple):
    """How to sweep."""

    sweep: SweepName
    tile_classes: int
    row_chunk: int
    """Rows of a chunk; all of a micro-batch unless `row_chunked`."""
    reason: str


@dataclass(frozen=True)
class SweepCost:
    """One step of one worker.

    Attributes:
        flops: of matrix products.
        exponentials: number.
        pass_bytes: read and written in passes over tiles of logits, and rows read again.
        traffic_bytes: of weights, state and kept logits.
        link_bytes: received by a worker, and as many sent.
        seconds: by part: `products`, `exponentials`, `passes`, `traffic`, `links`, `launches`.
        total_seconds: of the step, by the rule of the module.
        binds: the part that takes longest; on a GPU `launches` only where all else waits for them.
    """

    flops: float
    exponentials: float
    pass_bytes: float
    traffic_bytes: float
    link_bytes: float
    seconds: dict[str, float]
    total_seconds: float
    binds: str


class _Work(NamedTuple):
    """Multiples of what one micro-batch takes: of a product, of tiles gone through, of a look at
    all weights."""

    products: int
    forward: int
    backward: int
    exponentials: int
    weight_reads: int


def _work(shape: HeadShape, plan: SweepPlan, backend: Backend) -> _Work:
    """What the sweeps of a step add up to.

    Every micro-batch has a forward sweep; one backward sweep at the boundary goes over the rows of
    all. Backends that do not pull also have a backward sweep for each earlier micro-batch's dL/dz.
    """
    micro, early = shape.micro_batches, shape.micro_batches - 1
    refined = micro if shape.refined else 0
    keeps = plan.sweep == "keep" and micro == 1
    # Logits forward; logits again (unless kept) and dL/dW at the boundary.
    products = micro + refined + (1 if keeps else 2) * micro
    if backend.pulls:
        early = 0
        products += micro
    else:
        products += 1 + 2 * early  # dL/dz: of the last one at the boundary, with logits before it.
    forward, backward = micro + refined, micro + early
    # A refinement takes two transcendental functions a logit.
    return _Work(products, forward, backward, forward + refined + backward, forward + early)


def sweep_cost(
    shape: HeadShape, machine: Machine, plan: SweepPlan, backend: Backend = BACKENDS["torch"]
) -> SweepCost:
    """What a step costs one worker; see the module's text for the rule."""
    work = _work(shape, plan, backend)
    logits = float(shape.sweep_rows) * shape.columns  # Of one micro-batch.
    tile = min(plan.tile_classes * shape.centres, shape.columns)
    tiles, chunks = -(-shape.columns // tile), -(-shape.sweep_rows // plan.row_chunk)
    sweeps = work.forward + work.backward
    flops = work.products * 2.0 * logits * shape.embedding_dim
    pass_bytes, of_passes = _passes(shape, machine, plan, backend, work)
    if plan.sweep == "keep":
        kept, level = 4.0 * logits, machine.level_of(4.0 * logits)  # Written once, read once.
        pass_bytes += 2 * kept
        of_passes += kept / (machine.fresh if kept > _HEAP_BYTES else level.update)
        of_passes += kept / level.read
    # Rows and their gradient are wanted by every tile.
    of_rows = 8.0 * shape.sweep_rows * shape.embedding_dim
    if of_rows > machine.levels[max(len(machine.levels) - 2, 0)].capacity:
        pass_bytes += of_rows * tiles * sweeps
        of_passes += of_rows * tiles * sweeps / machine.memory.read
    read, update = _traffic(shape, work)
    threads = machine.cores if backend.of_core else 1
    received, messages = sum(link_bytes(shape)), link_messages(shape)
    link = machine.link(shape.workers)
    of_forward, of_backward = backend.operations
    launches = work.forward * of_forward + work.backward * of_backward
    launches *= tiles * chunks / threads
    seconds = {
        "products": flops / (machine.gemm[shape.operand_dtype] * backend.share),
        "exponentials": work.exponentials * logits / machine.exponentials,
        "passes": of_passes,
        "traffic": read / machine.memory.read + update / machine.memory.update,
        "links": received / link.bandwidth + messages * link.latency,
        "launches": launches * machine.launch_seconds,
    }
    total = _combined(seconds, machine, backend)
    counted = dict(seconds)
    if machine.device == "cuda" and seconds["launches"] + seconds["links"] < total:
        del counted["launches"]
    return SweepCost(
        flops,
        work.exponentials * logits,
        pass_bytes,
        read + update,
        received,
        seconds,
        total,
        max(counted, key=lambda part: counted[part]),
    )


def _passes(
    shape: HeadShape, machine: Machine, plan: SweepPlan, backend: Backend, work: _Work
) -> tuple[float, float]:
    """Bytes and seconds of passes over tiles of logits, and over their weights at the update."""
    logits = 4.0 * shape.sweep_rows * shape.columns
    tile = min(plan.tile_classes * shape.centres, shape.columns)
    reads = work.forward * backend.forward_reads + work.backward * backend.backward_reads
    updates = work.forward * backend.forward_updates + work.backward * backend.backward_updates
    buffer = float(backend.logit_bytes) * plan.row_chunk * tile
    level = machine.level_of(buffer * (1 + shape.buffers))
    seconds = logits * (reads / level.read + updates / level.update)
    if shape.operand_dtype != "float32":
        seconds += _roundings(shape, backend, work) / machine.roundings
    of_weights = 4.0 * shape.columns * shape.embedding_dim * backend.weight_updates
    held = 4.0 * tile * shape.embedding_dim * (2 + len(shape.states()))
    seconds += of_weights / machine.level_of(held).update
    return logits * (reads + updates) + of_weights, seconds


def _roundings(shape: HeadShape, backend: Backend, work: _Work) -> float:
    """Numbers that change their dtype for the products of a step, and back."""
    logits = float(shape.sweep_rows) * shape.columns
    weights = float(shape.columns) * shape.embedding_dim
    forward, backward = (
        logits * of_logit + weights * of_weight
        for of_logit, of_weight in zip(
            backend.logit_roundings, backend.weight_roundings, strict=True
        )
    )
    return work.forward * forward + work.backward * backward


def _combined(seconds: dict[str, float], machine: Machine, backend: Backend) -> float:
    """The time of a step from its parts, by the module's rule."""
    busy = [seconds[part] for part in ("products", "exponentials", "passes")]
    core = max(busy) + (1 - backend.hidden) * (sum(busy) - max(busy))
    small, large = sorted((core, seconds["traffic"]))
    total = large + (1 - backend.overlap) * small
    if machine.device == "cpu":
        total += seconds["launches"]
    return max(total, seconds["launches"]) + seconds["links"]


def _traffic(shape: HeadShape, work: _Work) -> tuple[float, float]:
    """Bytes of weights that are only read, and bytes of what is read and written back."""
    numbers = float(shape.columns) * shape.embedding_dim
    weight = SIZE[shape.weight_dtype]
    update = 2 * numbers * (weight + sum(size for _, size in shape.states()))
    if not shape.in_place:
        update += 2 * numbers * 4
    return work.weight_reads * numbers * weight, update


class LinkBytes(NamedTuple):
    """What a worker receives in a step, and sends as much of; their sum is all of it."""

    rows: float
    """All-gather, float32."""
    labels: float
    """All-gather, int64."""
    statistics: float
    """All-to-all and all-gather of k float32 numbers a row, and of 2 more if refined."""
    row_gradient: float
    """Reduce-scatter, float32."""


def link_bytes(shape: HeadShape) -> LinkBytes:
    """Bytes by collective, the least that any algorithm moves: `collectives.merge_over_workers`
    agrees on the statistics with as many as an all-reduce, 2 k R (W - 1) / W numbers.
    """
    others = shape.workers - 1
    own = shape.rows * others / shape.workers
    numbers = shape.row_numbers + (2 if shape.refined else 0)
    of_rows = 4.0 * shape.embedding_dim * own
    return LinkBytes(of_rows, 8.0 * own, 2 * 4.0 * numbers * own, of_rows)


def link_messages(shape: HeadShape) -> int:
    """Messages that wait for each other: logarithmic collectives, one after the other."""
    collectives = (7 if shape.refined else 5) * shape.micro_batches
    return collectives * math.ceil(math.log2(shape.workers))
