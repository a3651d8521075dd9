"""What `bench_categories` says: tables in Markdown, and verdicts on paper A's sentence.

The sentence: trained by a classification loss that is a metric, a model is "almost five hundred
times" faster than a model of pairs on 100 categories, and on 10 categories about as fast.

Dimensions: C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench_categories_objectives import OBJECTIVES

Rows = Sequence[Mapping[str, Any]]
CLAIMED = 500.0
BASE = "cross_entropy"
PAIRS = tuple(name for name, one in OBJECTIVES.items() if one.family == "pairs")


def seconds_text(value: float) -> str:
    """`830 us`, `12.3 ms`, `4.1 s`, `3.2 min`, `1.5 h`, `2.1 days`."""
    for unit, factor, least in (
        ("days", 86400.0, 86400.0),
        ("h", 3600.0, 3600.0),
        ("min", 60.0, 120.0),
        ("s", 1.0, 1.0),
        ("ms", 1e-3, 1e-3),
    ):
        if value >= least:
            return f"{value / factor:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def bytes_text(value: float) -> str:
    """`3 MiB`, `1.2 GiB`."""
    return f"{value / 2**30:.3g} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def short_error(text: str) -> str:
    """The first words of a row's `error`, up to its colon."""
    return text.split(":")[0].split(";")[0]


def _grid(
    rows: Rows,
    columns: Sequence[Any],
    column_of: Callable[[Mapping[str, Any]], Any],
    heads: Sequence[str],
    cell: Callable[[Mapping[str, Any]], str],
) -> list[str]:
    """Objectives down, columns across; a point that is not there is a dash."""
    by_place = {(row["variant"], column_of(row)): row for row in rows}
    lines = [f"| objective | {' | '.join(heads)} |", "|---|" + "---:|" * len(columns)]
    for name in OBJECTIVES:
        found = [by_place.get((name, column)) for column in columns]
        if not any(found):
            continue
        cells = [
            "-" if row is None else short_error(row["error"]) if row["error"] else cell(row)
            for row in found
        ]
        lines.append(f"| {OBJECTIVES[name].title} | {' | '.join(cells)} |")
    return lines


def step_tables(rows: Rows) -> list[str]:
    """Whole step, head alone, epoch and memory over C."""
    rows = [row for row in rows if row["kind"] == "step"]
    if not rows:
        return []
    counts = sorted({row["config"]["num_classes"] for row in rows})
    first = rows[0]["config"]
    heads = [f"C = {count:,}" for count in counts]
    each = first["images_per_class"]
    shape = f"{first['rows']} rows, {first['dim']} features, {first['threads']} thread(s), "
    shape += first["clock"]

    def timed(key: str) -> Callable[[Mapping[str, Any]], str]:
        def cell(row: Mapping[str, Any]) -> str:
            median, spread = row[f"{key}_median"], row[f"{key}_spread"]
            return f"{seconds_text(median)} ({spread / median:.0%})"

        return cell

    parts: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        (
            f"A training step, embedder included ({shape}): median, and in brackets the distance "
            "of the quartiles as a share of it",
            timed("seconds"),
        ),
        ("The head alone", timed("head_seconds")),
        (
            f"An epoch of {each} images a class: calculated from the median step, without reading "
            "images",
            lambda row: seconds_text(row["epoch_seconds"]),
        ),
        (
            "Memory: peak of the head and its steps beyond the start, class weights and optimizer "
            "state included",
            lambda row: "-" if row["extra_bytes"] is None else bytes_text(row["extra_bytes"]),
        ),
    ]
    lines: list[str] = []
    for title, cell in parts:
        lines += ["", f"**{title}**", ""]
        lines += _grid(rows, counts, lambda row: row["config"]["num_classes"], heads, cell)
    return lines


def data_order(data: str) -> tuple[int, str]:
    """Synthetic data by their number of classes, then the others."""
    kind, _, count = data.partition("-")
    return (int(count), "") if kind == "synthetic" else (10**12, data)


def score_tables(rows: Rows) -> list[str]:
    """Seconds of training to the target; what was reached where it was not."""
    rows = [row for row in rows if row["kind"] == "score"]
    if not rows:
        return []
    lines = []
    for asked in sorted({_target_of(row) for row in rows}):
        metric, target, steps, seconds = asked
        chosen = [row for row in rows if _target_of(row) == asked]
        columns = sorted({row["config"]["data"] for row in chosen}, key=data_order)
        lines += [
            "",
            f"**Training time to {metric} = {target:g}** (evaluations and start not counted; first "
            f"evaluation at or above it, images seen until then; `>` the limit of {steps} steps "
            f"or {seconds:g} s came first, with the best score until then)",
            "",
            *_grid(chosen, columns, lambda row: row["config"]["data"], columns, _score_cell),
        ]
    return lines


def _target_of(row: Mapping[str, Any]) -> tuple[str, float, int, float]:
    config = row["config"]
    return config["metric"], config["target"], config["limit_steps"], config["limit_seconds"]


def last_seconds(row: Mapping[str, Any]) -> float:
    """Training time at the last evaluation."""
    return row["curve"][-1][2]


def _score_cell(row: Mapping[str, Any]) -> str:
    if row["seconds_median"] is None:
        return f"> {last_seconds(row):.1f} s ({row['best']:.3f})"
    reached = next(one for one in row["curve"] if one[2] >= row["seconds_median"])
    return f"{row['seconds_median']:.1f} s, {reached[1] / 1e3:,.0f}k images"


def _found(rows: Rows, kind: str) -> dict[tuple[str, Any], Mapping[str, Any]]:
    place = {"step": "num_classes", "score": "data"}[kind]
    return {
        (row["variant"], row["config"][place]): row
        for row in rows
        if row["kind"] == kind and not row["error"]
    }


def step_ratios(rows: Rows) -> dict[int, tuple[float, str]]:
    """By C: time of the fastest step of a loss of pairs over cross-entropy's, and which it is."""
    found = _found(rows, "step")
    ratios = {}
    for count in sorted({count for _, count in found}):
        pairs = {
            name: found[name, count]["seconds_median"] for name in PAIRS if (name, count) in found
        }
        if pairs and (BASE, count) in found:
            best = min(pairs, key=lambda name: pairs[name])
            ratios[count] = pairs[best] / found[BASE, count]["seconds_median"], best
    return ratios


def score_ratios(rows: Rows) -> dict[str, tuple[float, str, bool]]:
    """By data: time of the loss of pairs that is first at the target over cross-entropy's, which it
    is, and whether the ratio is only a lower bound, as no loss of pairs got there in time."""
    found = _found(rows, "score")
    ratios = {}
    for data in sorted({data for _, data in found}, key=data_order):
        ours = found.get((BASE, data), {}).get("seconds_median")
        pairs = {name: found[name, data] for name in PAIRS if (name, data) in found}
        if ours is None or not pairs:
            continue
        times = {
            name: row["seconds_median"]
            for name, row in pairs.items()
            if row["seconds_median"] is not None
        }
        if times:
            best = min(times, key=lambda name: times[name])
            ratios[data] = times[best] / ours, best, False
        else:
            # The one that was given up first bounds them all.
            best = min(pairs, key=lambda name: last_seconds(pairs[name]))
            ratios[data] = last_seconds(pairs[best]) / ours, best, True
    return ratios


def verdicts(rows: Rows) -> list[str]:
    """What holds of the sentence, one line each; `-` where it was not measured."""
    steps, scores = step_ratios(rows), score_ratios(rows)
    lines = []
    for count, (ratio, best) in steps.items():
        word = "faster" if ratio > 1 else "slower"
        lines.append(
            f"    {max(ratio, 1 / ratio):.2f}x {word} | a step of cross-entropy at C = {count:,} | "
            f"against {OBJECTIVES[best].title}, the fastest loss of pairs"
        )
    if len(steps) > 1:
        ratios = [ratio for ratio, _ in steps.values()]
        lines.append(
            _verdict(
                ratios[-1] > ratios[0] and ratios[-1] > 1,
                f"a step of cross-entropy gains on one of pairs as C grows: {ratios[0]:.3g}x at "
                f"the fewest classes, {ratios[-1]:.3g}x at the most",
            )
        )
    for data, (ratio, best, bound) in scores.items():
        word = "at least " * bound + f"{ratio:.2f}x"
        lines.append(
            f"    {word} the time | to the target on {data}, "
            f"{'any loss of pairs' if bound else OBJECTIVES[best].title} | against cross-entropy"
        )
    if scores:
        data, (ratio, _, bound) = max(scores.items(), key=lambda item: item[1][0])
        lines.append(
            _verdict(
                ratio >= CLAIMED,
                f"{CLAIMED:g} times as fast to a score as losses of pairs: most found "
                f"{'at least ' * bound}{ratio:.3g}x, on {data}",
            )
        )
    return lines or ["-   nothing to judge: cross-entropy or losses of pairs are missing"]


def _verdict(holds: bool, text: str) -> str:
    return f"{'yes' if holds else 'NO '} {text}"


def missing_lines(rows: Rows) -> list[str]:
    """Points that have no figures, each with its reason."""
    lines = []
    for row in rows:
        if row["error"]:
            config = row["config"]
            where = config.get("data") or f"C = {config['num_classes']:,}"
            lines.append(f"- {OBJECTIVES[row['variant']].title}, {where}: {row['error']}")
    return ["", "Without figures:", "", *lines] if lines else []


def document(rows: Rows, machine: str) -> str:
    """Everything in Markdown."""
    lines = [machine, *step_tables(rows), *score_tables(rows), *missing_lines(rows)]
    return "\n".join([*lines, "", "```", *verdicts(rows), "```", ""])
