"""From a configuration to the head's shape, its backend, and what both cost on a machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_dml.config import Config
from dist_dml.data.index import load_index
from dist_dml.errors import UsageError
from dist_dml.losses.objectives import build_objective
from dist_dml.losses.softmax import RowLoss, softmax_form
from dist_dml.parallel.backend_costs import BACKENDS, Backend
from dist_dml.parallel.cost import HeadShape, SweepCost, SweepPlan, sweep_cost
from dist_dml.parallel.head_memory import MemoryItem, memory_of
from dist_dml.parallel.machine import Machine, split_pays
from dist_dml.parallel.sweep_choice import choose_sweep


@dataclass(frozen=True)
class HeadEstimate:
    """One worker's share of the head."""

    shape: HeadShape
    backend: Backend
    plan: SweepPlan
    cost: SweepCost
    memory: list[MemoryItem]


def num_classes_of(config: Config, asked: int) -> int:
    """C: what was asked for, the configuration's, or the data set's.

    Raises:
        UsageError: if none of them says.
    """
    if asked < 0:
        raise UsageError(f"--classes={asked} is no number of classes; give 1 or more")
    if asked or config.data.num_classes:
        return asked or config.data.num_classes
    if not config.data.path:
        raise UsageError(
            "data.num_classes=0 and data.path is empty, so nothing says how many classes there "
            "are; give --classes C, data.num_classes=C or data.path"
        )
    try:
        return load_index(config.data.path).num_classes
    except UsageError as error:
        raise UsageError(f"{error}; or say how many classes with --classes C") from None


def shape_of(
    config: Config, num_classes: int, workers: int, embedding_dim: int
) -> tuple[HeadShape, bool]:
    """The head's shape, and whether its loss is of softmax form, which kernels need.

    Raises:
        UsageError: if there are fewer classes than workers or rows than micro-batches of them.
    """
    if not 1 <= workers <= num_classes:
        raise UsageError(
            f"--workers={workers} does not fit {num_classes} classes: each worker owns one or more"
        )
    if workers * config.training.accumulate > config.data.batch_size:
        raise UsageError(
            f"data.batch_size={config.data.batch_size} is too small for {workers} workers with "
            f"training.accumulate={config.training.accumulate}: each needs a row of every "
            "micro-batch; raise it"
        )
    # What the loss holds does not depend on the number of classes.
    objective = build_objective(config.loss, 2, slice(0, 2), torch.ones(2, dtype=torch.int64))
    loss, classes = objective.loss, config.classes
    kind = config.optimizer.name if classes.optimizer == "same" else classes.optimizer
    share = 1.0
    if classes.sample == "random":
        share = classes.sample_rate
    elif classes.sample == "neighbours":
        share = min(1.0, config.data.batch_size * classes.num_neighbours / num_classes)
    row_loss = isinstance(loss, RowLoss)
    shape = HeadShape(
        num_classes,
        embedding_dim,
        config.data.batch_size,
        workers,
        config.training.accumulate,
        centres=objective.centres,
        operand_dtype="bfloat16" if config.loss.tile_dtype == "bfloat16" else "float32",
        weight_dtype=classes.weight_dtype,
        state_dtype=classes.state_dtype,
        optimizer=kind,
        momentum=config.optimizer.momentum > 0,
        kahan=classes.weight_dtype == "bfloat16" and classes.rounding == "kahan",
        bias=objective.bias is not None,
        active_share=share,
        row_numbers=loss.row_numbers if isinstance(loss, RowLoss) else 6,
        buffers=loss.buffers,
        refined=isinstance(loss, RowLoss) and loss.refined,
    )
    return shape, row_loss and softmax_form(loss) is not None


def backend_of(config: Config, machine: Machine, has_softmax_form: bool) -> Backend:
    """Whom `classes.backend` means: `auto` takes the native kernels on a CPU where they apply.

    Raises:
        UsageError: for kernels that do not fit the machine or the loss.
    """
    name = config.classes.backend
    if name == "auto":
        native = machine.device == "cpu" and has_softmax_form
        return BACKENDS["native" if native else "torch"]
    fits = {"torch": ("cpu", "cuda"), "native": ("cpu",), "triton": ("cuda",)}[name]
    if machine.device not in fits or not (name == "torch" or has_softmax_form):
        reason = (
            f"--machine={machine.name}" if has_softmax_form else f"loss.name={config.loss.name}"
        )
        raise UsageError(f"classes.backend={name} does not run with {reason}; set it to auto")
    return BACKENDS[name]


def estimate_head(
    config: Config, shape: HeadShape, machine: Machine, backend: Backend
) -> HeadEstimate:
    """The head's sweeps, cost and memory.

    Raises:
        UsageError: if no sweep fits `loss.tile_mebibytes`.
    """
    classes, own = config.classes, -(-shape.num_classes // shape.workers)
    asked = config.loss.tile_dtype
    may_split = asked == "bfloat16x3" and machine.gemm["bfloat16"] > machine.gemm["float32"]
    if asked == "float32":
        may_split = split_pays(machine, own, shape.embedding_dim)
    if backend is BACKENDS["native"] and may_split:
        machine = machine.with_split_products()
    plan = choose_sweep(
        shape,
        machine,
        config.loss.tile_mebibytes * 2**20,
        backend,
        classes.sweep,
        classes.tile_classes,
        classes.row_chunk,
    )
    cost = sweep_cost(shape, machine, plan, backend)
    return HeadEstimate(shape, backend, plan, cost, memory_of(shape, plan, backend))
