"""Verification: are two images of the same class? Judged by one threshold on their similarity.

Retrieval asks who is nearest; verification asks whether a distance is near *enough*, the same for
all classes. A pair is accepted if its value is at least as near as the threshold.

    TAR = accepted pairs of the same class / all of them           (genuine pairs)
    FAR = accepted pairs of different classes / all of them        (impostor pairs)

Which pairs there are, and how they are counted: `pair_counts`. Dimensions: `b` bins, `e` = b + 1
thresholds between and around them, `n` pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float64

from dist_dml.errors import UsageError
from dist_dml.retrieval.distances import Distance
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.pair_counts import (
    MOST_GENUINE,
    MOST_IMPOSTORS,
    PairCounts,
    count_pairs,
)

FEWEST_ACCEPTED = 10
"""Impostor pairs that a FAR must accept for its TAR to be stated: with ten, the FAR itself is known
to about a third."""


@dataclass(frozen=True)
class Verification:
    """What thresholds accept. All values are those of the distance: cosines, squared l2."""

    counts: PairCounts
    larger_is_nearer: bool

    @cached_property
    def thresholds(self) -> Float64[np.ndarray, " e"]:
        """From the strictest, which accepts nothing, to the one that accepts every pair counted.

        The strictest lies a bin's width beyond the nearest edge, where duplicates are.
        """
        edges = self._nearest_first(self.counts.edges).copy()
        edges[0] += edges[0] - edges[1]
        return edges

    @cached_property
    def tar(self) -> Float64[np.ndarray, " e"]:
        """Share of genuine pairs that each threshold accepts, ascending from 0 to 1."""
        return _accepted(self._nearest_first(self.counts.genuine))

    @cached_property
    def far(self) -> Float64[np.ndarray, " e"]:
        """Share of impostor pairs that each threshold accepts, ascending from 0 to 1."""
        return _accepted(self._nearest_first(self.counts.impostor))

    @cached_property
    def prior(self) -> float:
        """Share of genuine pairs among all pairs, whether looked at or not."""
        totals = self.counts.totals
        return totals.genuine / (totals.genuine + totals.impostor)

    @property
    def is_sampled(self) -> bool:
        """Whether there were more pairs than were looked at."""
        counts = self.counts
        return (
            len(counts.genuine_values) < counts.totals.genuine
            or int(counts.impostor.sum()) < counts.totals.impostor
        )

    def threshold_at_far(self, false_accept_rate: float) -> float | None:
        """The loosest threshold whose FAR is at most this; None for too few impostor pairs."""
        place = self._place_at_far(false_accept_rate)
        return None if place is None else float(self.thresholds[place])

    def tar_at_far(self, false_accept_rate: float) -> float | None:
        """TAR at `threshold_at_far`: no interpolation, so never more than is reached.

        None where a FAR would accept fewer than ten of the impostor pairs looked at.
        """
        place = self._place_at_far(false_accept_rate)
        return None if place is None else float(self.tar[place])

    def best_threshold(self) -> tuple[float, float]:
        """The threshold of the largest balanced accuracy (TAR + 1 - FAR) / 2, and that accuracy.

        Balanced, because of all pairs nearly none are genuine: who refuses every pair is right
        nearly always. Where neighbouring thresholds are equally good, the middle one.
        """
        accuracy = (self.tar + 1 - self.far) / 2
        first = int(accuracy.argmax())
        worse = np.flatnonzero(accuracy[first:] < accuracy[first])
        last = first + (int(worse[0]) if len(worse) else len(accuracy) - first) - 1
        return float(self.thresholds[(first + last) // 2]), float(accuracy[first])

    def equal_error_rate(self) -> float:
        """Where as many impostors are accepted as genuine pairs refused (FAR = 1 - TAR).

        Between the two thresholds around that place, FAR and TAR are interpolated linearly.
        """
        difference = self.far - (1 - self.tar)
        right = int((difference >= 0).argmax())
        left = right - 1  # At the first threshold the difference is -1.
        way = difference[left] / (difference[left] - difference[right])
        return float(self.far[left] + way * (self.far[right] - self.far[left]))

    def roc_auc(self) -> float:
        """Chance that a genuine pair is nearer than an impostor pair; equal ones count half.

        Pairs in one bin count as equal.
        """
        return float(np.trapezoid(self.tar, self.far))

    def probability_same(
        self, values: Float64[np.ndarray, " n"], prior: float | None = None
    ) -> Float64[np.ndarray, " n"]:
        """The calibrated similarity: probability that pairs with these values are of one class.

        Isotonic regression of genuine against impostor pairs over the bins, each kind counted with
        the share it has among all pairs. The mean over the pairs it was made from is exactly their
        share of genuine ones. Values beyond those met get the probability of the nearest met.

        Args:
            values: as a search gives them: cosines, or squared l2 distances.
            prior: share of genuine pairs where it is applied, in 0..1 exclusive; None for that of
                all pairs here, which is small: 1 / 1000 for a thousand classes of equal size.

        Raises:
            UsageError: if the prior is outside 0..1.
        """
        if prior is not None and not 0 < prior < 1:
            raise UsageError(f"prior={prior} is no share of pairs; give one between 0 and 1")
        nearness = np.asarray(values, dtype=np.float64) * self._sign
        known, probability = self._calibration
        same = np.interp(nearness, known, probability)
        if prior is None:
            return same
        # Bayes: the odds of a pair are those of the prior times what its value says.
        odds = prior / (1 - prior) * (1 - self.prior) / self.prior
        return odds * same / (odds * same + (1 - same))

    def scores(self, false_accept_rates: Sequence[float]) -> dict[str, float]:
        """`tar_at_far_0.001`, ..., `best_threshold`, `best_accuracy` (balanced), `roc_auc`,
        `equal_error_rate`, `num_genuine_pairs`, `num_impostor_pairs` (of those looked at).

        A FAR for which there are too few impostor pairs has no score.
        """
        found: dict[str, float] = {}
        for rate in false_accept_rates:
            accepted = self.tar_at_far(rate)
            if accepted is not None:
                found[f"tar_at_far_{rate:g}"] = accepted
        found["best_threshold"], found["best_accuracy"] = self.best_threshold()
        found["equal_error_rate"] = self.equal_error_rate()
        found["roc_auc"] = self.roc_auc()
        found["num_genuine_pairs"] = float(len(self.counts.genuine_values))
        found["num_impostor_pairs"] = float(self.counts.impostor.sum())
        return found

    @property
    def _sign(self) -> float:
        return 1.0 if self.larger_is_nearer else -1.0

    def _nearest_first(self, by_bin: np.ndarray) -> np.ndarray:
        return by_bin[::-1] if self.larger_is_nearer else by_bin

    def _place_at_far(self, rate: float) -> int | None:
        check_false_accept_rate(rate)
        if rate * int(self.counts.impostor.sum()) < FEWEST_ACCEPTED:
            return None
        return int(np.searchsorted(self.far, rate, side="right")) - 1

    @cached_property
    def _calibration(self) -> tuple[np.ndarray, np.ndarray]:
        """Nearness, ascending, and the probability there; linear between."""
        from sklearn.isotonic import IsotonicRegression

        counts = self.counts
        genuine = counts.genuine * (counts.totals.genuine / counts.genuine.sum())
        impostor = counts.impostor * (counts.totals.impostor / counts.impostor.sum())
        both = genuine + impostor
        met = both > 0
        nearness = ((counts.edges[:-1] + counts.edges[1:]) / 2)[met] * self._sign
        order = np.argsort(nearness)
        regression = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")
        regression.fit(nearness[order], (genuine[met] / both[met])[order], both[met][order])
        return regression.X_thresholds_, regression.y_thresholds_


def _accepted(nearest_first: np.ndarray) -> np.ndarray:
    sums = np.concatenate([[0], np.cumsum(nearest_first)])
    return sums / sums[-1]


def check_false_accept_rate(rate: float) -> None:
    """Refuses what is no share of pairs.

    Raises:
        UsageError: if it is not between 0 and 1, or one of these.
    """
    if not 0 < rate < 1:
        raise UsageError(f"false_accept_rates has {rate}; give shares between 0 and 1, as 0.001")


def verify_pairs(
    queries: Embeddings,
    gallery: Embeddings | None,
    distance: Distance,
    seed: int = 0,
    most_genuine: int = MOST_GENUINE,
    most_impostors: int = MOST_IMPOSTORS,
) -> Verification:
    """Verification over all pairs of queries and gallery items, or of two queries.

    Arguments, costs and errors are those of `pair_counts.count_pairs`.
    """
    counts = count_pairs(queries, gallery, distance, seed, most_genuine, most_impostors)
    return Verification(counts, distance.larger_is_nearer)
