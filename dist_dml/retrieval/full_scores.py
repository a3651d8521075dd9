"""Everything that is measured by one distance, from one search: for anybody's embeddings.

`protocol.score_slice` searches, and everything else here follows from its `QueryScores`, from one
k-means and from one pass over the pairs. Definitions: docs/evaluation.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dist_dml.errors import UsageError
from dist_dml.retrieval.clustering import cluster_scores
from dist_dml.retrieval.distances import Distance
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.first_hits import complete_first_hits
from dist_dml.retrieval.intervals import check_bootstrap, score_intervals
from dist_dml.retrieval.metrics import QueryScores, mean_reciprocal_rank, summarise
from dist_dml.retrieval.pair_counts import pair_totals
from dist_dml.retrieval.protocol import score_slice
from dist_dml.retrieval.verification import (
    Verification,
    check_false_accept_rate,
    verify_pairs,
)


@dataclass(frozen=True)
class ScoreOptions:
    """What is measured beside the retrieval scores, and how."""

    recall_at: tuple[int, ...] = (1, 2, 4, 8)
    """The K of Recall@K."""
    nmi: bool = False
    """NMI and AMI: for many classes they cost more than the search."""
    seed: int = 0
    """Of the clustering, the resamples and the draw of pairs."""
    resamples: int = 1000
    """Of the bootstrap; 0 for no intervals."""
    confidence: float = 0.95
    false_accept_rates: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4)
    verification: bool = True

    def __post_init__(self) -> None:
        check_bootstrap(self.resamples, self.confidence)
        for rate in self.false_accept_rates:
            check_false_accept_rate(rate)
        if min(self.recall_at, default=1) < 1:
            raise UsageError(f"recall_at has {min(self.recall_at)}; every K must be at least 1")


@dataclass(frozen=True)
class DistanceScores:
    """What was measured by one distance."""

    scores: dict[str, float]
    """By name; what could not be measured is absent and never NaN."""
    queries: QueryScores
    """Of every query, for groups and pictures, with the ranks of all first hits."""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Low and high end, by the name of the score."""
    verification: Verification | None = None
    """None if it was not asked for, the distance compares class probabilities, or there are no two
    kinds of pairs."""


def score_everything(
    queries: Embeddings, gallery: Embeddings | None, distance: Distance, options: ScoreOptions
) -> DistanceScores:
    """All scores by one distance, in this process.

    Costs one search, `complete_first_hits`, and by `options` one k-means, one pass over the pairs
    and the bootstrap. Several folds: `protocol_scores.concatenate` makes one of their embeddings.

    Args:
        queries: what is searched for.
        gallery: what is searched; None searches the queries themselves, each without itself.
        distance: what to rank by.
        options: what is measured.

    Raises:
        UsageError: if an id is there twice, widths differ, or an id has two labels.
        RunError: if there are no images, or no query has a match.
    """
    ids, counts = np.unique(queries.ids, return_counts=True)
    if len(ids) < len(queries):
        raise UsageError(
            f"query id {ids[counts.argmax()]} stands for {counts.max()} items; ids must be unique"
        )
    searched = queries if gallery is None else gallery
    if queries.vectors.shape[1] != searched.vectors.shape[1]:
        raise UsageError(
            f"queries are {queries.vectors.shape[1]} wide and the gallery "
            f"{searched.vectors.shape[1]}; embed both with the same model"
        )
    every = slice(0, len(queries))
    scores = score_slice(queries, gallery, every, distance, options.recall_at)
    scores = complete_first_hits(scores, queries, searched, distance)
    return scores_of_queries(scores, queries, gallery, distance, options)


def scores_of_queries(
    scores: QueryScores,
    queries: Embeddings,
    gallery: Embeddings | None,
    distance: Distance,
    options: ScoreOptions,
) -> DistanceScores:
    """`score_everything` behind the search: of all queries, with the ranks of their first hits."""
    found = summarise(scores)
    found["mean_reciprocal_rank"] = mean_reciprocal_rank(scores)
    if options.nmi and distance.has_nmi:
        found |= cluster_scores(queries.vectors, queries.labels, distance, options.seed)
    verification = None
    if options.verification and distance.space == "embedding":
        totals = pair_totals(queries, gallery)
        if totals.genuine and totals.impostor:
            verification = verify_pairs(queries, gallery, distance, options.seed)
            found |= verification.scores(options.false_accept_rates)
    intervals = score_intervals(scores, options.resamples, options.confidence, options.seed)
    return DistanceScores(found, scores, intervals, verification)
