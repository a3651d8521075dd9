"""What embeddings look like while they are trained: paper B's estimates, paper C's radii.

Dimensions: r rows of this worker, D features.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dist_dml.losses.diagnostics import diagnose, whole_classes
from dist_dml.parallel.collectives import gather_uneven
from dist_dml.parallel.heads import Head
from dist_dml.parallel.world import World

# Rows of a batch that are looked at: 15 ms at 128 features on one core, and for the parts of a
# classification loss an eighth of a forward sweep of 256 rows, when a record is due.
_ROWS, _ROWS_FOR_PARTS = 256, 32


class TrainingDiagnosis:
    """Numbers of the last micro-batch of all workers, when they are asked for.

    Args:
        head: whose parts are told.
        world: the workers.
        ignored: label of rows that take no part.
        enabled: whether to give any number.
    """

    def __init__(self, head: Head, world: World, ignored: int, enabled: bool) -> None:
        self._head, self._world, self._ignored, self._enabled = head, world, ignored, enabled
        self._last: tuple[Tensor, Tensor, tuple[int, ...]] | None = None

    def note(
        self,
        embeddings: Float[Tensor, "r D"],
        labels: Int[Tensor, " r"],
        row_counts: tuple[int, ...],
    ) -> None:
        """Keep a micro-batch; nothing is computed or copied."""
        if self._enabled:
            self._last = embeddings.detach(), labels, row_counts

    def metrics(self) -> dict[str, float]:
        """`diagnosis/...`: the fields of `losses.diagnostics.Diagnosis`, of unit vectors, and
        `tightness` and `contrastive` (see `Head.parts`). What a batch does not determine is absent.

        By all workers together. One gather of the batch; waits for the device.
        """
        if self._last is None:
            return {}
        embeddings, labels, row_counts = self._last
        rows = gather_uneven(embeddings.float(), row_counts, self._world.group)
        labels = gather_uneven(labels, row_counts, self._world.group)
        if not bool(torch.isfinite(rows).all()):
            return {}  # The loss, which is told with these, says it better.
        found = diagnose(F.normalize(rows, dim=1), labels, self._ignored, _ROWS)._asdict()
        few = whole_classes(labels, _ROWS_FOR_PARTS, self._ignored)
        parts = self._head.parts(rows[few], labels[few]) if len(few) else None
        if parts is not None:
            found |= {"tightness": parts[0], "contrastive": parts[1]}
        values = torch.stack([value.float() for value in found.values()]).tolist()
        numbers = zip(found, values, strict=True)
        return {f"diagnosis/{name}": value for name, value in numbers if math.isfinite(value)}
