"""The result of a fair protocol: as JSON with every number, and as a table to read and compare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dist_dml.data.index import Index
from dist_dml.protocol_folds import Fold
from dist_dml.protocol_scores import SCORES, Spread, separated_scores
from dist_dml.tracking.live import format_duration

HEADINGS = {"precision_at_1": "P@1", "r_precision": "R-precision", "map_at_r": "MAP@R"}


def build_report(
    index: Index,
    folds: Sequence[Fold],
    tests: Sequence[Mapping[str, Any]],
    concatenated: Sequence[Mapping[str, float]],
    reference: Sequence[str],
    combined: Sequence[Mapping[str, float]] = (),
) -> dict[str, Any]:
    """Everything the table is made of, JSON-able; scores as shares, 0..1.

    Args:
        index: of the whole data set.
        folds: all of all repeats, one repeat after the other.
        tests: the `test.json` of each.
        concatenated: of each repeat.
        reference: lines of published results, see `dist_dml.reference_tables`.
        combined: of every combination of repeats, where that was asked for.
    """
    config = folds[0].config
    num_folds = config.data.folds
    repeats = [list(tests[i : i + num_folds]) for i in range(0, len(tests), num_folds)]
    separated = [separated_scores(part) for part in repeats]
    return {
        "name": config.run.name.removesuffix(f"/{folds[0].name}"),
        "data": config.data.path,
        "dataset": dataset_name(index),
        "loss": config.loss.name,
        "folds": num_folds,
        "distance": tests[0]["distance"],
        "protocol": dict(tests[0]["protocol"]),
        "embedding_dim": tests[0]["embedding_dim"],
        "runs": [
            {"run": str(fold.folder), "repeat": fold.repeat, **test}
            for fold, test in zip(folds, tests, strict=True)
        ],
        "repeats": [
            {"seed": part[0]["seed"], "separated": alone, "concatenated": dict(together)}
            for part, alone, together in zip(repeats, separated, concatenated, strict=True)
        ],
        "over_runs": {
            "validation_map_at_r": asdict(Spread.of([t["validation_map_at_r"] for t in tests])),
            "best_seconds": asdict(Spread.of([t["best_seconds"] for t in tests])),
            "best_images_seen": asdict(Spread.of([t["best_images_seen"] for t in tests])),
            **{name: asdict(Spread.of([t["scores"][name] for t in tests])) for name in SCORES},
        },
        "over_repeats": {
            kind: {name: asdict(Spread.of([scores[name] for scores in every])) for name in SCORES}
            for kind, every in (("separated", separated), ("concatenated", concatenated))
        },
        "combinations": [dict(scores) for scores in combined],
        "reference": list(reference),
    }


def summary_values(report: Mapping[str, Any]) -> dict[str, float]:
    """The result as metrics: `protocol/separated/SCORE` (mean over repeats of the folds' mean, with
    the deviation over all runs beside it), `protocol/concatenated/SCORE`, means of the cost.

    Scores are shares, 0..1.
    """
    over = report["over_runs"]
    values = {
        f"protocol/{kind}/{name}": spread["mean"]
        for kind, scores in report["over_repeats"].items()
        for name, spread in scores.items()
    }
    for name in SCORES:
        values[f"protocol/separated/{name}_deviation"] = over[name]["deviation"]
    for name in ("validation_map_at_r", "best_seconds", "best_images_seen"):
        values[f"protocol/{name}"] = over[name]["mean"]
    return {name: float(value) for name, value in values.items() if value is not None}


def mean_cost(report: Mapping[str, Any]) -> tuple[int, float]:
    """Training images and seconds until the tested checkpoint, means over the runs."""
    over = report["over_runs"]
    return round(over["best_images_seen"]["mean"]), float(over["best_seconds"]["mean"])


def dataset_name(index: Index) -> str:
    """What the packer calls its data set (`cub`, `cars`, ...); empty for tars of other makers."""
    source = index.metadata.get("source", {})
    return str(source.get("kind", "")) if isinstance(source, Mapping) else str(source)


def table_text(report: Mapping[str, Any]) -> str:
    """The report as Markdown; scores in percent, as the papers print them."""
    parts = [_title(report), _fold_table(report), _final_table(report)]
    if report["reference"]:
        lines = "\n".join(report["reference"])
        parts.append(f"Published (paper, table, method, backbone, width ...):\n\n```\n{lines}\n```")
    return "\n\n".join(parts) + "\n"


def _title(report: Mapping[str, Any]) -> str:
    protocol = report["protocol"]
    searched = f"gallery {protocol['gallery']}" if protocol["gallery"] else "each without itself"
    repeats = len(report["repeats"])
    seeds = f", {repeats} repeats" if repeats > 1 else ""
    return (
        f"# {report['name']}: loss {report['loss']} on {report['data']}\n\n"
        f"{report['folds']} class-disjoint folds{seeds}; best checkpoint by validation MAP@R; "
        f"tested once: queries {protocol['query']}, {searched}, {report['distance']}. "
        "Scores in percent."
    )


def _fold_table(report: Mapping[str, Any]) -> str:
    headings = ["fold", "validation MAP@R", "best step", "time to best", "images seen"]
    headings += ["peak MiB", *HEADINGS.values()]
    rows = []
    for run in report["runs"]:
        name = f"{run['fold']}" if len(report["repeats"]) == 1 else f"{run['repeat']}/{run['fold']}"
        peak = f"{run['peak_mebibytes']:,.0f}" if run["peak_mebibytes"] is not None else "-"
        rows.append(
            [
                name,
                percent(run["validation_map_at_r"]),
                f"{run['best_step']} of {run['total_steps']}",
                duration(run["best_seconds"]),
                f"{run['best_images_seen']:,}",
                peak,
                *(percent(run["scores"][score]) for score in SCORES),
            ]
        )
    over = report["over_runs"]
    seconds = over["best_seconds"]["mean"]
    images = over["best_images_seen"]["mean"]
    validation = over["validation_map_at_r"]
    means = [percent(over[score]["mean"]) for score in SCORES]
    spread = [percent(over[score]["deviation"]) for score in SCORES]
    rows.append(
        [
            *("mean", percent(validation["mean"]), "", duration(seconds)),
            *(f"{images:,.0f}", "", *means),
        ]
    )
    rows.append(["deviation", percent(validation["deviation"]), "", "", "", "", *spread])
    return markdown(headings, rows)


def _final_table(report: Mapping[str, Any]) -> str:
    width = report["embedding_dim"]
    names = {
        "separated": f"separated ({width}-D, mean of {report['folds']})",
        "concatenated": f"concatenated ({width * report['folds']}-D)",
    }
    rows = []
    for kind, name in names.items():
        spreads = [report["over_repeats"][kind][score] for score in SCORES]
        rows.append([name, *(_with_spread(spread) for spread in spreads)])
    repeats = len(report["repeats"])
    combined = report["combinations"]
    if combined:
        means = [
            percent(math.fsum(scores[name] for scores in combined) / len(combined))
            for name in SCORES
        ]
        name = f"concatenated, mean of {len(combined)} combinations of repeats"
        rows.append([name, *means])
    said = ""
    if repeats >= 3:
        said = f"\n\n± is the 95% interval of the mean over {repeats} repeats (Student's t)."
    elif repeats == 2:
        said = "\n\n± is the standard deviation of 2 repeats."
    return markdown(["score", *HEADINGS.values()], rows) + said


def _with_spread(spread: Mapping[str, float | None]) -> str:
    around = spread["deviation"] if spread["interval"] is None else spread["interval"]
    return percent(spread["mean"]) + (f" ± {percent(around)}" if around is not None else "")


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else format_duration(seconds)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that also reads well as it is: columns of equal width, numbers to the right."""
    widths = [max(len(line[i]) for line in (headings, *rows)) for i in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        shown = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(shown)} |"

    first, *others = widths
    rule = f"| {'-' * first} | {' | '.join('-' * (w - 1) + ':' for w in others)} |"
    return "\n".join([line(headings), rule, *(line(row) for row in rows)])
