"""What a class-parallel step is about: the loss, this worker's classes, how they are swept.

Dimensions: N rows of all micro-batches, R of one, c classes of this worker, K centres of a class, D
features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.losses.proxies import CentreSpread, ColumnLoss
from dist_dml.losses.softmax import RowLoss
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.class_sweeps import GradientTarget, KernelBackend, UpdateTarget
from dist_dml.parallel.sweep_torch import ClassShard, TileDemand, tile_classes_within

Sweep = Literal["keep", "recompute", "row_chunked"]
# Rows of a chunk in row-chunked sweeps: enough to make the matrix products efficient.
_CHUNK_ROWS = 1024


@dataclass(frozen=True)
class RowBatch:
    """Rows whose part of the weights' gradient is still to be made.

    Attributes:
        labels: global class ids.
        agreed: what the loss's gradient rule needs of each row, the same on all workers.
        upstream: gradient of the values.
        finite: whether all values are.
        kept: logits of the forward sweep, or None.
        of_spread: gradient of the term on centres.
        normaliser: logarithm of the sum of exponentials, for losses of softmax form.
    """

    rows: Float[Tensor, "R D"]
    labels: Int[Tensor, " R"]
    agreed: Tensor
    upstream: Tensor
    finite: Bool[Tensor, ""]
    kept: Any = None
    of_spread: Tensor | None = None
    normaliser: Float[Tensor, " R"] | None = None


@dataclass
class StepMemory:
    """What lives from one micro-batch to the next, and what a step tells. One a classifier.

    Attributes:
        batches: micro-batches whose weight gradient waits for the last one.
        bias_gradient: (n,) of the step, where there are biases.
        finite: whether all losses of the step were, so that it was made.
        active_classes: classes that take part, where not all do.
        filtered_classes: classes left out by `filter_below`; `filtered_mass`, an upper bound of the
            probability with them.
    """

    batches: list[Any] = field(default_factory=list)
    bias_gradient: Tensor | None = None
    finite: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.bool))
    active_classes: int = 0
    filtered_classes: Tensor | int = 0
    filtered_mass: Tensor | float = 0.0


@dataclass(frozen=True)
class ClassParallelProblem:
    """What stays the same for all rows of a sweep.

    Attributes:
        loss: the loss, of rows or of columns.
        partition: this worker's class ids.
        shard: this worker's weights.
        tile_bytes: most memory beyond weights and optimizer state.
        target: what becomes of the weights' gradient; None: the rows wait in `memory`.
        memory: of the step.
        after: called at the end of a backward sweep that had a target.
        spread: a further term on the centres of each class.
        backend: kernels, or None for torch operations.
        sweep: how logits come to the backward sweep.
        tile_classes: classes of a tile; 0: as many as fit `tile_bytes`.
        row_chunk: rows of a chunk; 0: all, or `_CHUNK_ROWS` with `row_chunked`.
        filter_below: tiles with smaller probabilities give no gradient.
        held_rows: most rows of all micro-batches of a step; 0: those of a sweep.
        update_numbers: numbers for each of a tile's weights, while it is updated.
    """

    loss: RowLoss | ColumnLoss
    partition: ClassPartition
    shard: ClassShard
    tile_bytes: int
    target: GradientTarget | UpdateTarget | None = None
    memory: StepMemory = field(default_factory=StepMemory)
    after: Callable[[], None] | None = None
    spread: CentreSpread | None = None
    backend: KernelBackend | None = None
    sweep: Sweep = "recompute"
    tile_classes: int = 0
    row_chunk: int = 0
    filter_below: float = 0.0
    held_rows: int = 0
    update_numbers: float = 1.0

    def chunk_rows(self, num_rows: int) -> int:
        """Rows that a tile takes at a time.

        A column loss needs all rows of a class at once, AdaFace's margins belong to their rows.
        """
        if isinstance(self.loss, ColumnLoss) or getattr(self.loss, "keeps_rows_together", False):
            return num_rows
        if self.row_chunk:
            return min(num_rows, self.row_chunk)
        return min(num_rows, _CHUNK_ROWS) if self.sweep == "row_chunked" else num_rows

    def demand(self, num_rows: int, num_features: int) -> TileDemand:
        """What a sweep holds for so many rows."""
        rows = max(1, num_rows)
        numbers = self.loss.row_numbers if isinstance(self.loss, RowLoss) else 6
        return TileDemand(
            max(rows, self.held_rows),
            self.chunk_rows(rows),
            num_features,
            self.shard.centres,
            self.loss.buffers,
            numbers,
            self.shard.tile_dtype is not None,
            self.shard.active is not None or self.shard.weight.dtype == torch.bfloat16,
            # The projection of a cosine's gradient makes one product of a tile's size.
            max(self.update_numbers, 0.0 if self.shard.scale is None else 1.0),
        )

    def tile_for(self, num_rows: int, num_features: int, element_size: int) -> int:
        """Classes of a tile.

        Raises:
            UsageError: if the budget cannot hold a small tile.
        """
        demand = self.demand(num_rows, num_features)
        kept = 0
        if self.sweep == "keep":
            kept = num_rows * self.shard.num_classes * self.shard.centres * element_size
            if kept >= self.tile_bytes:
                raise UsageError(
                    f"classes.sweep=keep holds {kept / 2**20:.1f} MiB of logits and "
                    f"loss.tile_mebibytes={self.tile_bytes / 2**20:g}; set that to "
                    f"{1.5 * kept / 2**20:.0f} or more, or classes.sweep=recompute"
                )
        tile = tile_classes_within(self.tile_bytes - kept, demand, element_size)
        if self.tile_classes:
            tile = min(tile, self.tile_classes)
        return max(1, min(tile, self.shard.num_classes))
