"""What a search has found: a table, the best configuration as a file, three pictures.

Figures are matplotlib's objects and never `pyplot`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_dml.retrieval.report import aligned_table
from dist_dml.tracking.live import format_duration
from dist_dml.tuning.ledger import Ledger, TrialRecord
from dist_dml.tuning.space import SearchConfig, Value, overrides_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHOWN = 30
BLUE, GREY, ORANGE = "#0072b2", "#999999", "#d55e00"


@dataclass(frozen=True)
class Confirmed:
    """The best configuration beside the unchanged one, seed by seed."""

    best: tuple[float, ...]
    default: tuple[float, ...]
    """Test scores, of the same seeds."""

    @property
    def difference(self) -> float:
        """Mean of best minus default."""
        return float(np.mean(np.subtract(self.best, self.default)))

    @property
    def interval(self) -> tuple[float, float]:
        """95% of the mean difference over seeds: Student's t of the pairs, n - 1 degrees."""
        from scipy import stats

        gaps = np.subtract(self.best, self.default)
        half = stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / math.sqrt(len(gaps))
        return self.difference - float(half), self.difference + float(half)


def confirmed(ledger: Ledger) -> Confirmed | None:
    """The pairs of seeds of which both have ended with a test; None below two pairs."""
    tests: dict[str, dict[str, float]] = {"best": {}, "default": {}}
    for record in ledger.of_kind("best", "default"):
        if record.test is not None:
            tests[record.kind][record.overrides[0]] = record.test
    seeds = sorted(tests["best"].keys() & tests["default"].keys())
    if len(seeds) < 2:
        return None
    both = (tuple(tests[kind][seed] for seed in seeds) for kind in ("best", "default"))
    return Confirmed(*both)


def study_facts(
    search: SearchConfig, metric: str, ledger: Ledger, importances: Mapping[str, float]
) -> dict[str, Any]:
    """All of it as one object of JSON."""
    best, sure = ledger.best(), confirmed(ledger)
    trials = [
        {
            "name": record.name,
            "kind": record.kind,
            "state": record.state,
            "value": record.best,
            "test": record.test,
            "seconds": record.seconds,
            "share": record.reports[-1]["share"] if record.reports else 0.0,
            "chosen": record.chosen,
            "reason": record.reason,
        }
        for record in ledger.trials.values()
    ]
    confirmation = None
    if sure is not None:
        low, high = sure.interval
        confirmation = {
            "metric": search.confirm.metric,
            "best": sure.best,
            "default": sure.default,
            "difference": sure.difference,
            "interval_95": [low, high],
        }
    return {
        "metric": metric,
        "sampler": search.sampler,
        "best": best.name if best else None,
        "importances": dict(importances),
        "confirmation": confirmation,
        "trials": trials,
    }


def study_text(
    search: SearchConfig, metric: str, ledger: Ledger, importances: Mapping[str, float]
) -> str:
    """The same as tables for people: the best trials first."""
    records = ledger.of_kind("search")
    ranked = sorted(records, key=lambda one: -(one.best if one.best is not None else -math.inf))
    keys = list(search.space)
    rows = [["trial", metric, "state", "trained", "time", *keys]]
    for record in ranked[:_SHOWN]:
        share = record.reports[-1]["share"] if record.reports else 0.0
        rows.append(
            [
                record.name,
                "-" if record.best is None else f"{record.best:.4f}",
                record.state,
                f"{100 * share:.0f}%",
                format_duration(record.seconds),
                *(_shown(record.chosen[key]) if key in record.chosen else "-" for key in keys),
            ]
        )
    texts = [aligned_table(rows)]
    if len(ranked) > _SHOWN:
        texts.append(f"and {len(ranked) - _SHOWN} more: see study.json")
    failed = [record for record in records if record.state == "failed"]
    texts += [f"{record.name} failed: {record.reason}" for record in failed[:10]]
    if importances:
        parts = [f"{key} {value:.2f}" for key, value in importances.items()]
        texts.append("importance (fANOVA, of completed trials): " + ", ".join(parts))
    sure = confirmed(ledger)
    if sure is not None:
        low, high = sure.interval
        mean = [float(np.mean(values)) for values in (sure.best, sure.default)]
        texts.append(
            f"{search.confirm.metric} over {len(sure.best)} seeds: best {mean[0]:.4f}, "
            f"default {mean[1]:.4f}, difference {sure.difference:+.4f} "
            f"(95% interval {low:+.4f} to {high:+.4f})"
        )
    return "\n\n".join(texts)


def write_pictures(
    folder: Path,
    search: SearchConfig,
    metric: str,
    ledger: Ledger,
    importances: Mapping[str, float],
) -> list[Path]:
    """`history.png`, `parallel.png` and, where there are some, `importance.png`."""
    records = [one for one in ledger.of_kind("search") if one.best is not None]
    if not records:
        return []
    figures = {
        "history": history_figure(records, metric),
        "parallel": parallel_figure(records, search, metric),
    }
    if importances:
        figures["importance"] = importance_figure(importances, metric)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1])
    return paths


def history_figure(records: Sequence[TrialRecord], metric: str) -> Figure:
    """Each trial's curve over the share of its training: what stopped early ends early."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    best = max(records, key=lambda one: one.best or -math.inf)
    for record in records:
        shares = [100 * report["share"] for report in record.reports]
        values = [report["value"] for report in record.reports]
        chosen = record is best
        colour = BLUE if chosen else GREY if record.state == "complete" else ORANGE
        axes.plot(
            shares,
            values,
            color=colour,
            linewidth=2.2 if chosen else 1,
            alpha=1 if chosen else 0.6,
            marker="o",
            markersize=3,
            zorder=3 if chosen else 2,
        )
    for colour, text in (
        (BLUE, f"best: {best.name}"),
        (GREY, "whole training"),
        (ORANGE, "stopped early, failed or running"),
    ):
        axes.plot([], [], color=colour, label=text)
    _dress(axes)
    axes.set(xlabel="share of the training (%)", ylabel=metric, xlim=(0, 101))
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(f"{len(records)} trials", loc="left", fontweight="bold", fontsize=11)
    return figure


def parallel_figure(records: Sequence[TrialRecord], search: SearchConfig, metric: str) -> Figure:
    """Parallel coordinates: a line a trial through its settings to its value."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    keys = list(search.space)
    figure = Figure(figsize=(max(6.0, 1.9 * (len(keys) + 1)), 4.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    values = np.array([one.best for one in records], dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    span = (high - low) or 1.0
    for record in sorted(records, key=lambda one: one.best or -math.inf):
        height = ((record.best or 0.0) - low) / span
        points = [_height(search, key, record.chosen.get(key)) for key in keys] + [height]
        # A key that is not part of the trial leaves a gap.
        axes.plot(
            range(len(points)),
            points,
            color=colormaps["viridis"](height),
            alpha=0.85,
            linewidth=1 + 1.5 * height,
            marker="o",
            markersize=3,
        )
    for place, key in enumerate(keys):
        axes.axvline(place, color="#bbbbbb", linewidth=0.8, zorder=0)
        for height, text in _ticks(search, key):
            axes.text(place + 0.03, height, text, fontsize=7, va="center", parse_math=False)
    axes.axvline(len(keys), color="#bbbbbb", linewidth=0.8, zorder=0)
    for height, number in ((0.0, low), (1.0, high)):
        axes.text(len(keys) + 0.03, height, f"{number:.4f}", fontsize=7, va="center")
    axes.set_xticks(range(len(keys) + 1), [*keys, metric], fontsize=8, rotation=12)
    axes.set_yticks([])
    axes.set(xlim=(-0.15, len(keys) + 0.35), ylim=(-0.06, 1.06))
    axes.spines[:].set_visible(False)
    axes.set_title("Settings and values: brighter is better", loc="left", fontsize=11)
    return figure


def importance_figure(importances: Mapping[str, float], metric: str) -> Figure:
    """How much of the spread of values each key explains."""
    from matplotlib.figure import Figure

    names = list(importances)[::-1]
    figure = Figure(figsize=(6, 0.45 * len(names) + 1.3), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(names, [importances[name] for name in names], color=BLUE)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    _dress(axes)
    axes.set(xlim=(0, 1.1), xlabel=f"share of the spread of {metric} (fANOVA)")
    axes.set_title("Importance of the keys", loc="left", fontweight="bold", fontsize=11)
    return figure


def _height(search: SearchConfig, key: str, value: Value) -> float:
    """Where a value stands on its axis, 0..1; NaN for a key that is not part of the trial."""
    distribution = search.space[key]
    if distribution.choice is not None:
        if value not in distribution.choice:
            return math.nan
        return distribution.choice.index(value) / max(1, len(distribution.choice) - 1)
    if value is None:
        return math.nan
    low, high = getattr(distribution, distribution.kind)
    number = float(value)  # pyright: ignore[reportArgumentType]  (of a range, so a number)
    if distribution.kind.startswith("log"):
        low, high, number = math.log(low), math.log(high), math.log(number)
    return (number - low) / (high - low)


def _ticks(search: SearchConfig, key: str) -> list[tuple[float, str]]:
    distribution = search.space[key]
    if distribution.choice is not None:
        return [(_height(search, key, value), _shown(value)) for value in distribution.choice]
    low, high = getattr(distribution, distribution.kind)
    middle = math.sqrt(low * high) if distribution.kind.startswith("log") else (low + high) / 2
    return [(0.0, f"{low:g}"), (0.5, f"{middle:.3g}"), (1.0, f"{high:g}")]


def _dress(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="#eeeeee")
    axes.set_axisbelow(True)


def _shown(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def best_words(record: TrialRecord) -> str:
    """The best setting as words of a command line."""
    return " ".join(overrides_of(record.chosen))
