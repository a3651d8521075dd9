"""Plots of `bench_head`: time, ratio to the project and memory over C and over D.

Dimensions: R rows, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench_head_compare import Comparison
from bench_head_peers import PEERS, PLAIN, PUBLISHED, SAMPLED
from bench_head_variants import DEFAULTS

CHUNKED = "F.linear_cross_entropy, 128-row chunks"
SHOWN = (PLAIN, CHUNKED, PUBLISHED, SAMPLED, *(v.name for v in DEFAULTS.values()))
# Paul Tol's bright scheme, distinguishable with colour-blind eyes; the project is drawn thicker.
_COLOURS = ("#BBBBBB", "#66CCEE", "#CCBB44", "#228833", "#4477AA", "#EE6677")
_MARKERS = ("s", "D", "^", "v", "o", "o")

Value = Callable[[Comparison, str], float | None]


def write_figures(
    over_classes: Sequence[Comparison], over_dims: Sequence[Comparison], folder: Path
) -> list[Path]:
    """`head_time.png` and `head_memory.png` in `folder`.

    Args:
        over_classes: comparisons of one D and several C.
        over_dims: comparisons of one C and several D.
        folder: made where it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ours = DEFAULTS["float32"].name
    times: list[tuple[str, Value]] = [
        ("milliseconds a step", lambda c, name: c.seconds(name).median * 1e3),
        (f"time over that of {ours}", lambda c, name: c.over(name, ours).median),
    ]
    memory: list[tuple[str, Value]] = [("MiB beyond weights and momentum", _extra_mebibytes)]
    found = []
    for name, panels in (("head_time.png", times), ("head_memory.png", memory)):
        path = folder / name
        _draw(over_classes, over_dims, panels, path)
        found.append(path)
    return found


def _extra_mebibytes(comparison: Comparison, name: str) -> float | None:
    extra = comparison.extra.get(name)
    return None if extra is None else max(extra / 2**20, 0.1)


def _draw(
    over_classes: Sequence[Comparison],
    over_dims: Sequence[Comparison],
    panels: Sequence[tuple[str, Value]],
    path: Path,
) -> None:
    """One row of two plots for each of `panels`, and one legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(10.0, 3.6 * len(panels) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 2, sharey="row", squeeze=False)
    sweeps = (
        (over_classes, "number of classes C", lambda c: c.size.num_classes),
        (over_dims, "embedding dimension D", lambda c: c.size.embedding_dim),
    )
    for row, (label, value) in enumerate(panels):
        for column, (comparisons, axis_label, position) in enumerate(sweeps):
            axis = axes[row][column]
            _draw_lines(axis, comparisons, position, value)
            axis.set_xscale("log")
            axis.set_yscale("log")
            ticks = [position(comparison) for comparison in comparisons]
            axis.set_xticks(ticks, [_short(tick) for tick in ticks])
            axis.minorticks_off()
            axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
            axis.grid(True, color="#DDDDDD", linewidth=0.6)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
            if comparisons:
                axis.set_title(_fixed(comparisons[0], column), fontsize=10)
            if row == len(panels) - 1:
                axis.set_xlabel(axis_label)
        axes[row][0].set_ylabel(label)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def _fixed(comparison: Comparison, column: int) -> str:
    size = comparison.size
    what = f"D = {size.embedding_dim}" if column == 0 else f"C = {size.num_classes:,}"
    return f"{what}, R = {size.rows}, {comparison.device.type}"


def _draw_lines(
    axis: Any,
    comparisons: Sequence[Comparison],
    position: Callable[[Comparison], int],
    value: Value,
) -> None:
    wide = DEFAULTS["float32"].name  # Seen on both sides of the other where the two coincide.
    for name, colour, marker in zip(SHOWN, _COLOURS, _MARKERS, strict=True):
        known = [c for c in comparisons if name in c.times]
        points = [(position(c), value(c, name)) for c in known]
        points = [(x, y) for x, y in points if y is not None]
        if not points:
            continue
        axis.plot(
            *zip(*points, strict=True),
            label=name,
            color=colour,
            marker=marker,
            markersize=4 if name != wide else 6,
            linewidth=1.4 if name in PEERS else 2.0 if name != wide else 4.0,
            zorder=2 if name in PEERS else 3,
        )


def _short(count: int) -> str:
    """10k, 1M."""
    for unit, factor in (("M", 10**6), ("k", 10**3)):
        if count >= factor:
            return f"{count / factor:g}{unit}"
    return str(count)
