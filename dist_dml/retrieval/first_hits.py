"""The rank of the first hit of queries that have none among their searched neighbours.

Recall@K, R-precision and MAP@R look at a few neighbours; the reciprocal rank needs the place of the
nearest item of the query's class wherever it stands. It is found without sorting the gallery: the
nearest own item first, then the number of items that are nearer.

Dimensions: `q` queries, `g` gallery items, embeddings of width `D`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float64, Int64

from dist_dml.errors import UsageError
from dist_dml.retrieval.class_pairs import class_pairs, pair_values
from dist_dml.retrieval.distances import Distance
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.metrics import QueryScores
from dist_dml.retrieval.probability_distances import as_tensor
from dist_dml.retrieval.ranking import nearest_blocks

_TILE_ROWS = 512
_TILE_COLUMNS = 4096
_SEARCHED_AT_A_TIME = 64


def complete_first_hits(
    scores: QueryScores, queries: Embeddings, gallery: Embeddings, distance: Distance
) -> QueryScores:
    """`scores` with `first_hit_rank` of every query that has a match.

    Only queries whose first hit stands behind the searched neighbours cost anything: by cosine and
    l2 2*g*D operations in float64 each, in tiles of 16 MiB; by distances of class probabilities one
    search of the whole gallery. The rank of an item is 1 + the number of items nearer, and of
    items of the same value with a smaller id; the query's own item has none. The same for any
    slices of the queries.

    Args:
        scores: of exactly these queries, in their order.
        queries: a worker's slice, or all.
        gallery: what was searched; the queries themselves if there is no other.
        distance: by which the neighbours were searched.

    Raises:
        UsageError: if `scores` are of other queries.
    """
    if not np.array_equal(scores.query_label, queries.labels):
        raise UsageError(
            f"scores of {len(scores.query_label)} queries do not belong to these {len(queries)}; "
            "give the queries that were scored, in their order"
        )
    missed = np.flatnonzero(scores.has_match & (scores.first_hit_rank == 0))
    if not len(missed):
        return scores
    find = _counted_ranks if distance.space == "embedding" else _searched_ranks
    rank = scores.first_hit_rank.copy()
    found = find(queries.rows(missed), gallery, distance)
    # The search has looked at these; where values are a rounding apart, its order counts.
    rank[missed] = np.maximum(found, max(scores.recall_at, default=0) + 1)
    return replace(scores, first_hit_rank=rank)


def _searched_ranks(
    queries: Embeddings, gallery: Embeddings, distance: Distance
) -> Int64[np.ndarray, " q"]:
    """By the whole ranking of the gallery, for few queries at a time."""
    ranks = np.zeros(len(queries), dtype=np.int64)
    for start in range(0, len(queries), _SEARCHED_AT_A_TIME):
        part = queries.rows(slice(start, start + _SEARCHED_AT_A_TIME))
        for rows, positions, _ in nearest_blocks(part, gallery, len(gallery), distance):
            # Position -1 stands last, where no first hit is.
            hits = gallery.labels[positions] == part.labels[rows, None]
            hits &= positions >= 0
            ranks[start + rows.start : start + rows.stop] = hits.argmax(axis=1) + 1
    return ranks


def _counted_ranks(
    queries: Embeddings, gallery: Embeddings, distance: Distance
) -> Int64[np.ndarray, " q"]:
    """By the value of the nearest own item, and how many items have a nearer one."""
    left, right = distance.prepare(queries.vectors), distance.prepare(gallery.vectors)
    sign = -1.0 if distance.larger_is_nearer else 1.0  # What is small is near.
    nearest = np.full(len(queries), np.inf)
    smallest_id = np.full(len(queries), np.iinfo(np.int64).max)
    for rows, columns in class_pairs(queries, gallery):
        far = sign * pair_values(left, right, rows, columns, distance)
        # All pairs of a query come together: its first row in order of distance, then id, is it.
        order = np.lexsort((gallery.ids[columns], far, rows))
        query, first = np.unique(rows[order], return_index=True)
        nearest[query] = far[order][first]
        smallest_id[query] = gallery.ids[columns][order][first]
    ranks = np.ones(len(queries), dtype=np.int64)
    right_lengths = _squared_lengths(right)
    for start in range(0, len(queries), _TILE_ROWS):
        rows = slice(start, min(start + _TILE_ROWS, len(queries)))
        a, lengths = as_tensor(left[rows]).double(), _squared_lengths(left[rows])
        limit = torch.from_numpy(nearest[rows, None])
        for first in range(0, len(gallery), _TILE_COLUMNS):
            columns = slice(first, min(first + _TILE_COLUMNS, len(gallery)))
            far = a @ as_tensor(right[columns]).double().T
            both = lengths[:, None] + right_lengths[None, columns]
            far = both - 2 * far if not distance.larger_is_nearer else -far
            # Rounding of a float64 sum: values within it are the same, such as those of duplicates.
            slack = (a.shape[1] + 8) * 2.0**-51 * both
            nearer = far < limit - slack
            tied = (far <= limit + slack) & ~nearer
            smaller = gallery.ids[columns][None, :] < smallest_id[rows, None]
            other = gallery.labels[columns][None, :] != queries.labels[rows, None]
            counted = nearer | (tied & torch.from_numpy(smaller))
            ranks[rows] += (counted & torch.from_numpy(other)).sum(dim=1).numpy()
    return ranks


def _squared_lengths(vectors: np.ndarray) -> Float64[torch.Tensor, " n"]:
    return torch.from_numpy(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
