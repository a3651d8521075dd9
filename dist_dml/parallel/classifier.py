"""The class-parallel objective: one worker's class weights, their loss and their optimizer."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dist_dml.class_config import ClassesConfig
from dist_dml.config import OptimizerConfig
from dist_dml.errors import UsageError
from dist_dml.loss_config import LossConfig
from dist_dml.losses.composed import ComposedLoss
from dist_dml.losses.margins import adaptive_margin, running_norms
from dist_dml.losses.objectives import build_objective
from dist_dml.losses.proxies import ColumnLoss
from dist_dml.losses.softmax import RowLoss
from dist_dml.parallel.backends import choose_backend, choose_plan, splits_operands
from dist_dml.parallel.class_init import initial_weight
from dist_dml.parallel.class_optim import ClassOptimizer, weight_dtype
from dist_dml.parallel.class_parallel import class_parallel_loss
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.class_problem import ClassParallelProblem, StepMemory
from dist_dml.parallel.class_scores import label_parts
from dist_dml.parallel.class_sweeps import GradientTarget
from dist_dml.parallel.collectives import PendingGather, gather_uneven, scale_gradient
from dist_dml.parallel.cost import SweepPlan
from dist_dml.parallel.heads import ObjectiveOutput
from dist_dml.parallel.participants import Participants
from dist_dml.parallel.sampling import ActiveClasses, check_sampling
from dist_dml.parallel.sweep_torch import ClassShard

_DEFAULT_CLASSES = ClassesConfig()


class ClassParallelClassifier(nn.Module):
    """Owns the class weights `partition.start..stop-1` and computes an exact loss over all classes.

    Class weights never enter DDP or DeepSpeed: their gradient is complete on their owner. `weight`
    is (c, D), or (c, K, D) for losses with K centres a class.

    Two ways to train: `factor` given, the last backward of a batch updates the weights in place,
    tile by tile, and no gradient of their size exists. Without it, gradients are left in
    `weight.grad`, and `step` uses them.

    Args:
        embedding_dim: D.
        partition: this worker's classes.
        loss_config: which loss; see docs/losses.md.
        optimizer_config: of the class weights.
        seed: of the starting weights, of sampling and stochastic rounding.
        max_rows: most rows of a (micro-)batch over all workers, for the check of the budget.
        device: where the weights live.
        dtype: of weights and sums: float32 or float64.
        class_counts: training images of each of the C classes, for losses that follow them.
        classes: backend, sweep, update and classes that take part.
        micro_batches: of a batch.

    Raises:
        UsageError: if `loss.tile_mebibytes` cannot hold a tile for `max_rows` rows, a backend
            cannot be had, or the loss needs what is missing.
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
        classes: ClassesConfig = _DEFAULT_CLASSES,
        micro_batches: int = 1,
    ) -> None:
        super().__init__()
        self.partition, self.config, self.classes = partition, loss_config, classes
        check_sampling(classes, loss_config)
        own = slice(partition.start, partition.stop)
        with torch.device(device):
            counts = None if class_counts is None else class_counts.to(device)
            self.objective = build_objective(loss_config, partition.num_classes, own, counts, dtype)
        self._seed, self._rows_dtype = seed, dtype
        self.backend = choose_backend(
            classes, loss_config, self.objective.loss, torch.device(device), dtype
        )
        self.tile_bytes = round(loss_config.tile_mebibytes * 2**20)
        self.tile_dtype = torch.bfloat16 if loss_config.tile_dtype == "bfloat16" else None
        self.split = splits_operands(loss_config, self.backend, partition.size, embedding_dim)
        centres = self.objective.centres
        kept = dtype if classes.weight_dtype == "float32" else weight_dtype(classes)
        weight = initial_weight(
            partition, embedding_dim * centres, loss_config.init_std, seed, kept
        )
        weight = weight if centres == 1 else weight.unflatten(1, (centres, embedding_dim))
        self.weight = nn.Parameter(weight.to(device))
        bias = self.objective.bias
        start = torch.full((partition.size,), bias or 0.0, device=device, dtype=dtype)
        self.bias = None if bias is None else nn.Parameter(start)
        if self.objective.adaptive:  # AdaFace's code starts from these; a few batches forget them.
            self.register_buffer("norm_mean", torch.tensor(20.0, device=device, dtype=dtype))
            self.register_buffer("norm_deviation", torch.tensor(100.0, device=device, dtype=dtype))
        self.optimizer = ClassOptimizer(
            self.weight,
            self.bias,
            optimizer_config,
            classes,
            seed,
            partition.start * centres,
        )
        self.memory = StepMemory()
        self._held_rows = max_rows * micro_batches
        self.plan = SweepPlan("recompute", 0, 0, "")
        self.plan = choose_plan(
            classes, self.problem(), self.optimizer.rule, max_rows, micro_batches
        )
        self.problem().tile_for(max_rows, embedding_dim, dtype.itemsize)
        self._participants = Participants(partition, classes, seed, self.scale is not None)
        # Without in-place updates, backward sweeps overwrite the gradient in a batch's first
        # micro-batch and add later, so no pass is spent on zeroing.
        self._gradient_is_stale = True

    @property
    def device(self) -> torch.device:
        """Where the class weights lie."""
        return self.weight.device

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
        factor: float | None = None,
        last: bool = True,
    ) -> ObjectiveOutput:
        """The loss of the whole (micro-)batch from this worker's rows of it.

        Equal to `(row_weights * loss(all_rows, all_labels)).sum() / batch_rows`, where rows with
        the label `loss.ignore_index` weigh 0: a mean over rows, not over weights, so that a row
        counts the same in every batch. The embeddings' gradient is that of the whole loss times the
        number of workers, because the engines average over workers afterwards.

        Args:
            embeddings: this worker's rows; cast to the dtype of the sums.
            labels: global class ids of those rows.
            row_counts: rows of every worker in this micro-batch.
            batch_rows: rows of the whole batch, all workers and micro-batches.
            row_weights: factor of each row's loss; None weighs all 1.
            factor: the schedule's factor of the learning rate: the batch's last backward updates
                this worker's classes in place. None leaves gradients in `weight.grad`.
            last: whether this is the batch's last micro-batch.

        Raises:
            UsageError: if rows of a loss that couples them are weighted or cut into micro-batches.
        """
        group = self.partition.group
        embeddings = embeddings.to(self._rows_dtype)
        normalised = embeddings if self.scale is None else F.normalize(embeddings, dim=1)
        normalised = scale_gradient(normalised, len(row_counts))
        # The rows travel while labels, margins and the classes that take part are found.
        travelling = PendingGather(normalised.detach(), row_counts, group)
        all_labels = gather_uneven(labels, row_counts, group)
        counted = all_labels != self.config.ignore_index
        loss = self._loss_for(embeddings, row_counts, counted)
        weights = counted.to(normalised.dtype)
        if row_weights is not None:
            weights = weights * gather_uneven(row_weights.to(weights.dtype), row_counts, group)
        # A row that is ignored is computed against class 0, which keeps it finite, and weighs 0.
        active = self._participants.of_step(
            all_labels.where(counted, 0), self.weight.detach(), self.optimizer.num_steps
        )
        if active is not None:
            self.memory.active_classes = len(active.ids)
        problem = replace(self.problem(active), loss=loss)
        problem = self._with_target(problem, factor, last)
        rows = travelling.wait()
        if isinstance(loss, ColumnLoss):
            if row_weights is not None or batch_rows != len(rows):
                raise UsageError(
                    f"loss.name={self.config.name} couples the rows of a batch: it takes no row "
                    "weights, and training.accumulate=1"
                )
            # No weight takes a row out of a column's sum: a negative label does.
            values, correct, _ = class_parallel_loss(
                rows, all_labels.where(counted, -1), problem, normalised, row_counts
            )
            return ObjectiveOutput(values, correct.sum())
        values, correct, spread = class_parallel_loss(
            rows, all_labels.where(counted, 0), problem, normalised, row_counts
        )
        total = (values * weights).sum() / batch_rows + spread * (len(rows) / batch_rows)
        return ObjectiveOutput(total, (correct & counted).sum())

    def _with_target(
        self, problem: ClassParallelProblem, factor: float | None, last: bool
    ) -> ClassParallelProblem:
        """The problem with what becomes of the weights' gradient."""
        active, memory = problem.shard.active, self.memory
        if factor is not None:
            if not last:
                return problem
            every = torch.ones((), dtype=torch.bool, device=self.weight.device)
            target = self.optimizer.target(factor, every)

            def done() -> None:
                self.optimizer.done(memory.bias_gradient, active, factor, memory.finite)

            return replace(problem, target=target, after=done)
        assert self.weight.dtype == self._rows_dtype, "bfloat16 weights are updated in place"
        assert active is None, "sampled classes are updated in place"
        for parameter in (self.weight, self.bias):
            if parameter is not None and parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
        assert self.weight.grad is not None
        accumulate = not self._gradient_is_stale
        self._gradient_is_stale = False

        def keep_bias() -> None:
            if self.bias is None or self.bias.grad is None or memory.bias_gradient is None:
                return
            if accumulate:
                self.bias.grad.add_(memory.bias_gradient)
            else:
                self.bias.grad.copy_(memory.bias_gradient)

        gradient = self.weight.grad.view(-1, self.weight.shape[-1])
        return replace(problem, target=GradientTarget(gradient, accumulate), after=keep_bias)

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

    def problem(self, active: ActiveClasses | None = None) -> ClassParallelProblem:
        """This worker's part of the objective, for sweeps.

        Args:
            active: the classes that take part; None for all.
        """
        shard = ClassShard(
            self.weight.detach().view(-1, self.weight.shape[-1]),
            None if self.bias is None else self.bias.detach(),
            self.scale,
            self.objective.centres,
            self.tile_dtype,
            self.split,
            None if active is None else active.ids,
            None if active is None else active.correction,
        )
        return ClassParallelProblem(
            self.objective.loss,
            self.partition,
            shard,
            self.tile_bytes,
            memory=self.memory,
            spread=self.objective.spread,
            backend=self.backend,
            sweep=self.plan.sweep,
            tile_classes=self.plan.tile_classes,
            row_chunk=self.plan.row_chunk,
            filter_below=self.classes.filter_below,
            held_rows=self._held_rows,
            update_numbers=self.optimizer.update_numbers,
        )

    def rows_for_scores(self, embeddings: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
        """Embeddings as `parallel.class_scores` takes them."""
        rows = embeddings.to(self.weight.device, self._rows_dtype)
        return rows if self.scale is None else F.normalize(rows, dim=1)

    def step(self, factor: float) -> None:
        """Update this worker's classes with the gradients in `weight.grad`, which it overwrites.

        For batches that were computed without a factor.

        Args:
            factor: the schedule's factor of the learning rate.
        """
        assert self.weight.grad is not None
        self.optimizer.step_from(
            self.weight.grad, None if self.bias is None else self.bias.grad, factor
        )
        self._gradient_is_stale = True

    def report(self) -> dict[str, float]:
        """What the last step left out, of this worker's classes: `class/active_share`,
        `class/index_wait_seconds`, `class/filtered_share`, `class/filtered_mass`; nothing where all
        take part. Waits for the device.
        """
        found, size = {}, self.partition.size
        if self.classes.sample != "all":
            found["class/active_share"] = self.memory.active_classes / size
        if (waited := self._participants.waited_seconds) is not None:
            found["class/index_wait_seconds"] = waited
        if self.classes.filter_below > 0:
            found["class/filtered_share"] = float(self.memory.filtered_classes) / size
            found["class/filtered_mass"] = float(self.memory.filtered_mass)
        return found

    def step_done(self) -> None:
        """See `Head`: classes are updated in the backward."""

    def shared_tensors(self) -> dict[str, Tensor]:
        """See `Head`: all state is of classes, or small."""
        return {}

    def load_shared_tensors(self, tensors: dict[str, Tensor]) -> None:
        """See `Head`."""
        assert not tensors, f"a classifier shares no state, got {', '.join(tensors)}"

    def parts(
        self, rows: Float[Tensor, "n D"], labels: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]] | None:
        """See `Head`: of the cross-entropy of the class logits, whatever the loss makes of them."""
        known = labels != self.config.ignore_index
        return label_parts(self.rows_for_scores(rows[known]), labels[known], self.problem())

    def close(self) -> None:
        """End the thread that rebuilds an index of class weights, if there is one."""
        self._participants.close()

    def shard_tensors(self) -> dict[str, Tensor]:
        """Weights and optimizer state by name; entries of dimension 0 of size c are rows of
        classes.
        """
        tensors = {name: parameter.detach() for name, parameter in self.named_parameters()}
        tensors |= dict(self.named_buffers())
        return tensors | self.optimizer.tensors()

    def load_shard_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `shard_tensors`, for the same partition."""
        with torch.no_grad():
            for name, own in (*self.named_parameters(), *self.named_buffers()):
                own.copy_(tensors[name])
        self.optimizer.load_tensors({name: value for name, value in tensors.items() if "|" in name})
