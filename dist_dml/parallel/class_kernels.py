"""A class-parallel step on a backend of kernels, for losses of softmax form.

The kernels' sums become the loss's statistics, its rule becomes their coefficients; between the two
stands the agreement of the workers (`class_parallel`).

Dimensions: R rows of all workers, N of all micro-batches, n classes of this worker that take part,
D features, k statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_dml.losses.softmax import (
    SoftmaxForm,
    TileTarget,
    softmax_form,
    statistics_of_no_class,
)
from dist_dml.parallel.class_problem import ClassParallelProblem, RowBatch
from dist_dml.parallel.class_sweeps import (
    SMALLEST_NORM,
    GradientTarget,
    KernelClasses,
    RowCoefficients,
    UpdateTarget,
    row_gradient_of_pull,
)
from dist_dml.parallel.sampling import ActiveClasses, columns_of

# Rows of weights whose sum is taken at a time.
_SUMMED_ROWS = 65_536


@dataclass(frozen=True)
class KernelForward:
    """What the forward sweep leaves for the backward one.

    Attributes:
        statistics: (k, R) of this worker's classes.
        rival: (R,) largest logit of another of its classes; `pull` as in `SoftmaxSums`.
        columns: places of the labels among its classes, -1 elsewhere.
        classes: as the kernels take them.
        own: where the labels lie among all of this worker's classes.
        kept: logits, in the backend's own layout.
    """

    statistics: Float[Tensor, "k R"]
    rival: Float[Tensor, " R"]
    pull: Float[Tensor, "R D"] | None
    columns: Int[Tensor, " R"]
    classes: KernelClasses
    own: TileTarget
    kept: Tensor | None


@dataclass(frozen=True)
class _KernelBatch:
    """A micro-batch that waits for the last one."""

    rows: Tensor
    columns: Tensor
    coefficients: RowCoefficients
    finite: Tensor


def forward_by_kernels(
    rows: Float[Tensor, "R D"],
    labels: Int[Tensor, " R"],
    problem: ClassParallelProblem,
    with_gradient: bool,
) -> KernelForward:
    """The forward sweep over this worker's classes: 2*R*n*D operations, or 4 with a pull."""
    backend, form, partition = problem.backend, _form(problem), problem.partition
    assert backend is not None
    own = TileTarget.of(labels, partition.start, partition.stop, partition.start)
    classes = _classes(problem, form)
    if classes.active is None:
        columns = torch.where(own.present, own.column, -1)
    else:
        columns = columns_of(labels, ActiveClasses(classes.active), partition)
    if classes.num_classes == 0:  # Only of sampled classes there may be none.
        nothing = statistics_of_no_class(form, labels, rows.dtype)
        pull = torch.zeros_like(rows)
        return KernelForward(nothing, nothing[0] * 0, pull, columns, classes, own, None)
    sums = backend.forward(
        rows,
        columns,
        classes,
        form.needs_gap,
        with_gradient and backend.pulls,
        problem.sweep == "keep" and with_gradient,
    )
    statistics = form.statistics_of_sums(
        sums.label, sums.rival, sums.mass, sums.gap, own, classes.num_classes
    )
    return KernelForward(statistics, sums.rival, sums.pull, columns, classes, own, sums.kept)


def _form(problem: ClassParallelProblem) -> SoftmaxForm:
    form = softmax_form(problem.loss)
    assert form is not None, "only losses of softmax form run on kernels"
    return form


def _classes(problem: ClassParallelProblem, form: SoftmaxForm) -> KernelClasses:
    """The shard, with all that is added to its logits in one vector."""
    shard = problem.shard
    parts = [
        part if shard.active is None else part[shard.active]
        for part in (shard.bias, form.logit_shift)
        if part is not None
    ]
    if shard.correction is not None:
        parts.append(shard.correction)
    bias = None if not parts else torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
    return KernelClasses(
        shard.weight,
        None if bias is None else bias.contiguous(),
        shard.scale,
        shard.active,
        shard.tile_dtype or torch.float32,
        shard.split,
        problem.tile_classes,
        problem.row_chunk,
        problem.filter_below,
        shard.bias is not None,
    )


def weights_by_kernels(
    batch: RowBatch,
    statistics: Float[Tensor, "k R"],
    kernels: KernelForward,
    problem: ClassParallelProblem,
    send: Callable[[Float[Tensor, "R D"]], None],
) -> None:
    """The backward sweep: fills `problem.target` with the gradient of this and all earlier batches
    of the step; without a target the batch joins those.

    Args:
        batch: the rows.
        statistics: of all workers.
        kernels: of the forward sweep.
        problem: the problem.
        send: takes this worker's part of the rows' gradient as soon as it is known: before the
            weights are swept, where the backend pulls.
    """
    backend, memory = problem.backend, problem.memory
    assert backend is not None
    if kernels.classes.num_classes == 0:
        assert kernels.pull is not None
        memory.finite, memory.bias_gradient = batch.finite, None
        send(kernels.pull)
        return
    rule = _form(problem).row_rule(statistics, kernels.own, batch.upstream)
    coefficients = RowCoefficients(*rule)
    if kernels.pull is not None:
        total = _pull_of_all(kernels.classes) if _form(problem).needs_gap else None
        send(
            row_gradient_of_pull(
                kernels.pull,
                kernels.columns,
                kernels.rival,
                coefficients,
                kernels.classes,
                None if total is None else lambda: total,
            )
        )
    own = _KernelBatch(batch.rows, kernels.columns, coefficients, batch.finite)
    if problem.target is None:
        memory.batches.append(own)
        if kernels.pull is None:
            _sweep([own], kernels, problem, len(batch.rows), None, send)
        return
    batches = [*memory.batches, own]
    memory.batches.clear()
    target = problem.target
    memory.finite = torch.stack([one.finite for one in batches]).all()
    if isinstance(target, UpdateTarget):
        target = replace(target, apply=target.apply & memory.finite)
    num_pulled = 0 if kernels.pull is not None else len(batch.rows)
    _sweep(batches, kernels, problem, num_pulled, target, send)


def _sweep(
    batches: Sequence[_KernelBatch],
    kernels: KernelForward,
    problem: ClassParallelProblem,
    num_pulled: int,
    target: GradientTarget | UpdateTarget | None,
    send: Callable[[Tensor], None],
) -> None:
    assert problem.backend is not None
    of_batches = [one.coefficients for one in batches]
    report = problem.backend.backward(
        torch.cat([one.rows for one in batches]),
        torch.cat([one.columns for one in batches]),
        RowCoefficients(*(torch.cat(parts) for parts in zip(*of_batches, strict=True))),
        kernels.classes,
        num_pulled,
        kernels.kept if len(batches) == 1 else None,
        target,
    )
    if report.row_gradient is not None and num_pulled:
        send(report.row_gradient)
    if target is None:
        return
    memory = problem.memory
    memory.filtered_classes, memory.filtered_mass = report.filtered_classes, report.filtered_mass
    memory.bias_gradient = report.bias_gradient if problem.shard.bias is not None else None


def _pull_of_all(classes: KernelClasses) -> Float[Tensor, " D"]:
    """sum_j f_j w_j over the classes that take part."""
    total = torch.zeros(classes.weight.shape[1], device=classes.weight.device)
    for start in range(0, classes.num_classes, _SUMMED_ROWS):
        rows = slice(start, start + _SUMMED_ROWS)
        own = classes.weight[rows if classes.active is None else classes.active[rows]].float()
        if classes.scale is None:
            total += own.sum(0)
        else:
            norms = torch.linalg.vector_norm(own, dim=1).clamp_min(SMALLEST_NORM)
            total += (classes.scale / norms) @ own
    return total
