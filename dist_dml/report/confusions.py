"""Which classes are taken for which others, and what that looks like.

Dimensions: `q` queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dist_dml.retrieval.metrics import NO_LABEL, QueryScores


@dataclass(frozen=True)
class Confusion:
    """Queries of one class whose nearest neighbour is of one other."""

    label: int
    taken_for: int
    count: int
    """Such queries."""
    num_queries: int
    """All queries of the class that can be answered."""
    example: int
    """Row of the first such query."""


def confusions(scores: QueryScores, most: int) -> list[Confusion]:
    """The ordered pairs (class, other class) with most wrong nearest neighbours, most first.

    Of equal counts the larger share of the class's queries comes first, then the lower labels.
    Queries without a match in the gallery cannot be right and are left out. Costs a sort of the
    misses, whatever the number of classes.
    """
    answerable = scores.has_match & (scores.nearest_label != NO_LABEL)
    wrong = np.flatnonzero(answerable & (scores.nearest_label != scores.query_label))
    if not len(wrong):
        return []
    pairs = np.stack([scores.query_label[wrong], scores.nearest_label[wrong]], axis=1)
    pairs, first, counts = np.unique(pairs, axis=0, return_index=True, return_counts=True)
    classes, sizes = np.unique(scores.query_label[scores.has_match], return_counts=True)
    sizes = sizes[np.searchsorted(classes, pairs[:, 0])]
    order = np.lexsort((pairs[:, 1], pairs[:, 0], -counts / sizes, -counts))[:most]
    return [
        Confusion(
            int(pairs[i, 0]),
            int(pairs[i, 1]),
            int(counts[i]),
            int(sizes[i]),
            int(wrong[first[i]]),
        )
        for i in order
    ]
