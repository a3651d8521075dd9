"""The class-parallel objective: one worker's class weights, their loss and their optimizer."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dist_dml.config import OptimizerConfig
from dist_dml.errors import UsageError
from dist_dml.keyed_random import key_of, keyed_normal, row_keys
from dist_dml.loss_config import LossConfig
from dist_dml.losses.composed import ComposedLoss
from dist_dml.losses.margins import adaptive_margin, running_norms
from dist_dml.losses.objectives import build_objective
from dist_dml.losses.proxies import ColumnLoss
from dist_dml.losses.softmax import RowLoss
from dist_dml.parallel.class_optim import (
    build_class_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from dist_dml.parallel.class_parallel import (
    ClassParallelProblem,
    class_parallel_loss,
    demand_of,
)
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


class ClassParallelClassifier(nn.Module):
    """Owns the class weights `partition.start..stop-1` and computes an exact loss over all classes.

    Class weights never enter DDP or DeepSpeed: their gradient is complete on their owner. `weight`
    is (c, D), or (c, K, D) for losses with K centres a class.

    Args:
        embedding_dim: D.
        partition: this worker's classes.
        loss_config: which loss; see docs/losses.md.
        optimizer_config: of the class weights.
        seed: of the starting weights.
        max_rows: most rows of a (micro-)batch over all workers, for the check of the budget.
        device: where the weights live.
        dtype: of weights and sums: float32 or float64.
        class_counts: training images of each of the C classes, for losses that follow them.

    Raises:
        UsageError: if `loss.tile_mebibytes` cannot hold a tile for `max_rows` rows, or the loss
            needs what is missing.
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
        class_counts: Int[Tensor, " C"] | None = None,
    ) -> None:
        super().__init__()
        self.partition = partition
        self.config = loss_config
        own = slice(partition.start, partition.stop)
        with torch.device(device):
            counts = None if class_counts is None else class_counts.to(device)
            self.objective = build_objective(loss_config, partition.num_classes, own, counts, dtype)
        self.tile_bytes = int(loss_config.tile_mebibytes * 2**20)
        self.tile_dtype = {"float32": None, "bfloat16": torch.bfloat16}[loss_config.tile_dtype]
        demand = demand_of(
            self.objective.loss, max_rows, embedding_dim, self.tile_dtype, self.scale is not None
        )
        tile_classes_within(self.tile_bytes, demand, dtype.itemsize)
        centres = self.objective.centres
        weight = _initial_weight(
            partition, embedding_dim * centres, loss_config.init_std, seed, dtype
        )
        weight = weight if centres == 1 else weight.unflatten(1, (centres, embedding_dim))
        self.weight = nn.Parameter(weight.to(device))
        bias = self.objective.bias
        start = torch.full((partition.size,), bias or 0.0, device=device, dtype=dtype)
        self.bias = None if bias is None else nn.Parameter(start)
        if self.objective.adaptive:  # AdaFace's code starts from these; a few batches forget them.
            self.register_buffer("norm_mean", torch.tensor(20.0, device=device, dtype=dtype))
            self.register_buffer("norm_deviation", torch.tensor(100.0, device=device, dtype=dtype))
        self.optimizer = build_class_optimizer(self.weight, self.bias, optimizer_config)
        self._base_rates = [group["lr"] for group in self.optimizer.param_groups]
        # Backward sweeps overwrite the gradient in a batch's first micro-batch and add later, so no
        # pass is spent on zeroing.
        self._gradient_is_stale = True

    @property
    def scale(self) -> float | None:
        """Factor of the cosines, None for inner products."""
        return self.objective.scale

    def forward(
        self,
        embeddings: Float[Tensor, "r D"],
        labels: Int[Tensor, " r"],
        row_counts: tuple[int, ...],
        batch_rows: int,
        row_weights: Float[Tensor, " r"] | None = None,
    ) -> ObjectiveOutput:
        """The loss of the whole (micro-)batch from this worker's rows of it.

        Equal to `(row_weights * loss(all_rows, all_labels)).sum() / batch_rows`, where rows with
        the label `loss.ignore_index` weigh 0: a mean over rows, not over weights, so that a row
        counts the same in every batch. The embeddings' gradient is that of the whole loss times the
        number of workers, because the engines average over workers afterwards.

        Args:
            embeddings: this worker's rows; cast to the weights' dtype.
            labels: global class ids of those rows.
            row_counts: rows of every worker in this micro-batch.
            batch_rows: rows of the whole batch, all workers and micro-batches.
            row_weights: factor of each row's loss; None weighs all 1.

        Raises:
            UsageError: if rows of a loss that couples them are weighted or cut into micro-batches.
        """
        group = self.partition.group
        embeddings = embeddings.to(self.weight.dtype)
        all_labels = gather_uneven(labels, row_counts, group)
        counted = all_labels != self.config.ignore_index
        loss = self._loss_for(embeddings, row_counts, counted)
        if self.scale is not None:
            embeddings = F.normalize(embeddings, dim=1)
        embeddings = scale_gradient(embeddings, len(row_counts))
        rows = gather_rows(embeddings, row_counts, group)
        weights = counted.to(rows.dtype)
        if row_weights is not None:
            weights = weights * gather_uneven(row_weights.to(rows.dtype), row_counts, group)
        problem = replace(
            self.problem(with_gradients=True), loss=loss, accumulate=not self._gradient_is_stale
        )
        self._gradient_is_stale = False
        if isinstance(loss, ColumnLoss):
            if row_weights is not None or batch_rows != len(rows):
                raise UsageError(
                    f"loss.name={self.config.name} couples the rows of a batch: it takes no row "
                    "weights, and training.accumulate=1"
                )
            # No weight takes a row out of a column's sum: a negative label does.
            values, correct, _ = class_parallel_loss(rows, all_labels.where(counted, -1), problem)
            return ObjectiveOutput(values, correct.sum())
        # A row that is ignored is computed against class 0, which keeps it finite, and weighs 0.
        values, correct, spread = class_parallel_loss(rows, all_labels.where(counted, 0), problem)
        total = (values * weights).sum() / batch_rows + spread * (len(rows) / batch_rows)
        return ObjectiveOutput(total, (correct & counted).sum())

    def _loss_for(
        self, embeddings: Tensor, row_counts: tuple[int, ...], counted: Tensor
    ) -> RowLoss | ColumnLoss:
        """The loss, with margins that follow the rows' norms where it has such."""
        loss = self.objective.loss
        if not self.objective.adaptive:
            return loss
        assert isinstance(loss, ComposedLoss)
        own = torch.linalg.vector_norm(embeddings.detach(), dim=1)
        norms = gather_uneven(own, row_counts, self.partition.group)
        if self.training:
            self.norm_mean, self.norm_deviation = running_norms(
                norms, counted, self.norm_mean, self.norm_deviation, self.config.norm_momentum
            )
        margin = adaptive_margin(
            norms,
            self.norm_mean,
            self.norm_deviation,
            float(self.config.setting("angle_margin")),
            self.config.norm_concentration,
        )
        return replace(loss, margin=margin)

    def problem(self, with_gradients: bool) -> ClassParallelProblem:
        """This worker's part of the objective, for sweeps."""
        if with_gradients:
            for parameter in (self.weight, self.bias):
                if parameter is not None and parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
        width = self.weight.shape[-1]
        gradient = self.weight.grad if with_gradients else None
        shard = ClassShard(
            self.weight.detach().view(-1, width),
            None if gradient is None else gradient.view(-1, width),
            None if self.bias is None else self.bias.detach(),
            None if self.bias is None or not with_gradients else self.bias.grad,
            self.scale,
            self.objective.centres,
            self.tile_dtype,
        )
        return ClassParallelProblem(
            self.objective.loss,
            self.partition,
            shard,
            self.tile_bytes,
            spread=self.objective.spread,
        )

    def rows_for_scores(self, embeddings: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
        """Embeddings as `parallel.class_scores` takes them."""
        rows = embeddings.to(self.weight.device, self.weight.dtype)
        return rows if self.scale is None else F.normalize(rows, dim=1)

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
        tensors |= dict(self.named_buffers())
        return tensors | optimizer_tensors(self.optimizer, self._parameter_names())

    def load_shard_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `shard_tensors`, for the same partition."""
        names = self._parameter_names()
        with torch.no_grad():
            for name, own in (*self.named_parameters(), *self.named_buffers()):
                own.copy_(tensors[name])
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
