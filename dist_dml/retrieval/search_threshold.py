"""The line between neighbours of the query's class and others, from a gallery with labels.

Dimensions: `q` queries, `g` gallery items, `p` pairs.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Float64

from dist_dml.errors import UsageError
from dist_dml.retrieval.distances import Distance
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.neighbours import NO_NEIGHBOUR
from dist_dml.retrieval.ranking import nearest
from dist_dml.retrieval.verification import verify_pairs

NEIGHBOURS = 10


def verification_threshold(
    queries: Embeddings, gallery: Embeddings, distance: Distance, seed: int = 0
) -> float | None:
    """The best threshold of verification over all pairs of queries and gallery.

    See `verification.Verification.best_threshold`, which costs and draws as `verify_pairs`.

    Returns:
        None where there are no pairs of one class, or none of two.
    """
    try:
        return verify_pairs(queries, gallery, distance, seed).best_threshold()[0]
    except UsageError:
        return None


def neighbour_threshold(
    queries: Embeddings, gallery: Embeddings, distance: Distance
) -> float | None:
    """The value that tells best whether one of the ten nearest is of the query's class.

    Of the pairs of a query and one of its ten exact nearest neighbours, not itself, those of one
    class and those of two count the same in sum (balanced accuracy). It lies midway between the two
    values that it parts. These are the pairs that a search shows; over all pairs of a gallery, far
    more of which are of different classes and far apart, another threshold is best.

    Returns:
        None where all such pairs, or none, are of one class.
    """
    positions, values = nearest(queries, gallery, min(NEIGHBOURS, len(gallery)), distance)
    there = positions != NO_NEIGHBOUR
    labels = gallery.labels[np.maximum(positions, 0)]
    same = (labels == queries.labels[:, None])[there]
    near = values[there].astype(np.float64)
    return best_cut(near if distance.larger_is_nearer else -near, same, distance)


def best_cut(
    nearness: Float64[np.ndarray, " p"], same: Bool[np.ndarray, " p"], distance: Distance
) -> float | None:
    """The threshold with the best balanced accuracy; of equally good ones that of the nearest.

    None where all pairs are of one kind, or nearness tells nothing.

    Args:
        nearness: larger is nearer.
        same: whether a pair is of one class.
        distance: its values have the sign of the result.
    """
    if not same.any() or same.all():
        return None
    order = np.argsort(-nearness, kind="stable")
    ordered, hits = nearness[order], same[order]
    accepted: Float[np.ndarray, " p"] = np.cumsum(hits) / hits.sum()
    wrong = np.cumsum(~hits) / (~hits).sum()
    gain = accepted - wrong
    # A cut is between two values that differ, or behind the last one.
    is_cut = np.append(ordered[1:] < ordered[:-1], True)
    best = int(np.argmax(np.where(is_cut, gain, -np.inf)))
    if gain[best] <= 0:
        return None
    after = ordered[best + 1] if best + 1 < len(ordered) else ordered[best]
    cut = (ordered[best] + after) / 2
    return float(cut if distance.larger_is_nearer else -cut)
