"""Exact nearest neighbours by a distance between probability vectors: every pair is computed.

Dimensions: `q` queries, `g` gallery items, `C` classes, `k` neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from dist_dml.retrieval.distances import Distance
from dist_dml.retrieval.exact_values import as_tensor
from dist_dml.retrieval.neighbours import NO_NEIGHBOUR, check_search
from dist_dml.retrieval.probability_distances import (
    Reduction,
    metric_sums,
    pairwise_sums,
    squared_sums,
)

BUDGET_BYTES = 2**28
"""What a search holds beyond its inputs and results, whatever their size, as long as one query's
distances fit (8 bytes a gallery item)."""


def reduction_of(distance: Distance) -> Reduction:
    """How a `log_probability` distance adds up classes."""
    return squared_sums if distance.parameters is None else metric_sums(distance.parameters)


def probability_blocks(
    queries: Float32[np.ndarray, "q C"],
    gallery: Float32[np.ndarray, "g C"],
    k: int,
    distance: Distance,
    query_ids: Int64[np.ndarray, " q"] | None = None,
    gallery_ids: Int64[np.ndarray, " g"] | None = None,
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """The `k` nearest items block by block: (rows of `queries`, positions (b, k), L (b, k)).

    The contract of `neighbours.neighbour_blocks`, with these differences: vectors are
    log-probabilities, distances are float64 and L_m itself (the square for `probability_l2`), ties
    are in the order of the gallery, and an infinite L1 ranks behind every finite one. The same bit
    for bit for any slices of the queries and any number of threads. Costs q*g*C evaluations of the
    coordinate's distance (`probability_distances` says how long each) on torch's threads, and at
    most `BUDGET_BYTES`.
    """
    check_search(queries, gallery, k, query_ids, gallery_ids)
    own = own_positions(query_ids, gallery_ids)
    reduce_, items = reduction_of(distance), as_tensor(gallery)
    for rows in query_blocks(len(queries), len(gallery), k):
        excluded = None if own is None else own[rows]
        yield rows, *nearest_of(as_tensor(queries[rows]), items, k, reduce_, excluded)


def nearest_of(
    queries: Float32[Tensor, "b C"],
    gallery: Float32[Tensor, "g C"],
    k: int,
    reduce_: Reduction,
    own: Int64[np.ndarray, " b"] | None,
) -> tuple[Int64[np.ndarray, "b k"], Float64[np.ndarray, "b k"]]:
    """One block, all distances at once; `own` as from `own_positions`."""
    values = pairwise_sums(queries, gallery, reduce_).numpy()
    if own is not None:
        exclude_(values, own)
    return nearest_in_rows(values, k)


def query_blocks(num_queries: int, num_items: int, k: int) -> Iterator[slice]:
    """Slices of queries that take the budget: a distance to each item, `k` results, one sort."""
    step = max(1, BUDGET_BYTES // (8 * num_items + 16 * k) - 4)
    for start in range(0, num_queries, step):
        yield slice(start, min(start + step, num_queries))


def own_positions(
    query_ids: Int64[np.ndarray, " q"] | None, gallery_ids: Int64[np.ndarray, " g"] | None
) -> Int64[np.ndarray, " q"] | None:
    """Where each query itself stands in the gallery, -1 where it does not; None without ids."""
    if query_ids is None or gallery_ids is None:
        return None
    order = np.argsort(gallery_ids)
    place = np.searchsorted(gallery_ids, query_ids, sorter=order).clip(max=len(order) - 1)
    return np.where(gallery_ids[order[place]] == query_ids, order[place], -1)


def exclude_(values: Float64[np.ndarray, "b g"], own: Int64[np.ndarray, " b"]) -> None:
    """Marks each query's own item by NaN, which numpy sorts behind infinity: L1 may be infinite."""
    rows = np.flatnonzero(own >= 0)
    values[rows, own[rows]] = np.nan


def nearest_in_rows(
    values: Float64[np.ndarray, "b g"], k: int
) -> tuple[Int64[np.ndarray, "b k"], Float64[np.ndarray, "b k"]]:
    """Positions and values of the `k` smallest of each row, by value and then position.

    NaN is no candidate; where fewer than `k` remain, -1 and infinity follow. O(g) a row.
    """
    indices = np.full((len(values), k), NO_NEIGHBOUR, dtype=np.int64)
    distances = np.full((len(values), k), np.inf)
    for i, row in enumerate(values):
        limit = np.partition(row, k - 1)[k - 1] if k < len(row) else np.nan
        # All that tie with the last one are candidates; a partition alone picks any of them.
        some = np.flatnonzero(~np.isnan(row) if np.isnan(limit) else row <= limit)
        some = some[np.argsort(row[some], kind="stable")[:k]]
        indices[i, : len(some)], distances[i, : len(some)] = some, row[some]
    return indices, distances
