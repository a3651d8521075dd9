"""`dist-dml estimate --table` and `--figure`: very many classes on paper, with a ResNet-50.

Dimensions: C classes, D features, R rows of the batch, W GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_dml.parallel.backend_costs import BACKENDS, Backend
from dist_dml.parallel.cost import HeadShape, sweep_cost
from dist_dml.parallel.head_memory import USABLE, largest_num_classes, memory_of, total_bytes
from dist_dml.parallel.machine import DtypeName, Machine
from dist_dml.parallel.sweep_choice import choose_sweep

CLASSES = (10_000_000, 100_000_000, 1_000_000_000)
WIDTHS = (128, 512)
WORKERS = (8, 64, 512)
ROWS_OF_A_WORKER = 128
# Training cost of an image: three times the 6.3 GFLOP that InsightFace states for the forward of
# its ResNet-50 on 112 x 112 pixels (timm's at 224 x 224 takes 24.3, as `dist-dml estimate` counts).
EMBEDDER_FLOPS = 19e9
# Its memory: 25M float32 parameters with gradient and momentum, 128 images of 65 MiB saved for the
# backward under bfloat16 autocast (counted for timm:resnet50 at 224 x 224).
EMBEDDER_BYTES = 25e6 * 12 + 128 * 65 * 2**20
BUDGET_BYTES = 2**30
_GIB = 2**30
_STYLES: tuple[tuple[DtypeName, str], ...] = (("bfloat16", "-"), ("float32", "--"))


@dataclass(frozen=True)
class PaperRow:
    """One cell of the table: a head and its embedder on W GPUs."""

    num_classes: int
    embedding_dim: int
    workers: int
    rows: int
    gibibytes: float
    gibibytes_float32: float
    fits: bool
    workers_needed: int
    workers_needed_float32: int
    head_seconds: float
    embedder_seconds: float
    images_per_second: float
    binds: str


def shape_on_paper(
    num_classes: int, width: int, workers: int, dtype: DtypeName = "bfloat16"
) -> HeadShape:
    """Exact cross-entropy with momentum, bfloat16 products; weights and momentum of `dtype`."""
    return HeadShape(
        num_classes,
        width,
        ROWS_OF_A_WORKER * workers,
        workers,
        operand_dtype="bfloat16",
        weight_dtype=dtype,
        state_dtype=dtype,
    )


def _backend(machine: Machine) -> Backend:
    return BACKENDS["triton" if machine.device == "cuda" else "native"]


def memory_on_paper(shape: HeadShape, machine: Machine) -> float:
    """Bytes of a worker, embedder included."""
    plan = choose_sweep(shape, machine, BUDGET_BYTES, _backend(machine))
    return total_bytes(memory_of(shape, plan, _backend(machine))) + EMBEDDER_BYTES


def workers_needed(num_classes: int, width: int, dtype: DtypeName, machine: Machine) -> int:
    """The fewest workers that hold so many classes, 128 rows each."""
    low, high = 0, 1

    def fits(workers: int) -> bool:
        shape = shape_on_paper(num_classes, width, workers, dtype)
        return memory_on_paper(shape, machine) <= USABLE * machine.memory_bytes

    while not fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def paper_row(
    num_classes: int, width: int, workers: int, machine: Machine, network_share: float
) -> PaperRow:
    """What the model says; times also where the memory does not suffice."""
    shape = shape_on_paper(num_classes, width, workers)
    plan = choose_sweep(shape, machine, BUDGET_BYTES, _backend(machine))
    cost = sweep_cost(shape, machine, plan, _backend(machine))
    size = memory_on_paper(shape, machine)
    wide = memory_on_paper(shape_on_paper(num_classes, width, workers, "float32"), machine)
    computing = ROWS_OF_A_WORKER * EMBEDDER_FLOPS / (machine.gemm["bfloat16"] * network_share)
    return PaperRow(
        num_classes,
        width,
        workers,
        shape.rows,
        size / _GIB,
        wide / _GIB,
        size <= USABLE * machine.memory_bytes,
        workers_needed(num_classes, width, "bfloat16", machine),
        workers_needed(num_classes, width, "float32", machine),
        cost.total_seconds,
        computing,
        shape.rows / (cost.total_seconds + computing),
        cost.binds,
    )


def table(machine: Machine, network_share: float) -> tuple[list[dict[str, Any]], str]:
    """Rows for JSON, and Markdown."""
    found = [
        paper_row(num_classes, width, workers, machine, network_share)
        for width in WIDTHS
        for num_classes in CLASSES
        for workers in WORKERS
    ]
    gpu = "GPUs" if machine.device == "cuda" else "workers"
    lines = [
        f"Calculated, not measured. {machine.name} ({machine.source}), "
        f"{machine.memory_bytes / _GIB:.0f} GiB each, nodes of {machine.workers_per_node}, "
        f"{machine.inside.bandwidth / 1e9:g} GB/s inside and {machine.between.bandwidth / 1e9:g} "
        f"GB/s between them. {ROWS_OF_A_WORKER} rows a worker; exact cross-entropy with momentum, "
        f"bfloat16 products, backend {_backend(machine).name} at {_backend(machine).share:.0%} of "
        f"the GEMM rate (assumed). ResNet-50: {EMBEDDER_FLOPS / 1e9:g} GFLOP an image at "
        f"{network_share:.0%} of the GEMM rate. Weights and momentum in bfloat16; in brackets in "
        "float32.",
        "",
        f"| C | D | {gpu} | R | GiB each | {gpu} needed | head ms | embedder ms | images/s "
        "| head bound by |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in found:
        lines.append(
            f"| {row.num_classes / 1e6:,.0f}M | {row.embedding_dim} | {row.workers} "
            f"| {row.rows:,} | {row.gibibytes:.0f} ({row.gibibytes_float32:.0f}) "
            f"| {row.workers_needed} ({row.workers_needed_float32}) | "
            + (
                f"{row.head_seconds * 1e3:.1f} | {row.embedder_seconds * 1e3:.1f} "
                f"| {row.images_per_second:,.0f} | {row.binds} |"
                if row.fits
                else "does not fit | | | |"
            )
        )
    return [vars(row) for row in found], "\n".join(lines)


def draw(machine: Machine, path: Path) -> None:
    """Largest C, and the head's time at 10M and 100M classes, over the number of GPUs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    of_classes, of_time = figure.subplots(1, 2)
    counts = [2**power for power in range(10)]
    for width, colour in zip(WIDTHS, ("tab:blue", "tab:orange"), strict=True):
        for dtype, style in _STYLES:
            most = [
                largest_num_classes(
                    shape_on_paper(1, width, count, dtype), machine, BUDGET_BYTES, EMBEDDER_BYTES
                )
                for count in counts
            ]
            label = f"D = {width}, {dtype}"
            of_classes.plot(counts, most, style, color=colour, marker="o", ms=3, label=label)
        for num_classes, style in ((10_000_000, "-"), (100_000_000, "--")):
            points = [
                (count, paper_seconds(num_classes, width, count, machine) * 1e3)
                for count in counts
                if count >= workers_needed(num_classes, width, "bfloat16", machine)
            ]
            label = f"D = {width}, {num_classes / 1e6:.0f}M classes"
            of_time.plot(
                *zip(*points, strict=True), style, color=colour, marker="o", ms=3, label=label
            )
    for axes, title, unit in (
        (of_classes, "Most classes that fit (weights and momentum)", "classes"),
        (of_time, f"Head, {ROWS_OF_A_WORKER} rows a GPU, bfloat16", "ms a step"),
    ):
        axes.set(xscale="log", yscale="log", xlabel=f"{machine.name} GPUs", ylabel=unit)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_title(title, fontsize=10)
        axes.grid(True, which="major", alpha=0.4)
        axes.legend(fontsize=8)
    low, high = of_time.get_ylim()
    of_time.set_ylim(low, high * 6)  # Room for the legend.
    figure.suptitle("Calculated, not measured (docs/estimate.md)", fontsize=10)
    figure.savefig(path, dpi=120)


def paper_seconds(num_classes: int, width: int, workers: int, machine: Machine) -> float:
    """The head's time with bfloat16 weights."""
    shape = shape_on_paper(num_classes, width, workers)
    plan = choose_sweep(shape, machine, BUDGET_BYTES, _backend(machine))
    return sweep_cost(shape, machine, plan, _backend(machine)).total_seconds
