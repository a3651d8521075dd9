"""How much scores would move with other classes: bootstrap intervals over classes.

Queries of one class are not independent: they have the same gallery images, and fail together.
Resampling single queries would take them for as many observations and make intervals too narrow.
Therefore whole classes are drawn, with replacement, and a score is computed of all their queries
(cluster bootstrap; Davison and Hinkley, 1997, ch. 3.8). What a draw repeats is the queries; the
gallery stays. An interval speaks of other classes, not of another training with another seed.

Dimensions: `q` queries, `c` classes, `m` scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from dist_dml.errors import UsageError
from dist_dml.keyed_random import generator, key_of
from dist_dml.retrieval.metrics import QueryScores, class_f1, reciprocal_ranks

_NUMBERS_AT_A_TIME = 2**20


@dataclass(frozen=True)
class ClassSums:
    """Scores added up within each class: all that a resample of classes needs."""

    names: tuple[str, ...]
    classes: Int64[np.ndarray, " c"]
    """Ascending: those with a query that can be answered."""
    sums: Float64[np.ndarray, "c m"]
    weights: Float64[np.ndarray, "c m"]
    """What each sum is divided by: queries, or 1 where a class counts once (F1@1)."""

    def means(self) -> dict[str, float]:
        """The scores themselves."""
        values = self.sums.sum(axis=0) / self.weights.sum(axis=0)
        return dict(zip(self.names, values.tolist(), strict=True))


def class_sums(scores: QueryScores) -> ClassSums:
    """Sums of `recall_at_K`, `precision_at_1`, `r_precision`, `map_at_r`, `f1_at_1`.

    And of `mean_reciprocal_rank`, where the rank of every first hit is known. F1 of a class stays
    what it is with all queries: a resample changes how often it counts.
    """
    kept = scores.has_match
    columns = {f"recall_at_{k}": scores.recall_hits[:, i] for i, k in enumerate(scores.recall_at)}
    for name in ("precision_at_1", "r_precision", "map_at_r"):
        columns[name] = getattr(scores, name)
    if bool((scores.first_hit_rank[kept] > 0).all()):
        columns["mean_reciprocal_rank"] = reciprocal_ranks(scores)
    labels = scores.query_label[kept]
    classes, place = np.unique(labels, return_inverse=True)
    sums = [np.bincount(place, one[kept], minlength=len(classes)) for one in columns.values()]
    counts = np.bincount(place, minlength=len(classes)).astype(np.float64)
    f1 = class_f1(labels, scores.nearest_label[kept]) if len(labels) else np.zeros(0)
    return ClassSums(
        names=(*columns, "f1_at_1"),
        classes=classes,
        sums=np.stack([*sums, f1], axis=1),
        weights=np.stack([counts] * len(sums) + [np.ones(len(classes))], axis=1),
    )


def score_intervals(
    scores: QueryScores, resamples: int, confidence: float, seed: int
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of the scores of `class_sums`, by name.

    Empty where fewer than two classes can be answered: there is nothing to resample. The same for
    the same queries and seed, hence for any number of workers. Costs `resamples * c` draws (10^4
    classes and 1000 resamples: about 0.1 s) and 32 MiB.

    Args:
        scores: of all queries.
        resamples: how many; 0 for no intervals.
        confidence: share of the resamples between the ends.
        seed: of the draws. Classes of two models that stand at the same place are drawn together.

    Raises:
        UsageError: if the confidence is no share, or resamples are below 0.
    """
    check_bootstrap(resamples, confidence)
    sums = class_sums(scores)
    if len(sums.classes) < 2 or not resamples:
        return {}
    drawn = _resampled(sums, resamples, seed)
    return dict(zip(sums.names, _percentiles(drawn, confidence), strict=True))


def difference_intervals(
    first: QueryScores, second: QueryScores, resamples: int, confidence: float, seed: int
) -> dict[str, tuple[float, float, float]]:
    """`second - first` of each score with its interval (difference, low, high), over same classes.

    Paired: both are resampled with the same draws of classes, so what is hard for both does not
    widen the interval. An interval without 0 is a difference that other classes would show too.

    Args:
        first: of one model.
        second: of another, with queries of the same classes (not necessarily the same queries).
        resamples: as `score_intervals`.
        confidence: as `score_intervals`.
        seed: as `score_intervals`.

    Raises:
        UsageError: if the answerable classes differ, as well as for those of `score_intervals`.
    """
    check_bootstrap(resamples, confidence)
    sums, others = class_sums(first), class_sums(second)
    if not np.array_equal(sums.classes, others.classes):
        raise UsageError(
            f"a paired difference needs the same classes; {len(sums.classes)} and "
            f"{len(others.classes)} are not all the same; evaluate both on the same images"
        )
    if len(sums.classes) < 2 or not resamples:
        return {}
    common = [name for name in sums.names if name in others.names]
    columns = [[one.names.index(name) for name in common] for one in (sums, others)]
    drawn = _resampled(others, resamples, seed)[:, columns[1]]
    drawn -= _resampled(sums, resamples, seed)[:, columns[0]]
    before, after = sums.means(), others.means()
    ends = _percentiles(drawn, confidence)
    return {
        name: (after[name] - before[name], low, high)
        for name, (low, high) in zip(common, ends, strict=True)
    }


def _resampled(sums: ClassSums, resamples: int, seed: int) -> Float64[np.ndarray, "resamples m"]:
    """Scores of each resample, a few resamples at a time."""
    count = len(sums.classes)
    draw = generator(key_of(seed, "bootstrap of classes"))
    step = max(1, _NUMBERS_AT_A_TIME // count)
    found = np.empty((resamples, len(sums.names)))
    for start in range(0, resamples, step):
        some = min(step, resamples - start)
        drawn = draw.integers(0, count, (some, count))
        drawn += np.arange(some)[:, None] * count
        often = np.bincount(drawn.ravel(), minlength=some * count).reshape(some, count)
        # Not BLAS, whose order of additions depends on the threads that a worker was given.
        above, below = (np.einsum("rc,cm->rm", often, x) for x in (sums.sums, sums.weights))
        found[start : start + some] = above / below
    return found


def _percentiles(drawn: Float64[np.ndarray, "r m"], confidence: float) -> list[tuple[float, float]]:
    outside = (1 - confidence) / 2
    low, high = np.quantile(drawn, [outside, 1 - outside], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def check_bootstrap(resamples: int, confidence: float) -> None:
    """Refuses what makes no interval.

    Raises:
        UsageError: if the confidence is no share, or resamples are below 0.
    """
    if resamples < 0:
        raise UsageError(f"resamples={resamples}; give 0 (no intervals) or more, as 1000")
    if not 0 < confidence < 1:
        raise UsageError(f"confidence={confidence}; give a share between 0 and 1, as 0.95")
