"""Cross-batch memory (XBM): embeddings of earlier batches as further rows to compare with.

Wang et al., "Cross-Batch Memory for Embedding Learning", CVPR 2020: once an embedder has learned
for a while its embeddings drift slowly, so that those of the last batches are as good as those that
it would give now, and cost nothing.

Every worker holds the whole memory and stores the same gathered rows in worker order: no worker has
to send anything, and a run may be resumed on another number of workers. Memories that hold each
worker's own rows first would differ, and with them the workers' losses.

Differences from the authors' code, which have reasons:

- It stores a batch before it compares with the memory, and so compares each anchor with its own
  copy, which its losses leave out by their values (cosines of nearly 1). Here a batch is stored
  after its backward; the anchor meets the batch itself, with gradients, by `pair_parallel_loss`.
- It adds a loss of the memory to one of the batch. Here both are rows of *one* loss. The same for
  sums over pairs with a common divisor (form C1); other losses see all their rows at once.
- A batch that does not fit behind the last one overwrites the *end* of its buffer, and the rows
  that this skips stay for another round. Here the oldest rows leave first, always.

Dimensions: S places of the memory, M of them filled, B rows of a batch of all workers, D features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.parallel.pair_parallel import PairMemory


class CrossBatchMemory:
    """The last S rows of the batches after the warm-up, with their labels: a ring.

    Holds S * (D * itemsize + 8) bytes on every worker, and costs a copy of B rows a step. Nothing
    waits for the device.

    Args:
        size: S; the papers count it in batches (paper C: 3 to 1400 of 32 rows).
        dim: D.
        dtype: of the rows; they are cast. A narrower one than the batch's saves memory here, and
            costs a cast of all M rows in each step.
        device: where the rows live.
        warmup_steps: calls of `push` that store nothing, while embeddings still move fast (paper C:
            1000). A loss before them sees the batch alone.

    Raises:
        UsageError: if the size is not positive or the warm-up is negative.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        warmup_steps: int = 0,
    ) -> None:
        if size < 1 or warmup_steps < 0:
            raise UsageError(
                f"a cross-batch memory of size={size} and warmup_steps={warmup_steps}: the size "
                "must be 1 or more, the steps 0 or more; leave the memory out for none"
            )
        self.size, self.warmup_steps = size, warmup_steps
        self._rows = torch.zeros(size, dim, dtype=dtype, device=device)
        self._labels = torch.zeros(size, dtype=torch.int64, device=device)
        # Python's own numbers, the same on every worker: reading them waits for no device.
        self._pushes = self._stored = 0

    @property
    def filled(self) -> int:
        """M: places that hold a row. They are the first ones, `rows[:M]`, at any time."""
        return min(self._stored, self.size)

    def push(self, rows: Float[Tensor, "B D"], labels: Int[Tensor, " B"]) -> None:
        """Store a batch over the oldest rows; of a batch larger than the memory, the last rows.

        To be called once a step, *after* its backward, which still reads the memory.

        Args:
            rows: of all workers in worker order (`collectives.gather_uneven`); detached and copied.
                Normalised, where the loss is one of cosines.
            labels: of those rows. Ignored ones are stored too, and left out by the loss.
        """
        self._pushes += 1
        if self._pushes <= self.warmup_steps:
            return
        num_rows, kept = len(rows), min(len(rows), self.size)
        first = self._stored + num_rows - kept
        places = torch.arange(first, first + kept, device=self._rows.device) % self.size
        # In place, and not through `.data`: a backward that still needs the old rows must fail.
        self._rows.index_copy_(0, places, rows.detach()[num_rows - kept :].to(self._rows))
        self._labels.index_copy_(0, places, labels[num_rows - kept :].to(self._labels))
        self._stored += num_rows

    def contents(self) -> PairMemory | None:
        """The filled rows, as `pair_parallel_loss` takes them; None while there are none.

        Views, without gradient and in no particular order: the next `push` changes them.
        """
        if self.filled == 0:
            return None
        return PairMemory(self._rows[: self.filled], self._labels[: self.filled])

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint needs, the same on every worker: one has to write it.

        `rows` (S, D) and `labels` (S,), which are the memory's own and no copies, and the counts
        `pushes` and `stored`, int64 scalars.
        """
        return {
            "rows": self._rows,
            "labels": self._labels,
            "pushes": torch.tensor(self._pushes, dtype=torch.int64),
            "stored": torch.tensor(self._stored, dtype=torch.int64),
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue where `tensors` were taken, on any number of workers.

        Raises:
            UsageError: if they are not those of a memory of this size and width.
        """
        own = self.tensors()
        if missing := sorted(own.keys() - tensors.keys()):
            raise UsageError(
                f"the checkpoint's cross-batch memory lacks {', '.join(missing)}; resume with the "
                "configuration that it was written with"
            )
        got, wanted = tuple(tensors["rows"].shape), tuple(self._rows.shape)
        if got != wanted:
            raise UsageError(
                f"the checkpoint's cross-batch memory is (rows, features) = {got}, configured "
                f"{wanted}; resume with the size and embedding that it was written with"
            )
        self._rows.copy_(tensors["rows"])
        self._labels.copy_(tensors["labels"])
        self._pushes, self._stored = int(tensors["pushes"]), int(tensors["stored"])
