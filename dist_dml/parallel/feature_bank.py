"""The latest embeddings of each class, kept during training: a ring for each class of a worker.

Every worker stores the rows of its own classes out of the gathered batch, in the batch's order, so
that the bank does not depend on the number of workers.

Dimensions: c classes of this worker, b places of a class, B rows of a batch, D features.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dist_dml.parallel.class_partition import ClassPartition


class FeatureBank:
    """c * b * D numbers. A batch costs a few operations on B rows; nothing waits for the device.

    Args:
        partition: this worker's classes.
        places: b.
        embedding_dim: D.
        dtype: of the rows, which are cast.
        device: where they live.
    """

    def __init__(
        self,
        partition: ClassPartition,
        places: int,
        embedding_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self._partition, self._places = partition, places
        size = partition.size
        # One place and one count more, which take what is not to be kept: nobody reads them.
        self._flat = torch.zeros(size * places + 1, embedding_dim, dtype=dtype, device=device)
        self._stored = torch.zeros(size + 1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def push(self, rows: Float[Tensor, "B D"], labels: Int[Tensor, " B"], ignored: int) -> None:
        """Store the rows of this worker's classes over the oldest; the last b of a class.

        Args:
            rows: of all workers in worker order.
            labels: global class ids.
            ignored: label of rows that are left out.
        """
        size, width = self._partition.size, self._places
        classes = labels - self._partition.start
        ours = (classes >= 0) & (classes < size) & (labels != ignored)
        classes, order = torch.where(ours, classes, size).sort(stable=True)
        counts = torch.zeros_like(self._stored).scatter_add_(0, classes, torch.ones_like(classes))
        first = counts.cumsum(0) - counts
        nth = torch.arange(len(rows), device=rows.device) - first[classes]
        # Of more rows than places only the last ones: no place is written to twice.
        kept = (classes < size) & (nth >= counts[classes] - width)
        at = classes * width + (self._stored[classes] + nth) % width
        at = torch.where(kept, at, size * width)
        self._flat.index_copy_(0, at, rows[order].to(self._flat))
        self._stored += counts

    @property
    def rows(self) -> Float[Tensor, "c b D"]:
        """The embeddings; places that `filled` does not name hold zeros."""
        return self._flat[:-1].unflatten(0, (-1, self._places))

    @property
    def filled(self) -> Bool[Tensor, "c b"]:
        """Which places hold an embedding."""
        places = torch.arange(self._places, device=self._flat.device)
        return places < self._stored[:-1, None]

    def tensors(self) -> dict[str, Tensor]:
        """`bank|rows` and `bank|stored`, rows of classes both: the bank's own, to be filled."""
        return {"bank|rows": self.rows, "bank|stored": self._stored[:-1]}
