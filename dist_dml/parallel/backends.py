"""Which backend runs the sweeps of a configuration, and why not another one."""

from __future__ import annotations

from dataclasses import replace

import torch

from dist_dml.class_config import ClassesConfig
from dist_dml.errors import UsageError
from dist_dml.loss_config import LossConfig
from dist_dml.losses.proxies import ColumnLoss
from dist_dml.losses.softmax import RowLoss, softmax_form
from dist_dml.parallel.class_problem import ClassParallelProblem
from dist_dml.parallel.class_sweeps import ClassStep, KernelBackend
from dist_dml.parallel.cost import BACKENDS, HeadShape, SweepPlan
from dist_dml.parallel.machine import known_machine, split_pays
from dist_dml.parallel.sweep_choice import choose_sweep

# Rows of a chunk where row-chunked sweeps are asked for without a number.
_CHUNK_ROWS = 1024


def choose_backend(
    classes: ClassesConfig,
    config: LossConfig,
    loss: RowLoss | ColumnLoss,
    device: torch.device,
    dtype: torch.dtype,
) -> KernelBackend | None:
    """The kernels that `classes.backend` asks for, or None for torch operations.

    `auto` takes the native kernels on a CPU, where the loss has softmax form and a compiler is at
    hand, and torch operations elsewhere: the Triton kernels have not been measured on a GPU yet, so
    they have to be asked for.

    Raises:
        UsageError: if kernels are asked for and cannot be had, with the reason.
    """
    name = classes.backend
    if name == "torch":
        return _torch_only(classes, config, loss, device)
    operands = torch.bfloat16 if config.tile_dtype == "bfloat16" else torch.float32
    if name == "auto" and device.type == "cpu":
        found = _kernels("native", loss, device, dtype, operands)
        return found if not isinstance(found, str) else _torch_only(classes, config, loss, device)
    if name == "auto":
        return _torch_only(classes, config, loss, device)
    found = _kernels(name, loss, device, dtype, operands)
    if isinstance(found, str):
        raise UsageError(
            f"classes.backend={name} cannot run loss.name={config.name} here: {found}; set it to "
            "auto or torch"
        )
    return found


def splits_operands(
    config: LossConfig, backend: KernelBackend | None, num_classes: int, embedding_dim: int
) -> bool:
    """Whether products of float32 are made of three of bfloat16: asked for or faster, and had.

    Args:
        config: of the loss.
        backend: that computes the products.
        num_classes: of this worker.
        embedding_dim: D.
    """
    if backend is None or not backend.pulls:
        return False
    from dist_dml.parallel.sweep_native import NativeBackend

    if not isinstance(backend, NativeBackend) or backend.supports(torch.bfloat16):
        return False
    if config.tile_dtype == "float32":
        machine = known_machine(torch.device("cpu"), torch.get_num_threads())
        return split_pays(machine, num_classes, embedding_dim)
    return config.tile_dtype == "bfloat16x3"


def choose_plan(
    classes: ClassesConfig,
    problem: ClassParallelProblem,
    rule: ClassStep,
    max_rows: int,
    micro_batches: int,
) -> SweepPlan:
    """The sweep, tile and chunk of rows that the configuration asks for, or that cost least.

    The native kernels choose tiles and chunks by the size of a core's cache themselves.

    Args:
        classes: what is asked for.
        problem: of the classifier, without a plan.
        rule: of the class weights' update.
        max_rows: rows of a micro-batch, over all workers.
        micro_batches: of a batch.

    Raises:
        UsageError: if no tile fits `loss.tile_mebibytes`.
    """
    loss, shard, device = problem.loss, problem.shard, problem.shard.weight.device
    workers = 1 if problem.partition.group is None else problem.partition.group.size()
    shape = HeadShape(
        problem.partition.num_classes,
        shard.weight.shape[1],
        max_rows * micro_batches,
        workers,
        micro_batches,
        shard.centres,
        "float32" if shard.tile_dtype is None else "bfloat16",
        classes.weight_dtype,
        classes.state_dtype,
        rule.kind,
        rule.momentum > 0,
        classes.weight_dtype == "bfloat16" and classes.rounding == "kahan",
        shard.bias is not None,
        active_share=classes.sample_rate if classes.sample == "random" else 1.0,
        row_numbers=loss.row_numbers if isinstance(loss, RowLoss) else 6,
        buffers=loss.buffers,
        refined=isinstance(loss, RowLoss) and loss.refined,
    )
    machine = known_machine(device, torch.get_num_threads())
    if shard.split:
        machine = machine.with_split_products()
    if classes.cache_mebibytes:
        machine = replace(machine, cache_bytes=int(classes.cache_mebibytes * 2**20))
    name = "torch" if problem.backend is None else "native"
    if problem.backend is not None and device.type == "cuda":
        name = "triton"
    sweep, chunk = classes.sweep, classes.row_chunk
    if sweep == "row_chunked":
        chunk = chunk or min(_CHUNK_ROWS, -(-max_rows // 2))
        sweep = "recompute" if chunk >= max_rows else sweep  # All rows are one chunk.
        chunk = 0 if sweep == "recompute" else chunk
    plan = choose_sweep(
        shape,
        machine,
        problem.tile_bytes,
        BACKENDS[name],
        sweep,
        classes.tile_classes,
        chunk,
    )
    if name == "native":
        plan = plan._replace(tile_classes=classes.tile_classes, row_chunk=classes.row_chunk)
    return plan


def _torch_only(
    classes: ClassesConfig, config: LossConfig, loss: RowLoss | ColumnLoss, device: torch.device
) -> None:
    """Torch operations, after refusing what they do not do."""
    if classes.filter_below == 0:
        return
    if softmax_form(loss) is None or device.type != "cpu":
        raise UsageError(
            f"classes.filter_below={classes.filter_below:g} needs a loss of softmax form on "
            f"kernels or on a CPU, and loss.name={config.name} runs on torch operations on "
            f"{device.type}; set it to 0"
        )


def _kernels(
    name: str,
    loss: RowLoss | ColumnLoss,
    device: torch.device,
    dtype: torch.dtype,
    operands: torch.dtype,
) -> KernelBackend | str:
    """The kernels, or why they cannot be had."""
    if softmax_form(loss) is None:
        return "the kernels know losses of softmax form (cross-entropy and its margins) only"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the kernels compute in float32, not {dtype}"
    if name == "native":
        if device.type != "cpu":
            return f"the native kernels run on a CPU, not on {device.type}"
        from dist_dml.parallel.sweep_native import native_backend

        backend = native_backend()
        if isinstance(backend, str):
            return backend
        return backend.supports(operands) or backend
    from dist_dml.parallel.sweep_triton import triton_backend

    return triton_backend()
