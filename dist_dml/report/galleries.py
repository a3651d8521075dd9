"""Queries with hits and misses, and confused classes, as rows of thumbnails."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dist_dml.errors import RunError
from dist_dml.report.confusions import Confusion
from dist_dml.report.page import Html, element, joined, paragraph, picture
from dist_dml.report.pictures import thumbnail
from dist_dml.retrieval.distances import Distance
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.neighbours import NO_NEIGHBOUR
from dist_dml.retrieval.ranking import nearest
from dist_dml.retrieval.report import GalleryRows

_LONGEST_NAME = 80
_SIDE = 98


class Samples:
    """Pictures of single samples, each read and made small once.

    Args:
        load_image: from a sample's id to its image, uint8; raises RunError where it cannot be read.
        names: of the classes that are shown; others by their number.
    """

    def __init__(
        self, load_image: Callable[[int], np.ndarray], names: Mapping[int, str] | None = None
    ) -> None:
        self._load, self._names = load_image, names or {}
        self._made: dict[int, tuple[bytes, int, int] | None] = {}

    def name(self, label: int) -> str:
        """The class in words, cut after 80 characters."""
        name = self._names.get(label, str(label))
        return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "\u2026"

    def figure(self, sample_id: int, alt: str, caption: Sequence[str], kind: str) -> Html:
        """One thumbnail with its caption; `kind` is query, hit or miss."""
        if sample_id not in self._made:
            try:
                self._made[sample_id] = thumbnail(self._load(sample_id))
            except RunError:  # Of what is missing the page says so, and shows the rest.
                self._made[sample_id] = None
        made = self._made[sample_id]
        shown = (
            element("small", "this image cannot be read")
            if made is None
            else picture(made[0], alt, _SIDE, _SIDE, kind)
        )
        return element("figure", shown, element("figcaption", *caption), class_=kind)


def value_text(distance: Distance, value: float) -> str:
    """A distance with its name: `cosine 0.913`, `l2^2 12.4` (FAISS's l2 is squared)."""
    name = {"l2": "l2\u00b2", "probability_l2": "l2\u00b2"}.get(distance.name, distance.name)
    return f"{name} {value:.4g}"


def _number(value: str) -> str:
    """The last word of `value_text`: the legend says what it is of."""
    return value.rsplit(" ", 1)[-1]


def gallery_html(
    rows: GalleryRows,
    queries: Embeddings,
    searched: Embeddings,
    distance: Distance,
    samples: Samples,
) -> Html:
    """The rows as `choose_rows` found them: the hardest misses first, then random queries."""
    parts: list[Html] = []
    for place, row in enumerate(rows.queries):
        if place in (0, rows.num_hardest):
            hardest = place < rows.num_hardest
            parts.append(element("h3", "Hardest misses" if hardest else "Random queries"))
        parts.append(_row(rows, place, int(row), queries, searched, distance, samples))
    return joined(parts)


def _row(
    rows: GalleryRows,
    place: int,
    row: int,
    queries: Embeddings,
    searched: Embeddings,
    distance: Distance,
    samples: Samples,
) -> Html:
    query, name = int(queries.ids[row]), samples.name(int(queries.labels[row]))
    cells = [
        samples.figure(
            query,
            f"query: sample {query}, class {name}",
            (element("span", element("b", "query")), name),
            "query",
        )
    ]
    for rank, found in enumerate(rows.neighbours[place], start=1):
        if found == NO_NEIGHBOUR:
            continue
        sample, other = int(searched.ids[found]), samples.name(int(searched.labels[found]))
        kind = "hit" if rows.hits[place, rank - 1] else "miss"
        value = value_text(distance, float(rows.values[place, rank - 1]))
        cells.append(
            samples.figure(
                sample,
                f"rank {rank} of query {query}: sample {sample}, class {other}, {value}, {kind}",
                (element("span", f"{kind} {_number(value)}", class_=f"{kind}-word"), other),
                kind,
            )
        )
    return element("div", joined(cells), class_="row", data_query=str(query))


def confusions_html(
    found: Sequence[Confusion],
    queries: Embeddings,
    searched: Embeddings,
    distance: Distance,
    samples: Samples,
) -> Html:
    """Each pair of classes with its count, one of its queries and what that was taken for."""
    part = queries.rows(np.array([one.example for one in found], dtype=np.int64))
    nearest_rows, values = nearest(part, searched, 1, distance)
    cells = []
    for place, one in enumerate(found):
        query, row = int(part.ids[place]), int(nearest_rows[place, 0])
        sample = int(searched.ids[row])
        name, other = samples.name(one.label), samples.name(one.taken_for)
        value = value_text(distance, float(values[place, 0]))
        text = joined(
            (
                element("b", name),
                " taken for ",
                element("b", other),
                f": {one.count} of {one.num_queries} queries ",
                element("small", f"({value} in this example)"),
            )
        )
        pair = joined(
            (
                samples.figure(query, f"sample {query}, class {name}", (), "query"),
                samples.figure(
                    sample, f"its nearest: sample {sample}, class {other}, {value}", (), "miss"
                ),
                element("p", text),
            )
        )
        cells.append(element("div", pair, class_="row"))
    return element("div", joined(cells), class_="pairs")


def legend(distance: Distance) -> Html:
    """What the frames mean, in words: not by colour alone."""
    return paragraph(
        "Thick frame: same class (hit). Thin dashed frame: another class (miss). Each line begins "
        "with the query; then its nearest images, the nearest first, with their "
        f"{value_text(distance, 0).rsplit(' ', 1)[0]} and class.",
        "note",
    )
