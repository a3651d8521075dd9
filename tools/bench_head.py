"""Time, memory and error of the class-parallel head against its peers, side by side, with verdicts.

    python tools/bench_head.py [--quick] [--json FILE] [--figures FOLDER]

A step is the loss of R rows against C classes, the gradients of rows and weights, and SGD with
momentum on the weights. One run measures:

- main: this project (each backend, sweep and dtype) against plain PyTorch, its fused function and a
  model of Partial FC, and against the machine's own rates, all in turns;
- scaling: time per class and extra memory over C;
- workers: two workers of one thread against one of two;
- figures: smaller sizes for the plots (with --figures);
- gpu: the rows that need a GPU, where there is one.

It ends with a verdict for every goal of the class-parallel step. docs/performance.md says how to
read the tables. Figures are medians with quartiles; every ratio is taken within a repetition.

Dimensions: R rows, C classes, D features.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Run by path: this folder holds the other modules of the benchmark.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from bench_head_compare import Comparison, compare, measure_errors, measure_memory
from bench_head_crew import work
from bench_head_figures import SHOWN, write_figures
from bench_head_gpu import gpu_verdicts, measure_gpu, train_largest
from bench_head_measure import clock, extra_bytes, extra_bytes_in_own_process, report_progress
from bench_head_peers import PEERS
from bench_head_report import (
    has_bf16_units,
    load_warning,
    machine,
    machine_line,
    rates_of,
    rows_of,
    scaling_table,
    table,
    verdict_lines,
    verdict_objects,
    workers_table,
)
from bench_head_scaling import (
    Scaling,
    Workers,
    measure_scaling,
    measure_workers,
    scaling_sizes,
)
from bench_head_variants import EXTRAS, Size, project_variants
from bench_head_verdicts import cpu_verdicts

from dist_dml.errors import RunError, UsageError

PARTS = ("main", "scaling", "workers", "figures", "gpu")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Plan:
    """Sizes and repetitions of a run."""

    size: Size
    repeats: int
    scaling_counts: tuple[int, ...]
    scaling_repeats: int
    worker_repeats: int
    figure_counts: tuple[int, ...]
    figure_dims: tuple[int, ...]
    figure_count: int
    figure_repeats: int
    rate_seconds: float


FULL = Plan(
    size=Size(1_000_000, 128, 256),
    repeats=9,
    scaling_counts=(100_000, 300_000, 1_000_000, 4_000_000),
    scaling_repeats=7,
    worker_repeats=9,
    figure_counts=(10_000, 30_000, 100_000, 300_000, 1_000_000),
    figure_dims=(32, 64, 128, 256, 512),
    figure_count=100_000,
    figure_repeats=3,
    rate_seconds=0.2,
)
QUICK = Plan(
    size=Size(20_000, 32, 64),
    repeats=3,
    scaling_counts=(10_000, 40_000),
    scaling_repeats=3,
    worker_repeats=3,
    figure_counts=(5_000, 20_000),
    figure_dims=(16, 32),
    figure_count=5_000,
    figure_repeats=2,
    rate_seconds=0.01,
)


@dataclass
class Found:
    """What a run has measured so far."""

    main: Comparison | None = None
    scaling: list[Scaling] = field(default_factory=list)
    workers: list[Workers] = field(default_factory=list)
    others: list[Comparison] = field(default_factory=list)
    gpu: list[Comparison] = field(default_factory=list)


def measure_main(plan: Plan, arguments: argparse.Namespace) -> Comparison:
    """The main table."""
    known = [*PEERS, *project_variants(CPU, tuple(arguments.also))]
    wanted = arguments.only or [""]
    names = [name for name in known if any(text.lower() in name.lower() for text in wanted)]
    if not names:
        raise UsageError(f"--only {' '.join(wanted)}: no such variant; known: {', '.join(known)}")
    comparison = compare(names, plan.size, CPU, plan.repeats, plan.rate_seconds)
    measure_errors(comparison)
    measure_memory(comparison, together=arguments.quick)
    return comparison


def measure_figures(
    plan: Plan, folder: Path, together: bool, known: Comparison | None
) -> list[Comparison]:
    """Smaller comparisons over C and over D, their memory, and the plots.

    Args:
        known: the main comparison, which is not measured a second time where it has all that is
            shown.
    """
    over_classes = scaling_sizes(plan.size, plan.figure_counts)
    middle = replace(plan.size, num_classes=plan.figure_count)
    over_dims = [replace(middle, embedding_dim=dim) for dim in plan.figure_dims]
    sizes = list(dict.fromkeys([*over_classes, *over_dims]))
    reused = {known.size: known} if known is not None and set(SHOWN) <= set(known.times) else {}
    sizes = [size for size in sizes if size not in reused]
    found = {
        size: compare(SHOWN, size, CPU, plan.figure_repeats, plan.rate_seconds) for size in sizes
    }
    for group in [SHOWN] if together else [[name] for name in SHOWN]:
        for name, extras in extra_bytes_in_own_process(group, sizes).items():
            for size, extra in zip(sizes, extras, strict=True):
                found[size].extra[name] = extra
            report_progress(f"  memory of {name} over {len(sizes)} sizes: done")
    drawn = found | reused
    paths = write_figures([drawn[s] for s in over_classes], [drawn[s] for s in over_dims], folder)
    print(f"figures: {', '.join(map(str, paths))}\n", flush=True)
    return list(found.values())


def run(arguments: argparse.Namespace) -> int:
    """Measure part by part, print as it goes, write JSON after every part."""
    started = time.perf_counter()
    plan = plan_of(arguments)
    parts = [part for part in arguments.parts or PARTS if part != "figures" or arguments.figures]
    gpu = torch.device("cuda", 0) if torch.cuda.is_available() and "gpu" in parts else None
    where, found, trainings = machine(gpu or CPU), Found(), []
    print(machine_line(where), load_warning(where), sep="\n", flush=True)
    for number, part in enumerate(parts):
        spent = clock(time.perf_counter() - started)
        report_progress(f"part {number + 1} of {len(parts)}: {part}, after {spent}")
        if part == "main":
            found.main = measure_main(plan, arguments)
            print(table(found.main), end="\n\n", flush=True)
        elif part == "scaling":
            sizes = scaling_sizes(plan.size, plan.scaling_counts)
            found.scaling = measure_scaling(sizes, CPU, plan.scaling_repeats, arguments.quick)
            print(scaling_table(found.scaling), end="\n\n", flush=True)
        elif part == "workers":
            found.workers = measure_workers(plan.size, 2, plan.worker_repeats)
            print(workers_table(found.workers), end="\n\n", flush=True)
        elif part == "figures":
            found.others = measure_figures(plan, arguments.figures, arguments.quick, found.main)
        elif gpu is not None:
            found.gpu = measure_gpu(gpu, plan.repeats)
            for comparison in found.gpu:
                print(table(comparison), end="\n\n", flush=True)
            trainings = train_largest(gpu)
        if arguments.json and part != parts[-1]:
            write_json(arguments.json, where, found, [], started)
    units = has_bf16_units(where)
    verdicts = cpu_verdicts(found.main, found.scaling, found.workers, units)
    verdicts += gpu_verdicts(found.gpu, trainings)
    print(verdict_lines(verdicts), load_warning(where), sep="\n", flush=True)
    if arguments.json:
        write_json(arguments.json, where, found, verdict_objects(verdicts), started)
    report_progress(f"done after {clock(time.perf_counter() - started)}")
    return 0


def plan_of(arguments: argparse.Namespace) -> Plan:
    """The sizes that were asked for."""
    plan = QUICK if arguments.quick else FULL
    size = Size(
        arguments.classes or plan.size.num_classes,
        arguments.dim or plan.size.embedding_dim,
        arguments.rows or plan.size.rows,
    )
    return replace(plan, size=size, repeats=arguments.repeats or plan.repeats)


def write_json(
    path: Path,
    where: dict[str, Any],
    found: Found,
    verdicts: Sequence[dict[str, Any]],
    started: float,
) -> None:
    """Everything, also what a table leaves out."""
    comparisons = [*([found.main] if found.main else []), *found.others, *found.gpu]
    content = {
        "tool": "bench_head",
        "machine": where,
        "elapsed_seconds": time.perf_counter() - started,
        "rows": [row for comparison in comparisons for row in rows_of(comparison, where)],
        "rates": [rates_of(comparison) for comparison in comparisons],
        "scaling": [asdict(one) for one in found.scaling],
        "workers": [asdict(one) for one in found.workers],
        "verdicts": list(verdicts),
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def be_child(request: dict[str, Any]) -> int:
    """What a process does that this tool has started."""
    if request["task"] == "worker":
        work(request)
        return 0
    sizes = [Size(**size) for size in request["sizes"]]
    found = {name: [extra_bytes(name, size, CPU) for size in sizes] for name in request["names"]}
    print(json.dumps(found))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    found.add_argument("--figures", type=Path, metavar="FOLDER", help="also draw time and memory")
    found.add_argument("--quick", action="store_true", help="tiny sizes, under a minute")
    found.add_argument("--parts", nargs="+", choices=PARTS, help="only these parts (default all)")
    found.add_argument("--only", nargs="+", metavar="TEXT", help="main: variants containing these")
    found.add_argument("--also", nargs="+", choices=tuple(EXTRAS), default=[], help="main: more")
    found.add_argument("--classes", type=int, help=f"C (default {FULL.size.num_classes:,})")
    found.add_argument("--dim", type=int, help=f"D (default {FULL.size.embedding_dim})")
    found.add_argument("--rows", type=int, help=f"R (default {FULL.size.rows})")
    found.add_argument("--repeats", type=int, help=f"of main (default {FULL.repeats})")
    found.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print, write."""
    found = parser()
    arguments = found.parse_args(argv)
    if arguments.child:
        return be_child(arguments.child)
    for name in ("classes", "dim", "rows", "repeats"):
        value, least = getattr(arguments, name), 2 if name == "repeats" else 1
        if value is not None and value < least:
            found.error(f"--{name}={value}: must be {least} or more")
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        found.error(f"--json={arguments.json}: its folder does not exist")
    try:
        return run(arguments)
    except (UsageError, RunError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    sys.exit(main())
