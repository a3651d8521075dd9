"""The first section: all scores, each with its interval."""

from __future__ import annotations

from collections.abc import Mapping

from dist_dml.config import Config
from dist_dml.evaluation_config import ProtocolConfig
from dist_dml.report.page import Html, element, joined, paragraph, table
from dist_dml.retrieval.distances import named_distance
from dist_dml.retrieval.report import COLUMN_NAMES

Intervals = Mapping[tuple[str, str], Mapping[str, tuple[float, float]]]
_HEADLINES = ("recall_at_1", "map_at_r", "r_precision", "nmi")


def scores_of(
    scores: Mapping[str, float], protocol: ProtocolConfig, distance: str
) -> dict[str, float]:
    """The scores of one protocol and distance, without the prefix."""
    prefix = f"{protocol.name}/{distance}/"
    return {key[len(prefix) :]: value for key, value in scores.items() if key.startswith(prefix)}


def heading(score: str) -> str:
    """A score as a column is headed: Recall@4, MAP@R."""
    return COLUMN_NAMES.get(score, score.replace("recall_at_", "Recall@"))


def headlines(scores: Mapping[str, float], intervals: Mapping[str, tuple[float, float]]) -> Html:
    """The few numbers that one looks at first, large."""
    cells = []
    for name in _HEADLINES:
        if name not in scores:
            continue
        text = heading(name)
        if name in intervals:
            text += f", {_span(intervals[name])}"
        cells.append(
            element(
                "div", element("b", f"{scores[name]:.3f}"), element("span", text), class_="headline"
            )
        )
    return element("div", joined(cells), class_="headlines")


def scores_body(
    rows: Mapping[str, Mapping[str, float]],
    intervals: Intervals,
    config: Config,
    about_intervals: str,
) -> Html:
    """A table for each protocol: one line for each distance and model.

    Args:
        rows: scores as `protocol/distance/score` by the model's name; the last one is the trained.
        intervals: of the last row, by protocol and distance, then by score.
        config: which protocols and distances.
        about_intervals: how they were made; empty if there are none.
    """
    trained = list(rows)[-1]
    parts = []
    for protocol in config.evaluation.protocols:
        lines: list[tuple[str, str, dict[str, float], Mapping[str, tuple[float, float]]]] = []
        for text in config.evaluation.distances:
            distance = named_distance(text).name
            for model, every in rows.items():
                if found := scores_of(every, protocol, distance):
                    of_row = intervals.get((protocol.name, distance), {})
                    lines.append((text, model, found, of_row if model == trained else {}))
        if lines:
            parts.append(_protocol_table(protocol, lines))
    parts.append(paragraph(about_intervals, "note") if about_intervals else Html(""))
    return joined(parts)


def _protocol_table(
    protocol: ProtocolConfig,
    lines: list[tuple[str, str, dict[str, float], Mapping[str, tuple[float, float]]]],
) -> Html:
    names = list(dict.fromkeys(name for _, _, scores, _ in lines for name in scores))
    recalls = [name for name in names if name.startswith("recall_at_")]
    recalls.sort(key=lambda name: int(name.removeprefix("recall_at_")))
    columns = recalls + [name for name in COLUMN_NAMES if name in names]
    cells = [
        [distance, model, *(_score(scores.get(name), spans.get(name)) for name in columns)]
        for distance, model, scores, spans in lines
    ]
    counts = lines[0][2]
    lone = counts.get("num_queries_without_match", 0)
    searched = f"gallery {protocol.gallery}" if protocol.gallery else "each query without itself"
    about = f"{counts['num_queries']:,.0f} queries of split {protocol.query}, {searched}"
    about += f"; {lone:,.0f} without a match are left out of all means" if lone else ""
    title = element("h3", f"Protocol {protocol.name}")
    headings = ["distance", "model", *map(heading, columns)]
    return joined((title, table(headings, cells, text_columns=2, caption=about)))


def _score(value: float | None, span: tuple[float, float] | None) -> Html:
    if value is None:
        return Html("&ndash;")
    parts = [f"{value:.4f}"]
    if span is not None:
        parts.append(element("small", _span(span)))
    return joined(parts)


def _span(span: tuple[float, float]) -> str:
    return f"{span[0]:.3f}\u2013{span[1]:.3f}"
