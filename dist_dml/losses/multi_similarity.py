"""The multi-similarity loss, with and without its miner.

Wang et al., "Multi-Similarity Loss with General Pair Weighting", CVPR 2019. Of one anchor i, with
similarities s_ij:

    (1/a) log(1 + sum over positives j of exp(-a (s_ij - l)))
      + (1/b) log(1 + sum over negatives j of exp(b (s_ij - l)))

Dimensions: m anchors of a block, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.losses.pairs import AnchorLoss, Pairs


@dataclass(frozen=True)
class MultiSimilarity:
    """The loss above, a mean over all rows that are not ignored.

    Equal to pytorch-metric-learning's `MultiSimilarityLoss` with its `MeanReducer` (the default of
    both), and with `MultiSimilarityMiner` where there is an `epsilon`. An anchor without positives
    has the negatives' term alone, and the other way round; without any pair it adds 0. Its weight
    is 1 in all cases, so that the same anchor counts as much whatever else the batch holds. (That
    library returns 0 when all of a batch has but one pair of either kind.)

    Attributes:
        alpha: a, sharpness over positives. 2 in the paper and for CUB and SOP in paper C, which
            takes 14.35 for Cars196 and 8.49 for In-Shop.
        beta: b, sharpness over negatives: 40 in paper C for CUB and SOP, 75.83 for Cars196, 57.38
            for In-Shop; 50 in pytorch-metric-learning.
        base: l, where a pair begins to matter: .5; .66 for Cars196 and .41 for In-Shop in paper C.
        epsilon: the miner's slack, None for all pairs (paper C); .1 in pytorch-metric-learning.
        comparison: "inner" for rows in the unit ball, of length below 1 (paper C).
    """

    alpha: float = 2.0
    beta: float = 40.0
    base: float = 0.5
    epsilon: float | None = None
    comparison: Literal["cosine", "inner"] = "cosine"

    def __post_init__(self) -> None:
        """Raises UsageError unless alpha and beta are positive."""
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not value > 0:
                raise UsageError(
                    f"multi-similarity loss: got {name} {value:g}, expected a number above 0"
                )

    def of_anchors(self, pairs: Pairs) -> AnchorLoss:
        """See `PairLoss`. Five or six buffers of m x R numbers, half of them kept."""
        same, other = pairs.same, pairs.other
        if self.epsilon is not None:
            same, other = mined_pairs(pairs, self.epsilon)
        from_base = pairs.values - self.base
        values = _log_one_plus_sum(-self.alpha * from_base, same) / self.alpha
        values = values + _log_one_plus_sum(self.beta * from_base, other) / self.beta
        weights = pairs.same.any(1) | pairs.other.any(1)  # Of rows that are not ignored.
        return AnchorLoss(values, weights.to(values.dtype))


def mined_pairs(pairs: Pairs, epsilon: float) -> tuple[Bool[Tensor, "m R"], Bool[Tensor, "m R"]]:
    """The pairs of an anchor that say something beside its others: the paper's mining step.

    A positive stays if it is less similar than the most similar negative plus epsilon; a negative
    if it is more similar than the least similar positive minus epsilon. None stays of an anchor
    without positives or without negatives.

    Args:
        pairs: with similarities.
        epsilon: slack.

    Returns:
        Positives and negatives that stay.
    """
    similarities, infinity = pairs.values.detach(), float("inf")
    least_positive = similarities.masked_fill(~pairs.same, infinity).amin(1, keepdim=True)
    most_negative = similarities.masked_fill(~pairs.other, -infinity).amax(1, keepdim=True)
    # In this order of operations the library's choices come out to the last bit.
    positives = pairs.same & (similarities - epsilon < most_negative)
    negatives = pairs.other & (similarities + epsilon > least_positive)
    return positives, negatives


def _log_one_plus_sum(
    exponents: Float[Tensor, "m R"], counted: Bool[Tensor, "m R"]
) -> Float[Tensor, " m"]:
    """log(1 + sum of exp) over the counted entries of each row, finite at any exponents.

    0, with no gradient, where none is counted.
    """
    # Not -inf: rows of nothing else, the rule among very many classes, would have gradients of nan
    # in between, which PyTorch's anomaly detection takes for an error.
    nothing = torch.finfo(exponents.dtype).min / 4
    logarithm = exponents.masked_fill(~counted, nothing).logsumexp(1)
    return torch.logaddexp(logarithm, torch.zeros_like(logarithm))
