"""Neighbours as they are printed, sent and shown: id, label, value, and the side of the line."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float32

from dist_dml.retrieval.neighbours import NO_NEIGHBOUR
from dist_dml.retrieval.search_files import OpenIndex

UNITS = {
    "cosine": "cosine, larger is nearer",
    "l2": "squared Euclidean distance, smaller is nearer",
}
"""What a value is, by distance."""


def neighbours_of(
    opened: OpenIndex, vectors: Float32[np.ndarray, "q D"], k: int
) -> list[list[dict[str, Any]]]:
    """The `k` nearest items of each query, nearest first; all there are if the gallery has fewer.

    Each has `rank` from 1, `id`, `label`, `value` (the cosine, or the squared Euclidean distance),
    `within` (whether it is on the near side of the threshold; None without one), `has_image` and
    `metadata`.

    Raises:
        UsageError: see `SearchIndex.search`.
    """
    positions, values = opened.index.search(vectors, k)
    rows = opened.image_rows()
    return [
        [
            {
                "rank": rank + 1,
                **opened.item(position),
                "value": value,
                "within": is_within(opened, value),
                "has_image": bool(rows[position] >= 0),
            }
            for rank, (position, value) in enumerate(zip(found, near, strict=True))
            if position != NO_NEIGHBOUR
        ]
        for found, near in zip(positions.tolist(), values.tolist(), strict=True)
    ]


def is_within(opened: OpenIndex, value: float) -> bool | None:
    """Whether a value is on the near side of the threshold, itself included."""
    threshold = opened.facts.threshold
    if threshold is None:
        return None
    return value >= threshold if opened.index.distance.larger_is_nearer else value <= threshold


def answer_lines(opened: OpenIndex, neighbours: list[dict[str, Any]]) -> list[str]:
    """One line a neighbour, and one where the threshold lies."""
    lines = []
    width = max((len(printable(str(item["id"]))) for item in neighbours), default=0)
    previous: bool | None = True
    for item in neighbours:
        if item["within"] is False and previous:
            lines.append(_line(opened))
        previous = item["within"]
        metadata = "".join(
            f"  {printable(name)}={printable(str(value))}"
            for name, value in item["metadata"].items()
        )
        lines.append(
            f"{item['rank']:>4}  {item['value']:>9.4f}  {printable(str(item['id'])):<{width}}  "
            f"{printable(item['label'])}{metadata}"
        )
    if opened.facts.threshold is not None and previous:
        lines.append(_line(opened))
    return lines


def _line(opened: OpenIndex) -> str:
    return f"      ------- threshold {opened.facts.threshold:.4f}: farther ones follow -------"


def printable(text: str) -> str:
    """Without characters that would move a terminal's cursor."""
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
