"""Who is searched for whom: queries among themselves, or in a separate gallery.

Every worker scores a contiguous slice of the queries against the whole gallery; the parts are
concatenated in worker order and averaged once. The scores are the same for any slicing.

Dimensions: `n` samples with embeddings of width `D`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from dist_dml.errors import RunError, UsageError
from dist_dml.retrieval.clustering import cluster_nmi
from dist_dml.retrieval.distances import Distance
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.gallery_search import DEFAULT, SearchSettings
from dist_dml.retrieval.metrics import NO_LABEL, QueryScores, score_queries, summarise
from dist_dml.retrieval.neighbours import NO_NEIGHBOUR
from dist_dml.retrieval.ranking import nearest_blocks


def relevant_counts(queries: Embeddings, gallery: Embeddings) -> Int64[np.ndarray, " q"]:
    """`R` of each query: gallery items of its class, without the one that has the query's id.

    Raises:
        UsageError: if a query and a gallery item share an id but not the label.
    """
    classes, counts = np.unique(gallery.labels, return_counts=True)
    place = np.searchsorted(classes, queries.labels).clip(max=len(classes) - 1)
    of_class = np.where(classes[place] == queries.labels, counts[place], 0)
    order = np.argsort(gallery.ids)
    place = order[np.searchsorted(gallery.ids, queries.ids, sorter=order).clip(max=len(order) - 1)]
    itself = gallery.ids[place] == queries.ids
    disagree = itself & (gallery.labels[place] != queries.labels)
    if disagree.any():
        row = int(disagree.argmax())
        raise UsageError(
            f"id {queries.ids[row]} has label {queries.labels[row]} among the queries and "
            f"{gallery.labels[place[row]]} in the gallery; "
            "number the samples of both splits together"
        )
    return of_class - itself


def score_slice(
    queries: Embeddings,
    gallery: Embeddings | None,
    query_slice: slice,
    distance: Distance,
    recall_at: Sequence[int],
    settings: SearchSettings = DEFAULT,
) -> QueryScores:
    """One worker's share of a measurement: the queries in `query_slice`, against the whole gallery.

    `QueryScores.concatenate` over slices that follow each other equals the scores of all queries,
    bit for bit: neighbours are ranked by exact values. Costs 2*s*g*D operations for a slice of s
    queries and about 80 bytes for each neighbour of a block of queries; by distances of
    probabilities s*g*C of `probability_distances`. Nothing is pruned: with as many neighbours as
    the largest class has, the last one is of another class, and hardly a bound exceeds it.

    Args:
        queries: all queries, also those of other workers.
        gallery: what is searched; None searches the queries themselves. Either way a query never
            finds the item with its own id, so with a separate gallery nothing is left out unless
            ids coincide, as when the training set is the gallery of some of its own images.
        query_slice: this worker's queries; may be empty.
        distance: what to rank by.
        recall_at: the K of Recall@K.
        settings: who searches, in how much memory; for distances of embeddings.
    """
    gallery = queries if gallery is None else gallery
    if len(queries) == 0 or len(gallery) == 0:
        raise RunError(
            f"{len(queries)} queries and {len(gallery)} gallery images: nothing to score; check "
            "the splits named in evaluation.protocols"
        )
    counts = relevant_counts(queries, gallery)
    k = max(int(counts.max()), *recall_at, 1)
    mine, counts = queries.rows(query_slice), counts[query_slice]
    blocks = nearest_blocks(mine, gallery, k, distance, settings)
    # The empty part keeps the arrays' types for a worker without queries.
    nothing = np.empty((0, k), dtype=np.int64)
    parts = [score_queries(nothing, mine.labels[:0], counts[:0], recall_at)]
    for rows, indices, _ in blocks:
        labels = np.where(indices == NO_NEIGHBOUR, NO_LABEL, gallery.labels[indices])
        parts.append(score_queries(labels, mine.labels[rows], counts[rows], recall_at))
    return QueryScores.concatenate(parts)


def measure(
    queries: Embeddings,
    gallery: Embeddings | None,
    distances: Sequence[Distance],
    recall_at: Sequence[int],
    nmi: bool,
    seed: int,
) -> dict[str, float]:
    """All scores of one protocol in one process: `cosine/recall_at_1`, `l2/map_at_r`, ...

    Args:
        queries: what is searched for.
        gallery: what is searched; None searches the queries themselves, each without itself.
        distances: what to rank by, one after the other.
        recall_at: the K of Recall@K.
        nmi: also cluster the queries and add `cosine/nmi`, ...; top-k variants have none.
        seed: of the clustering.
    """
    scores: dict[str, float] = {}
    for distance in distances:
        every = score_slice(queries, gallery, slice(0, len(queries)), distance, recall_at)
        for name, value in summarise(every).items():
            scores[f"{distance.name}/{name}"] = value
        if nmi and distance.has_nmi:
            value = cluster_nmi(queries.vectors, queries.labels, distance, seed)
            scores[f"{distance.name}/nmi"] = value
    return scores
