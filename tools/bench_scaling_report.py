"""Table and figure of `bench_scaling`.

Dimensions: W workers, C classes, R rows of the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
TITLES = {
    "strong": "strong: C and R fixed",
    "weak": "weak: C and R grow with W",
    "weak_classes": "weak: C grows with W, R fixed",
}
_MEASURED, _PREDICTED = "#0072B2", "#D55E00"


def ideal_growth(mode: str, workers: int) -> float:
    """Time of the head on W workers over that on one, if nothing but its operations counted.

    A worker has R C / W logits: fewer as W grows (strong), W times as many where both grow (weak:
    every worker meets the rows of all), the same where C alone does.
    """
    return {"strong": 1 / workers, "weak": float(workers), "weak_classes": 1.0}[mode]


def efficiencies(rows: Sequence[Row]) -> dict[str, float]:
    """By key: the head's ideal time, from that of one worker of its mode, over the measured one.

    Threads that share a core cannot do more than the cores: where they are crowded, the ideal is
    that of the cores.
    """
    found = {}
    for mode in TITLES:
        own = {
            row["config"]["num_workers"]: row
            for row in rows
            if row["variant"] == mode and not row["error"]
        }
        if 1 not in own:
            continue
        base = own[1]["head_seconds_median"]
        for workers, row in own.items():
            ideal = base * ideal_growth(mode, workers) * row["predicted"]["crowding"]
            found[row["key"]] = ideal / row["head_seconds_median"]
    return found


def milliseconds(row: Row, key: str) -> str:
    """Median and quartile distance."""
    return f"{row[f'{key}_median'] * 1e3:.1f} ({row[f'{key}_spread'] * 1e3:.1f})"


def kibibytes(value: float | None) -> str:
    """`1,234.5`, or a dash."""
    return "-" if value is None else f"{value / 1024:,.1f}"


def table(rows: Sequence[Row]) -> str:
    """All points in Markdown."""
    lines = [
        "| | W | C | R | head ms | of the processor | predicted | efficiency | step ms "
        "| of the processor | predicted | head KiB: at the group, at the sockets, predicted "
        "| step KiB: likewise |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    shares = efficiencies(rows)
    for row in rows:
        config = row["config"]
        place = f"| {row['variant']} | {config['num_workers']} | {config['num_classes']:,} "
        place += f"| {config['rows']} "
        if row["error"]:
            lines.append(f"{place}| {row['error']} | | | | | | | | |")
            continue
        told, links = row["predicted"], row["links"]
        crowded = "*" if told["crowding"] > 1 else ""
        share = f"{shares[row['key']]:.0%}" if row["key"] in shares else "-"
        cells = [
            milliseconds(row, "head_seconds") + crowded,
            milliseconds(row, "head_cpu_seconds"),
            f"{told['head_seconds'] * 1e3:.1f}",
            share,
            milliseconds(row, "seconds") + crowded,
            milliseconds(row, "cpu_seconds"),
            f"{told['step_seconds'] * 1e3:.1f}",
        ]
        for kind in ("head", "step"):
            counted = (links[f"{kind}_group"], links[f"{kind}_socket"], told[f"{kind}_link_bytes"])
            cells.append(", ".join(kibibytes(value) for value in counted))
        lines.append(f"{place}| {' | '.join(cells)} |")
    if any(not row["error"] and row["predicted"]["crowding"] > 1 for row in rows):
        lines += ["", "`*` more threads than cores: they share them, and so does the prediction."]
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Head and step over W for each mode, measured and predicted; bytes of the head."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = [row for row in rows if not row["error"]]
    modes = [mode for mode in TITLES if any(row["variant"] == mode for row in known)]
    figure = Figure(figsize=(4.2 * len(modes), 9.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(3, len(modes), squeeze=False, sharex=True)
    for column, mode in enumerate(modes):
        own = sorted(
            (row for row in known if row["variant"] == mode),
            key=lambda row: row["config"]["num_workers"],
        )
        for axes, key, label in (
            (grid[0][column], "head_seconds", "ms of the head"),
            (grid[1][column], "seconds", "ms of a training step"),
        ):
            _draw_times(axes, own, key)
            axes.set_ylabel(label if column == 0 else "")
        _draw_bytes(grid[2][column], own)
        grid[2][column].set_ylabel("KiB a worker receives, head" if column == 0 else "")
        grid[2][column].set_xlabel("workers")
        grid[0][column].set_title(TITLES[mode], fontsize=10)
    for axes in grid.flat:
        axes.grid(True, color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xticks(sorted({row["config"]["num_workers"] for row in known}))
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def _draw_times(axes: Any, own: Sequence[Row], key: str) -> None:
    told = {"head_seconds": "head_seconds", "seconds": "step_seconds"}[key]
    workers = [row["config"]["num_workers"] for row in own]
    medians = [row[f"{key}_median"] * 1e3 for row in own]
    spreads = [row[f"{key}_spread"] * 1e3 / 2 for row in own]
    axes.errorbar(
        workers, medians, spreads, color=_MEASURED, marker="o", capsize=3, label="measured"
    )
    of_processor = {"head_seconds": "head_cpu_seconds", "seconds": "cpu_seconds"}[key]
    used = [row[f"{of_processor}_median"] * 1e3 for row in own]
    axes.plot(workers, used, color="#009E73", marker="^", linestyle=":", label="of the processor")
    predicted = [row["predicted"][told] * 1e3 for row in own]
    axes.plot(workers, predicted, color=_PREDICTED, marker="s", linestyle="--", label="predicted")
    crowded = [row["config"]["num_workers"] for row in own if row["predicted"]["crowding"] > 1]
    if crowded:  # More threads than cores.
        axes.axvspan(min(crowded) - 0.3, max(crowded) + 0.3, color="#EEEEEE", zorder=0)


def _draw_bytes(axes: Any, own: Sequence[Row]) -> None:
    workers = [row["config"]["num_workers"] for row in own]
    for key, label, colour, style in (
        ("head_group", "at the process group", _MEASURED, "-"),
        ("head_socket", "at the sockets", "#009E73", ":"),
    ):
        counted = [row["links"][key] for row in own]
        if None not in counted:
            values = [value / 1024 for value in counted]
            axes.plot(workers, values, color=colour, marker="o", linestyle=style, label=label)
    predicted = [row["predicted"]["head_link_bytes"] / 1024 for row in own]
    axes.plot(workers, predicted, color=_PREDICTED, marker="s", linestyle="--", label="predicted")
