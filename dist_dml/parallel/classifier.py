"""The class-parallel objective: one worker's class weights, their loss and their optimizer."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dist_dml.config import LossConfig, OptimizerConfig
from dist_dml.errors import UsageError
from dist_dml.keyed_random import key_of, keyed_normal, row_keys
from dist_dml.losses.softmax import CrossEntropy, RowLoss
from dist_dml.parallel.class_optim import (
    build_class_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from dist_dml.parallel.class_parallel import ClassParallelProblem, class_parallel_loss
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.collectives import gather_rows, gather_uneven, scale_gradient
from dist_dml.parallel.sweep_torch import ClassShard, tile_classes_within

# Class weights are drawn this many rows at a time, to bound the temporaries of the generator.
_INIT_ROWS = 65_536


class ObjectiveOutput(NamedTuple):
    """What one call of an objective gives: the same on every worker."""

    loss: Float[Tensor, ""]
    """Sum of the rows' losses over the rows of the *whole* batch, micro-batches included: adding up
    a batch's micro-batches gives its mean."""
    num_correct: Int[Tensor, ""]
    """Rows whose label has the largest logit."""


def build_loss(config: LossConfig, num_classes: int) -> RowLoss:
    """The row loss that `loss.name` names."""
    return {"cross_entropy": CrossEntropy}[config.name](num_classes, config.label_smoothing)


class ClassParallelClassifier(nn.Module):
    """Owns the class weights `partition.start..stop-1` and computes an exact loss over all classes.

    Class weights never enter DDP or DeepSpeed: their gradient is complete on their owner.

    Raises:
        UsageError: if `loss.tile_mebibytes` cannot hold a tile for `max_rows` rows.
    """

    def __init__(
        self,
        embedding_dim: int,
        partition: ClassPartition,
        loss_config: LossConfig,
        optimizer_config: OptimizerConfig,
        seed: int,
        max_rows: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if loss_config.label_smoothing > 0 and partition.num_classes < 2:
            raise UsageError("loss.label_smoothing needs at least 2 classes; set it to 0")
        self.partition = partition
        self.loss = build_loss(loss_config, partition.num_classes)
        self.scale = loss_config.scale if loss_config.similarity == "cosine" else None
        self.tile_bytes = int(loss_config.tile_mebibytes * 2**20)
        tile_classes_within(self.tile_bytes, max_rows, embedding_dim, dtype.itemsize)
        weight = _initial_weight(partition, embedding_dim, loss_config.init_std, seed, dtype)
        self.weight = nn.Parameter(weight.to(device))
        has_bias = loss_config.bias and self.scale is None
        bias = nn.Parameter(torch.zeros(partition.size, device=device, dtype=dtype))
        self.bias = bias if has_bias else None
        self.optimizer = build_class_optimizer(self.weight, self.bias, optimizer_config)
        self._base_rates = [group["lr"] for group in self.optimizer.param_groups]
        # Backward sweeps overwrite the gradient in a batch's first micro-batch and add later, so no
        # pass is spent on zeroing.
        self._gradient_is_stale = True

    def forward(
        self,
        embeddings: Float[Tensor, "r D"],
        labels: Int[Tensor, " r"],
        row_counts: tuple[int, ...],
        batch_rows: int,
    ) -> ObjectiveOutput:
        """The loss of the whole (micro-)batch from this worker's rows of it.

        Equal to `F.cross_entropy(all_rows @ W.T + b, all_labels, reduction="sum") / batch_rows`.
        The embeddings' gradient is that of the whole loss times the number of workers, because the
        engines average over workers afterwards.

        Args:
            embeddings: this worker's rows; cast to the weights' dtype.
            labels: global class ids of those rows.
            row_counts: rows of every worker in this micro-batch.
            batch_rows: rows of the whole batch, all workers and micro-batches.
        """
        group = self.partition.group
        embeddings = embeddings.to(self.weight.dtype)
        if self.scale is not None:
            embeddings = F.normalize(embeddings, dim=1)
        embeddings = scale_gradient(embeddings, len(row_counts))
        rows = gather_rows(embeddings, row_counts, group)
        all_labels = gather_uneven(labels, row_counts, group)
        problem = ClassParallelProblem(
            self.loss,
            self.partition,
            self._shard(),
            self.tile_bytes,
            accumulate=not self._gradient_is_stale,
        )
        self._gradient_is_stale = False
        values, correct = class_parallel_loss(rows, all_labels, problem)
        return ObjectiveOutput(values.sum() / batch_rows, correct.sum())

    def _shard(self) -> ClassShard:
        for parameter in (self.weight, self.bias):
            if parameter is not None and parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
        return ClassShard(
            self.weight.detach(),
            self.weight.grad,
            None if self.bias is None else self.bias.detach(),
            None if self.bias is None else self.bias.grad,
            self.scale,
        )

    def step(self, factor: float) -> None:
        """Update this worker's classes with the gradient of the whole batch.

        Args:
            factor: the schedule's factor of the learning rate.
        """
        set_learning_rate(self.optimizer, self._base_rates, factor)
        self.optimizer.step()
        self._gradient_is_stale = True

    def shard_tensors(self) -> dict[str, Tensor]:
        """Weights and optimizer state by name; entries of dimension 0 of size c are rows of
        classes.
        """
        tensors = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return tensors | optimizer_tensors(self.optimizer, self._parameter_names())

    def load_shard_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `shard_tensors`, for the same partition."""
        names = self._parameter_names()
        with torch.no_grad():
            for parameter, name in names.items():
                parameter.copy_(tensors[name])
        state = {name: value for name, value in tensors.items() if "|" in name}
        load_optimizer_tensors(self.optimizer, names, state)

    def _parameter_names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self.named_parameters()}


def _initial_weight(
    partition: ClassPartition, embedding_dim: int, std: float, seed: int, dtype: torch.dtype
) -> Float[Tensor, "c D"]:
    """Normal weights drawn by class id: the same for any number of workers."""
    weight = torch.zeros(partition.size, embedding_dim, dtype=dtype)
    if std == 0:
        return weight
    key = key_of(seed, "class weight")
    for start in range(0, partition.size, _INIT_ROWS):
        rows = weight[start : start + _INIT_ROWS]
        ids = torch.arange(len(rows)) + (partition.start + start)
        rows.copy_(keyed_normal(row_keys(key, ids), embedding_dim) * std)
    return weight
