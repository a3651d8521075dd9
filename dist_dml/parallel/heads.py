"""What stands behind the embedder in training: class weights, or the pairs of a batch.

Dimensions: r rows of this worker, D features.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_dml.parallel.class_partition import ClassPartition


class ObjectiveOutput(NamedTuple):
    """What one call of an objective gives: the same on every worker."""

    loss: Float[Tensor, ""]
    """Sum of the rows' losses over the rows of the *whole* batch, micro-batches included: adding up
    a batch's micro-batches gives its mean."""
    num_correct: Int[Tensor, ""] | None
    """Rows whose label has the largest logit; None for losses that have no logits of classes."""


@runtime_checkable  # The tests execute all annotations.
class Head(Protocol):
    """An objective over the rows of all workers, with the state that it trains or keeps.

    Attributes:
        partition: the classes, and this worker's part of them.
    """

    partition: ClassPartition

    @property
    def device(self) -> torch.device:
        """Where its numbers lie."""
        ...

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
        """The loss of the whole (micro-)batch from this worker's rows. The embeddings' gradient is
        that of the whole loss times the number of workers, because the engines average afterwards.

        Args:
            embeddings: this worker's rows.
            labels: of those rows.
            row_counts: rows of every worker in this micro-batch.
            batch_rows: rows of the whole batch, all workers and micro-batches.
            factor: the schedule's factor of the learning rate.
            last: whether this is the batch's last micro-batch.
        """
        ...

    def step_done(self) -> None:
        """After the batch's last backward; by all workers together."""
        ...

    def report(self) -> dict[str, float]:
        """Further numbers of the last step, by name. May wait for the device."""
        ...

    def parts(
        self, rows: Float[Tensor, "n D"], labels: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]] | None:
        """Tightness and contrastive part (paper B, Table 2) of some rows, which all workers pass
        alike; None for objectives without such parts. By all workers together, without gradient.

        Args:
            rows: embeddings as the embedder gives them.
            labels: of those rows.
        """
        ...

    def close(self) -> None:
        """End what runs beside the training."""
        ...

    def shard_tensors(self) -> dict[str, Tensor]:
        """What belongs to this worker's classes, by name; entries of dimension 0 of the
        partition's size are rows of classes, the others are the same on all workers."""
        ...

    def load_shard_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `shard_tensors`, for the same partition."""
        ...

    def shared_tensors(self) -> dict[str, Tensor]:
        """What is the same on every worker and large: one has to write it."""
        ...

    def load_shared_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `shared_tensors`, on any number of workers."""
        ...
