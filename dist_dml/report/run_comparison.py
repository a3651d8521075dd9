"""Runs side by side: a table in the terminal, and a page with curves, settings and significance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dist_dml.report.compared_runs import (
    ComparedRun,
    best_places,
    config_differences,
    measurements,
    read_runs,
    score_rows,
)
from dist_dml.report.figure_folder import FigureFolder
from dist_dml.report.page import Html, Section, element, joined, page, paragraph, table
from dist_dml.report.pictures import dress, new_figure
from dist_dml.report.run_significance import Tested, paired_tests
from dist_dml.report.scores_section import heading
from dist_dml.report.significance import CONFIDENCE, DRAWS
from dist_dml.retrieval.report import LINE_COLOURS, aligned_table
from dist_dml.tracking.plots import running_mean
from dist_dml.whole_files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "compare.html"
SIGNIFICANT = 0.05


def compare_runs(folders: Sequence[Path], out: Path | None) -> tuple[str, Path]:
    """Read the runs and write the page. Returns the text for the terminal and the page's path.

    Args:
        folders: run folders, each with a config.yaml.
        out: where compare.html and its picture go; None: `comparison/` beside the first run.

    Raises:
        UsageError: a run has no scores, or there are fewer than two.
    """
    runs = read_runs(folders)
    folder = out or folders[0].absolute().parent / "comparison"
    folder.mkdir(parents=True, exist_ok=True)
    tests, reasons = paired_tests(runs)
    figures = FigureFolder(folder)
    sections = [
        Section("scores", "Scores", _scores(runs)),
        Section("significance", "Significance", _significance(tests, reasons)),
        Section("curves", "Curves", _curves(runs, figures)),
        Section("settings", "Configuration", _settings(runs)),
        Section("runs", "Runs", _about(runs)),
    ]
    names = [run.name for run in runs]
    lead = paragraph(f"{len(runs)} runs side by side; the best value of each column is marked.")
    text = page(f"Comparison of {', '.join(names)}", lead, sections)
    path = folder / FILE
    write_text(path, text)
    return comparison_text(runs, tests, reasons), path


def comparison_text(
    runs: Sequence[ComparedRun], tests: Sequence[Tested], reasons: Sequence[str]
) -> str:
    """The tables as plain text; `*` marks the best value of a column."""
    parts = []
    for protocol, distance in reversed(measurements(runs)):
        names, values = score_rows(runs, protocol, distance)
        best = best_places(names, values)
        lines = [["", *map(heading, names)]]
        for run, row, marks in zip(runs, values, best, strict=True):
            cells = [
                _number(value) + ("*" if mark else " ")
                for value, mark in zip(row, marks, strict=True)
            ]
            lines.append([run.name, *cells])
        parts.append(f"{protocol}, {distance}\n{aligned_table(lines)}")
    if tests:
        lines = [["significance", "difference", "95% interval", "p", "p of all"]]
        for one in tests:
            title = f"{one.second} - {one.first}: {one.protocol}/{one.distance}/{one.score}"
            lines.append([title, *_test_cells(one)])
        parts.append(aligned_table(lines))
    parts += [f"no significance: {reason}" for reason in reasons]
    return "\n\n".join(parts)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _test_cells(one: Tested) -> list[str]:
    test = one.test
    return [
        f"{test.difference:+.4f}",
        f"{test.low:+.4f} to {test.high:+.4f}",
        f"{test.p:.2g}",
        f"{one.p_of_all:.2g}",
    ]


def _scores(runs: Sequence[ComparedRun]) -> Html:
    parts = []
    for protocol, distance in measurements(runs):
        names, values = score_rows(runs, protocol, distance)
        best = best_places(names, values)
        rows = []
        for run, row, marks in zip(runs, values, best, strict=True):
            cells = [
                element("b", _number(value), class_="best") if mark else _number(value)
                for value, mark in zip(row, marks, strict=True)
            ]
            rows.append((run.name, *cells))
        title = element("h3", f"{protocol}, {distance}")
        parts += [title, table(("", *map(heading, names)), rows)]
    if len({run.fingerprint for run in runs}) > 1:
        parts.append(
            paragraph(
                "The runs were trained on different data (fingerprints differ): read the rows as "
                "what they are, not as a contest.",
                "note",
            )
        )
    return joined(parts)


def _significance(tests: Sequence[Tested], reasons: Sequence[str]) -> Html:
    parts = []
    if tests:
        about = (
            f"Paired permutation tests over classes ({DRAWS:,} swaps, all of them for up to 13 "
            f"classes that differ) and {CONFIDENCE:.0%} intervals by bootstrap over classes. 'p of "
            "all' is Holm's, for reading all lines together; below "
            f"{SIGNIFICANT} the difference is marked. It is about these classes and these two "
            "trainings: whether another seed would differ, only another seed can tell."
        )
        rows = []
        for one in tests:
            cells: list[str] = list(_test_cells(one))
            if one.p_of_all < SIGNIFICANT:
                cells[0] = element("b", cells[0], class_="best")
            measured = f"{one.protocol}, {one.distance}"
            size = f"{one.test.num_queries:,} / {one.test.num_classes:,}"
            pair = f"{one.second} \u2212 {one.first}"
            rows.append((pair, measured, heading(one.score), *cells, size))
        headings = ("runs", "measured", "score", "difference", "95% interval", "p", "p of all")
        parts = [
            paragraph(about, "note"),
            table((*headings, "queries / classes"), rows, text_columns=3),
        ]
    parts += [paragraph(f"None between {reason}.", "empty") for reason in reasons]
    return joined(parts)


def _main_score(runs: Sequence[ComparedRun]) -> str:
    """The score that checkpoints are chosen by, else the first MAP@R that all have recorded."""
    wanted = [run.config.checkpoint.best_metric for run in runs]
    common = set.intersection(*(set(run.metrics) for run in runs))
    if len(set(wanted)) == 1 and wanted[0] in common:
        return wanted[0]
    return next((name for name in sorted(common) if name.endswith("/map_at_r")), "")


def _curves(runs: Sequence[ComparedRun], figures: FigureFolder) -> Html:
    drawn = [name for name in ("train/loss", _main_score(runs)) if name]
    if not any(name in run.metrics for run in runs for name in drawn):
        return paragraph("No curves: no run has a metrics.jsonl with records.", "empty")
    shown = figures.add(
        "compare",
        curves_figure(runs, drawn),
        f"{' and '.join(drawn)} of {len(runs)} runs over steps, images and seconds",
    )
    losses = {run.config.loss.name for run in runs}
    note = (
        "Different losses have different scales; compare their scores." if len(losses) > 1 else ""
    )
    return joined((shown, paragraph(note, "note") if note else Html("")))


def curves_figure(runs: Sequence[ComparedRun], names: Sequence[str]) -> Figure:
    """One line a run in every panel: rows are metrics, columns steps, images seen and seconds."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = new_figure(10.5, 0.5 + 2.7 * len(names))
    grid = figure.subplots(len(names), 3, squeeze=False, sharey="row")
    axes_of = (("step", "step"), ("images_seen", "images seen"), ("seconds", "training seconds"))
    for row, name in zip(grid, names, strict=True):
        for axes, (attribute, label) in zip(row, axes_of, strict=True):
            for place, run in enumerate(runs):
                curve = run.metrics.get(name)
                if curve is None:
                    continue
                many = len(curve.value) > 60
                value = running_mean(curve.value, len(curve.value) // 50) if many else curve.value
                axes.plot(
                    getattr(curve, attribute),
                    value,
                    color=LINE_COLOURS[place % len(LINE_COLOURS)],
                    linestyle=("-", "--", ":")[place // len(LINE_COLOURS) % 3],
                    marker="" if many else "o",
                    markersize=3,
                    linewidth=1.6,
                    label=run.name,
                )
            dress(axes, name if attribute == "step" else "", label, "")
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            if np.any([len(line.get_xdata()) for line in axes.get_lines()]):
                axes.set_xlim(left=0)
    handles, labels = grid[-1][0].get_legend_handles_labels()
    legend = figure.legend(
        handles, labels, loc="outside upper center", ncols=min(4, len(runs)), frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _settings(runs: Sequence[ComparedRun]) -> Html:
    rows = [(key, *values) for key, values in config_differences(runs)]
    if not rows:
        return paragraph("The configurations are the same, apart from the runs' places.", "empty")
    headings = ("key", *(run.name for run in runs))
    return table(headings, rows, text_columns=len(headings))


def _about(runs: Sequence[ComparedRun]) -> Html:
    rows = []
    for run in runs:
        speed = run.metrics.get("train/images_per_second")
        rows.append(
            (
                run.name,
                run.source,
                run.fingerprint[:16] or "unknown",
                f"{run.seconds:,.0f}",
                f"{np.median(speed.value):,.0f}" if speed is not None else "\u2013",
            )
        )
    headings = ("run", "scores from", "data fingerprint", "training seconds", "images/s, median")
    return table(headings, rows, text_columns=3)
