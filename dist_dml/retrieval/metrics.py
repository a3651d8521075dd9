"""Retrieval scores from the labels of each query's neighbours. Definitions: docs/evaluation.md.

R-precision and MAP@R are those of "A Metric Learning Reality Check" (Musgrave et al., ECCV 2020)
and of paper C's supplement (reference 4.7).

Dimensions: `q` queries, `k` neighbours of each, nearest first, `K` cut-offs of Recall@K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from dist_dml.errors import RunError, UsageError

NO_LABEL = -1
"""Stands where there is no neighbour. Labels of classes are 0 and above."""


@dataclass(frozen=True)
class QueryScores:
    """Scores of single queries: parts made anywhere are concatenated, and only then averaged."""

    recall_at: tuple[int, ...]
    """The K of Recall@K."""
    query_label: Int64[np.ndarray, " q"]
    nearest_label: Int64[np.ndarray, " q"]
    """Label of the nearest neighbour, -1 without one: the prediction that F1@1 judges."""
    recall_hits: Bool[np.ndarray, "q K"]
    """Whether the first K neighbours hold one of the query's class."""
    precision_at_1: Float64[np.ndarray, " q"]
    r_precision: Float64[np.ndarray, " q"]
    map_at_r: Float64[np.ndarray, " q"]
    has_match: Bool[np.ndarray, " q"]
    """Whether the gallery holds an item of the query's class, the query itself apart."""
    first_hit_rank: Int64[np.ndarray, " q"]
    """Rank of the nearest neighbour of the query's class, from 1; 0 where it is not known: behind
    the neighbours that were searched, or there is none. `first_hits` finds the rest."""

    @staticmethod
    def concatenate(parts: Sequence[QueryScores]) -> QueryScores:
        """The parts in the given order, which should be that of the workers.

        Raises:
            UsageError: if there are no parts, or they have different cut-offs.
        """
        if len({part.recall_at for part in parts}) != 1:
            cutoffs = [list(part.recall_at) for part in parts]
            raise UsageError(f"scores with recall_at {cutoffs} do not join; give one list to all")
        names = [name for name in QueryScores.__dataclass_fields__ if name != "recall_at"]
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return QueryScores(recall_at=parts[0].recall_at, **columns)


def score_queries(
    neighbour_labels: Int64[np.ndarray, "q k"],
    query_labels: Int64[np.ndarray, " q"],
    relevant_counts: Int64[np.ndarray, " q"],
    recall_at: Sequence[int],
) -> QueryScores:
    """Scores each query. With `h_j` = 1 if neighbour j has the query's class `y_i`, else 0:

        Recall@K_i    = max(h_1 .. h_K)
        R-precision_i = (h_1 + .. + h_R) / R                        R = relevant_counts[i]
        MAP@R_i       = (1/R) * sum over j <= R of h_j * (h_1 + .. + h_j) / j

    A query with R = 0 scores 0 everywhere, has `has_match` False and is left out of all means.

    Args:
        neighbour_labels: nearest first, without the query itself; -1 where there is no neighbour.
        query_labels: 0 and above.
        relevant_counts: `R`: gallery items of the query's class, the query itself apart.
        recall_at: the K of Recall@K.

    Raises:
        UsageError: if `k` is below the largest K or R (scores would be too low), or K < 1.
    """
    width = neighbour_labels.shape[1]
    largest_r = int(relevant_counts.max(initial=0))
    if min(recall_at, default=1) < 1:
        raise UsageError(f"evaluation.recall_at has {min(recall_at)}; every K must be at least 1")
    if width < max(largest_r, *recall_at, 1):
        raise UsageError(
            f"{width} neighbours a query cannot score R={largest_r} and "
            f"recall_at={list(recall_at)}; search for {max(largest_r, *recall_at, 1)}"
        )
    hits = neighbour_labels == query_labels[:, None]
    columns = [hits[:, :cutoff].any(axis=1) for cutoff in recall_at]
    ranks = np.arange(1, largest_r + 1)
    hits_to_r = hits[:, :largest_r] & (ranks <= relevant_counts[:, None])
    precision = hits_to_r.cumsum(axis=1) / ranks
    divisor = np.maximum(relevant_counts, 1)
    return QueryScores(
        recall_at=tuple(recall_at),
        query_label=query_labels,
        nearest_label=neighbour_labels[:, 0],
        recall_hits=np.stack(columns, axis=1) if columns else np.zeros((len(hits), 0), dtype=bool),
        precision_at_1=hits[:, 0].astype(np.float64),
        r_precision=hits_to_r.sum(axis=1) / divisor,
        map_at_r=(precision * hits_to_r).sum(axis=1) / divisor,
        has_match=relevant_counts > 0,
        first_hit_rank=np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, 0),
    )


def reciprocal_ranks(scores: QueryScores) -> Float64[np.ndarray, " q"]:
    """1 / rank of the first hit in the whole gallery; 0 for a query without a match.

    Raises:
        UsageError: if a first hit stands behind the searched neighbours and its rank is not known.
    """
    rank = scores.first_hit_rank
    unknown = scores.has_match & (rank == 0)
    if unknown.any():
        raise UsageError(
            f"the first hits of {unknown.sum()} queries stand behind the neighbours searched; let "
            "first_hits.complete_first_hits find them first"
        )
    return np.where(scores.has_match, 1.0 / np.maximum(rank, 1), 0.0)


def mean_reciprocal_rank(scores: QueryScores) -> float:
    """Mean of `reciprocal_ranks` over the queries that can be answered.

    Raises:
        UsageError: as `reciprocal_ranks`.
        RunError: if no query can be answered.
    """
    _check_answerable(scores)
    return float(reciprocal_ranks(scores)[scores.has_match].mean())


def macro_f1(truth: Int64[np.ndarray, " q"], prediction: Int64[np.ndarray, " q"]) -> float:
    """F1 of each class that occurs in `truth`, averaged with equal weights.

    Equal to `sklearn.metrics.f1_score(..., labels=np.unique(truth), average="macro")`. A class that
    is predicted but never true has no F1 of its own; it lowers the recall of the true ones.
    """
    return float(np.mean(class_f1(truth, prediction)))


def class_f1(
    truth: Int64[np.ndarray, " q"], prediction: Int64[np.ndarray, " q"]
) -> Float64[np.ndarray, " c"]:
    """F1 of each class that occurs in `truth`, in the order of the classes."""
    classes, position = np.unique(truth, return_inverse=True)
    true = np.bincount(position, minlength=len(classes))
    correct = np.bincount(position[truth == prediction], minlength=len(classes))
    place = np.searchsorted(classes, prediction).clip(max=len(classes) - 1)
    predicted = np.bincount(place[classes[place] == prediction], minlength=len(classes))
    return 2 * correct / (true + predicted)


def score_names(recall_at: Sequence[int]) -> list[str]:
    """The names of what `summarise` measures, where more is better; counts are not among them."""
    recalls = [f"recall_at_{k}" for k in recall_at]
    return [*recalls, "precision_at_1", "r_precision", "map_at_r", "f1_at_1"]


def summarise(scores: QueryScores) -> dict[str, float]:
    """Means over the queries that can be answered, F1@1 (`macro_f1` of the nearest label), counts.

    Returns:
        `recall_at_K` for every K, `precision_at_1`, `r_precision`, `map_at_r`, `f1_at_1` in 0..1,
        `num_queries` (all of them) and `num_queries_without_match` (left out of the means).

    Raises:
        RunError: if no query has a relevant gallery item.
    """
    _check_answerable(scores)
    kept = scores.has_match
    recalls = scores.recall_hits[kept].mean(axis=0)
    return {
        **{f"recall_at_{k}": float(v) for k, v in zip(scores.recall_at, recalls, strict=True)},
        "precision_at_1": float(scores.precision_at_1[kept].mean()),
        "r_precision": float(scores.r_precision[kept].mean()),
        "map_at_r": float(scores.map_at_r[kept].mean()),
        "f1_at_1": macro_f1(scores.query_label[kept], scores.nearest_label[kept]),
        "num_queries": float(len(kept)),
        "num_queries_without_match": float((~kept).sum()),
    }


def _check_answerable(scores: QueryScores) -> None:
    kept = scores.has_match
    if not kept.any():
        raise RunError(
            f"none of {len(kept)} queries has another image of its class in the gallery, so there "
            "is nothing to score; check the labels of evaluation.protocols' query and gallery"
        )
