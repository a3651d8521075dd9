"""One door to all searches: the distance decides who computes it. And how alike rankings are.

Dimensions: `q` queries, `g` gallery items, `k` neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from jaxtyping import Float64, Int64

from dist_dml.errors import UsageError
from dist_dml.retrieval.distances import Distance
from dist_dml.retrieval.embeddings import Embeddings, check_space
from dist_dml.retrieval.gallery_search import DEFAULT, SearchSettings
from dist_dml.retrieval.neighbours import NO_NEIGHBOUR, neighbour_blocks
from dist_dml.retrieval.probability_neighbours import probability_blocks
from dist_dml.retrieval.sparse_neighbours import sparse_blocks, truncate


def nearest_blocks(
    queries: Embeddings,
    gallery: Embeddings,
    k: int,
    distance: Distance,
    settings: SearchSettings = DEFAULT,
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """The `k` gallery items nearest to each query, without the one of the query's own id.

    Yields:
        Rows of `queries`, positions (b, k) in the gallery and values (b, k), nearest first; -1 and
        the farthest value where fewer than `k` remain. Blocks follow each other.

    Raises:
        UsageError: if vectors are not what the distance is computed from, or do not fit together.
    """
    check_space(queries, distance)
    check_space(gallery, distance)
    vectors, ids = (queries.vectors, gallery.vectors), (queries.ids, gallery.ids)
    if distance.space == "embedding":
        return neighbour_blocks(*vectors, k, distance, *ids, settings)
    if distance.space == "log_probability":
        return probability_blocks(*vectors, k, distance, *ids)
    return sparse_blocks(queries, gallery, k, distance)


def nearest(
    queries: Embeddings,
    gallery: Embeddings,
    k: int,
    distance: Distance,
    settings: SearchSettings = DEFAULT,
) -> tuple[Int64[np.ndarray, "q k"], Float64[np.ndarray, "q k"]]:
    """`nearest_blocks`, put together: gallery positions and values."""
    indices = np.full((len(queries), k), NO_NEIGHBOUR, dtype=np.int64)
    values = np.full((len(queries), k), distance.farthest)
    for rows, *found in nearest_blocks(queries, gallery, k, distance, settings):
        indices[rows], values[rows] = found
    return indices, values


def top_agreement(
    queries: Embeddings,
    gallery: Embeddings | None,
    distance: Distance,
    overlap_at: int = 10,
    spearman_at: int = 100,
) -> dict[str, float]:
    """How alike the rankings by the full L_m and by its top-k variant are, for the same queries.

    Costs both searches; for many classes give some rows of queries and gallery.

    Args:
        queries: *full* log-probabilities; they are truncated here.
        gallery: likewise; None searches the queries themselves, each without itself.
        distance: the top-k variant, such as `named_distance("metric(p=0.1,top=64)")`.
        overlap_at: see `rank_agreement`.
        spearman_at: see `rank_agreement`.

    Raises:
        UsageError: if the distance is not a top-k variant.
    """
    if distance.space != "top_log_probability":
        raise UsageError(
            f"{distance.name} is no top-k variant; compare one such as metric(p=0.1,top=64) with "
            "the full distance"
        )
    gallery = queries if gallery is None else gallery
    k = max(overlap_at, spearman_at)
    full = replace(distance, space="log_probability", top=0)
    whole, _ = nearest(queries, gallery, k, full)
    part, _ = nearest(truncate(queries, distance), truncate(gallery, distance), k, distance)
    return rank_agreement(whole, part, overlap_at, spearman_at)


def rank_agreement(
    full: Int64[np.ndarray, "q k"],
    sparse: Int64[np.ndarray, "q k"],
    overlap_at: int = 10,
    spearman_at: int = 100,
) -> dict[str, float]:
    """How alike two rankings of the same queries are, as means over the queries.

    Args:
        full: neighbours by one distance, nearest first, -1 where there is none.
        sparse: by the other.
        overlap_at: K of the overlap.
        spearman_at: R of the correlation; lists that are shorter are compared as they are.

    Returns:
        `rank_overlap_at_K`, the share of the first K neighbours that both have, and
        `rank_spearman_at_R`, the correlation of the ranks of all items among the first R of either
        list. Those that one list lacks share the mean of the ranks behind it there. 1 is the same
        order; lists without a common item score -0.85 or less.

    Raises:
        UsageError: if the arrays have different shapes.
    """
    if full.shape != sparse.shape or full.size == 0:
        raise UsageError(
            f"rankings {full.shape} and {sparse.shape} cannot be compared; give the same number of "
            "neighbours of the same queries"
        )
    overlaps, correlations = [], []
    for first, second in zip(full, sparse, strict=True):
        a, b = (row[row != NO_NEIGHBOUR] for row in (first, second))
        common = np.intersect1d(a[:overlap_at], b[:overlap_at])
        overlaps.append(len(common) / max(1, min(overlap_at, len(a))))
        correlations.append(_spearman(a[:spearman_at], b[:spearman_at]))
    return {
        f"rank_overlap_at_{overlap_at}": float(np.mean(overlaps)),
        f"rank_spearman_at_{spearman_at}": float(np.mean(correlations)),
    }


def _spearman(first: np.ndarray, second: np.ndarray) -> float:
    union = np.union1d(first, second)
    ranks = []
    for row in (first, second):
        ranks.append(np.full(len(union), (len(row) + 1 + len(union)) / 2))
        ranks[-1][np.searchsorted(union, row)] = np.arange(1, len(row) + 1)
    a, b = (rank - rank.mean() for rank in ranks)
    spread = float(np.sqrt((a @ a) * (b @ b)))
    # A list of one item, or none, has no order to differ in.
    return float(a @ b) / spread if spread > 0 else 1.0
