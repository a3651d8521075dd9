"""`dist-dml estimate --validate`: the cost model against real steps of the head on this CPU.

The rates are measured between the steps, in the same seconds. With one thread both are counted in
processor time, which other programs on the machine disturb less.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dist_dml.class_config import ClassesConfig
from dist_dml.config import OptimizerConfig
from dist_dml.loss_config import LossConfig
from dist_dml.parallel.backend_costs import BACKENDS
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.classifier import ClassParallelClassifier
from dist_dml.parallel.cost import HeadShape, sweep_cost
from dist_dml.parallel.machine import DtypeName, Machine
from dist_dml.parallel.machine_rates import Clock, measure_machine
from dist_dml.parallel.sweep_choice import choose_sweep

# (C, D, R): enough classes that the weights leave the caches, few enough for seconds.
SIZES = ((100_000, 128, 128), (300_000, 128, 128), (100_000, 256, 256))
_REPEATS = 5


@dataclass(frozen=True)
class _Case:
    """One head, its data and its measured steps."""

    size: tuple[int, int, int]
    dtype: DtypeName
    backend: str
    sweep: Literal["keep", "recompute"]
    classifier: ClassParallelClassifier
    rows: Tensor
    labels: Tensor
    seconds: list[float]

    def step(self, clock: Clock) -> float:
        """Time of loss, gradients and update."""
        rows = self.rows.clone().requires_grad_()
        started = clock()
        output = self.classifier(rows, self.labels, (len(rows),), len(rows), factor=1.0)
        output.loss.backward()
        return clock() - started


def validate(threads: int) -> tuple[list[dict[str, Any]], str]:
    """Run a few seconds of real steps. Rows for JSON, and a table with the relative errors."""
    clock = time.process_time if threads == 1 else time.perf_counter
    cases = [case for name in ("torch", "native") for case in _cases(name)]
    for case in cases:
        case.step(clock)  # Allocates state; the native kernels are built by the first one.
    device = torch.device("cpu")
    for _ in range(_REPEATS):
        for case in cases:
            case.seconds.append(case.step(clock))
    rates = {
        (rows, width): measure_machine(device, threads, tile=(rows, 4096, width), clock=clock)
        for _, width, rows in SIZES
    }
    found = [_compared(case, rates[case.size[2], case.size[1]]) for case in cases]
    return found, _table(found, threads)


def _cases(backend: Literal["torch", "native"]) -> list[_Case]:
    """All sizes and dtypes; none for native kernels that this machine cannot have."""
    cases = []
    for size in SIZES:
        for dtype in ("float32", "bfloat16"):
            for sweep in ("recompute", "keep") if size == SIZES[0] else ("recompute",):
                case = _case(size, dtype, backend, sweep)
                if (case.classifier.backend is None) == (backend == "torch"):
                    cases.append(case)
    return cases


def _case(
    size: tuple[int, int, int],
    dtype: DtypeName,
    backend: Literal["torch", "native"],
    sweep: Literal["keep", "recompute"],
) -> _Case:
    num_classes, width, num_rows = size
    loss = LossConfig(init_std=0.1, tile_dtype=dtype)
    # `auto` is native where it can be, and no error where not.
    classes = ClassesConfig(backend="torch" if backend == "torch" else "auto", sweep=sweep)
    partition = ClassPartition.of_worker(0, 1, num_classes)
    classifier = ClassParallelClassifier(
        width, partition, loss, OptimizerConfig(name="sgd"), 0, num_rows, classes=classes
    )
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(num_rows, width, generator=generator)
    labels = torch.randint(0, num_classes, (num_rows,), generator=generator)
    return _Case(size, dtype, backend, sweep, classifier, rows, labels, [])


def _compared(case: _Case, machine: Machine) -> dict[str, Any]:
    """One row: measured and predicted seconds."""
    num_classes, width, num_rows = case.size
    shape = HeadShape(num_classes, width, num_rows, operand_dtype=case.dtype, bias=True)
    machine = machine.with_split_products() if case.classifier.split else machine
    backend, plan = BACKENDS[case.backend], case.classifier.plan
    if plan.tile_classes == 0:  # The backend chooses; what the model thinks that it chooses.
        plan = choose_sweep(shape, machine, case.classifier.tile_bytes, backend, case.sweep)
    cost = sweep_cost(shape, machine, plan, backend)
    measured = statistics.median(case.seconds)
    return {
        "name": "estimate",
        "variant": f"{case.backend}, {case.sweep}",
        "config": {
            "num_classes": num_classes,
            "embedding_dim": width,
            "rows": num_rows,
            "dtype": case.dtype,
            "tile_classes": plan.tile_classes,
        },
        "seconds_median": measured,
        "seconds_spread": max(case.seconds) - min(case.seconds),
        "predicted": cost.total_seconds,
        "parts": cost.seconds,
        "error": cost.total_seconds / measured - 1,
        "gemm": dict(machine.gemm),
    }


def _table(found: list[dict[str, Any]], threads: int) -> str:
    """Markdown: a row a case, and the errors of each backend and dtype."""
    lines = [
        f"Predicted against measured, {threads} of {os.cpu_count()} cores, torch "
        f"{torch.__version__}, {time.strftime('%Y-%m-%d')}; SGD with momentum, in place",
        "",
        "| backend, sweep | dtype | C | D | R | measured ms (spread) | predicted ms | error |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    errors: dict[str, list[float]] = {}
    for row in found:
        config = row["config"]
        errors.setdefault(f"{row['variant'].split(',')[0]} {config['dtype']}", []).append(
            row["error"]
        )
        lines.append(
            f"| {row['variant']} | {config['dtype']} | {config['num_classes']:,} "
            f"| {config['embedding_dim']} | {config['rows']} | {row['seconds_median'] * 1e3:.1f} "
            f"({row['seconds_spread'] * 1e3:.1f}) | {row['predicted'] * 1e3:.1f} "
            f"| {row['error']:+.0%} |"
        )
    lines.append("")
    for name, values in errors.items():
        lines.append(f"{name}: {min(values):+.0%} to {max(values):+.0%}")
    return "\n".join(lines)
