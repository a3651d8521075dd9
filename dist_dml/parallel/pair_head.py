"""The head of losses of pairs: no class weights, perhaps a cross-batch memory.

Dimensions: r rows of this worker, B of all, D features.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.loss_config import LossConfig
from dist_dml.losses.pair_objectives import LabelSets, build_pair_objective, parts_of_rows
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.collectives import gather_uneven
from dist_dml.parallel.cross_batch_memory import CrossBatchMemory
from dist_dml.parallel.heads import ObjectiveOutput
from dist_dml.parallel.pair_parallel import anchors_of_block, pair_parallel_loss


class PairHead:
    """The `Head` of a loss of pairs over the batch of all workers.

    Equal to one process with the whole batch, in value and gradient, memory included. Costs what
    `pair_parallel_loss` does for each of the objective's losses (two for C2, and as many again for
    each labelling), and one more gather of rows a step with a memory.

    Args:
        config: the loss section.
        embedding_dim: D.
        partition: the classes; no worker holds anything of them.
        max_rows: the most rows of a batch, all workers together.
        device: where embeddings are.
        dtype: of the sums.
        label_sets: of `loss.label_sets`.

    Raises:
        UsageError: for parameters that a loss does not take, and for a block that cannot hold one
            anchor against batch and memory.
    """

    def __init__(
        self,
        config: LossConfig,
        embedding_dim: int,
        partition: ClassPartition,
        max_rows: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        label_sets: LabelSets | None = None,
    ) -> None:
        self.partition, self.config = partition, config
        if label_sets is not None:
            label_sets = replace(label_sets, sets=label_sets.sets.to(device))
        self.objective = build_pair_objective(config, partition.num_classes, label_sets)
        self._device, self._dtype = torch.device(device), dtype
        anchors_of_block(max_rows + config.memory_size, config.block_mebibytes, dtype.itemsize)
        self.memory: CrossBatchMemory | None = None
        if config.memory_size:
            self.memory = CrossBatchMemory(
                config.memory_size, embedding_dim, dtype, device, config.memory_warmup_steps
            )
        self._pending: tuple[Tensor, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """See `Head`."""
        return self._device

    def __call__(
        self,
        embeddings: Float[Tensor, "r D"],
        labels: Int[Tensor, " r"],
        row_counts: tuple[int, ...],
        batch_rows: int,
        *,
        factor: float,
        last: bool,
    ) -> ObjectiveOutput:
        """See `Head`.

        Raises:
            UsageError: for a batch that was cut into micro-batches: its pairs would be lost.
        """
        del factor
        if not last or batch_rows != sum(row_counts):
            raise UsageError(
                f"loss.name={self.config.name} compares the rows of a batch with each other: it "
                "takes training.accumulate=1"
            )
        rows = embeddings.to(self._dtype)
        if self.objective.normalised:
            rows = F.normalize(rows, dim=1)
        group = self.partition.group
        kept = None if self.memory is None else self.memory.contents()
        found = [
            pair_parallel_loss(
                rows,
                labels,
                row_counts,
                loss,
                group,
                kept,
                self.config.block_mebibytes,
                self.config.ignore_index,
            )
            for loss in self.objective.losses
        ]
        if self.memory is not None:
            self._pending = (
                gather_uneven(rows.detach(), row_counts, group),
                gather_uneven(labels, row_counts, group),
            )
        return ObjectiveOutput(torch.stack(found).sum(), None)

    def step_done(self) -> None:
        """The batch joins the memory, whose old rows the backward has read by now."""
        if self.memory is not None and self._pending is not None:
            self.memory.push(*self._pending)
        self._pending = None

    def report(self) -> dict[str, float]:
        """`loss/memory_rows`, where there is a memory."""
        return {} if self.memory is None else {"loss/memory_rows": float(self.memory.filled)}

    def parts(
        self, rows: Float[Tensor, "n D"], labels: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]] | None:
        """See `Head`: of the rows alone, without a memory."""
        rows = rows.to(self._dtype)
        rows = F.normalize(rows, dim=1) if self.objective.normalised else rows
        return parts_of_rows(self.objective, rows, labels, self.config.ignore_index)

    def close(self) -> None:
        """See `Head`: there is nothing to end."""

    def shard_tensors(self) -> dict[str, Tensor]:
        """See `Head`: nothing belongs to classes."""
        return {}

    def load_shard_tensors(self, tensors: dict[str, Tensor]) -> None:
        """See `Head`."""
        assert not tensors, f"a loss of pairs has no weights, got {', '.join(tensors)}"

    def shared_tensors(self) -> dict[str, Tensor]:
        """The memory."""
        return {} if self.memory is None else self.memory.tensors()

    def load_shared_tensors(self, tensors: dict[str, Tensor]) -> None:
        """See `Head`.

        Raises:
            UsageError: if the checkpoint's memory is of another size.
        """
        if self.memory is not None:
            self.memory.load(tensors)
