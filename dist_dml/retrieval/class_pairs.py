"""Pairs of a query and a gallery item of the same class, with their values, one by one.

There are few of them beside all pairs, so each is computed on its own in float64 and none is
rounded by a matrix product.

Dimensions: `q` queries, `g` gallery items, `n` pairs, embeddings of width `D`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Float64, Int64

from dist_dml.errors import UsageError
from dist_dml.retrieval.distances import Distance

_PAIRS_AT_A_TIME = 2**18
_NUMBERS_AT_A_TIME = 2**21


@runtime_checkable
class Labelled(Protocol):
    """What a sample is: its class, and the id that tells it from all others."""

    @property
    def labels(self) -> Int64[np.ndarray, " n"]: ...

    @property
    def ids(self) -> Int64[np.ndarray, " n"]: ...


def class_pairs(
    queries: Labelled, gallery: Labelled
) -> Iterator[tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]]:
    """Rows of queries and of the gallery whose labels are equal and whose ids are not.

    In the order of the queries and, for each, of the gallery; about 2^18 pairs at a time, and never
    fewer than those of one query. A query without any does not occur.
    """
    order = np.argsort(gallery.labels, kind="stable")
    ordered = gallery.labels[order]
    first = np.searchsorted(ordered, queries.labels, side="left")
    counts = np.searchsorted(ordered, queries.labels, side="right") - first
    ends = np.cumsum(counts)
    start = 0
    while start < len(queries.labels):
        before = ends[start - 1] if start else 0
        stop = int(np.searchsorted(ends, before + _PAIRS_AT_A_TIME, side="right"))
        stop = min(max(stop, start + 1), len(queries.labels))
        some = counts[start:stop]
        rows = np.repeat(np.arange(start, stop), some)
        within = np.arange(some.sum()) - np.repeat(np.cumsum(some) - some, some)
        columns = order[np.repeat(first[start:stop], some) + within]
        other = queries.ids[rows] != gallery.ids[columns]
        if other.any():
            yield rows[other], columns[other]
        start = stop


def pair_values(
    queries: Float32[np.ndarray, "q D"],
    gallery: Float32[np.ndarray, "g D"],
    rows: Int64[np.ndarray, " n"],
    columns: Int64[np.ndarray, " n"],
    distance: Distance,
) -> Float64[np.ndarray, " n"]:
    """Inner product or squared l2 distance of pairs of *prepared* vectors, in float64.

    Equal pairs of vectors have bitwise equal values. Costs D operations a pair and 48 MiB.

    Raises:
        UsageError: for a distance between class probabilities.
    """
    check_embedding_distance(distance)
    values = np.empty(len(rows), dtype=np.float64)
    step = max(1, _NUMBERS_AT_A_TIME // max(1, queries.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        first = queries[rows[part]].astype(np.float64)
        second = gallery[columns[part]].astype(np.float64)
        if distance.larger_is_nearer:
            values[part] = np.multiply(first, second, out=first).sum(axis=1)
        else:
            gap = np.subtract(first, second, out=first)
            values[part] = np.multiply(gap, gap, out=second).sum(axis=1)
    return values


def check_embedding_distance(distance: Distance) -> None:
    """Whether a pair's value is an inner product or a squared distance of two embeddings.

    Raises:
        UsageError: if not.
    """
    if distance.space != "embedding":
        raise UsageError(
            f"{distance.name} compares class probabilities; verification and single pairs are "
            "computed for cosine and l2"
        )
