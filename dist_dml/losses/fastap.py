"""FastAP: average precision of each anchor's ranking, from a soft histogram of its distances.

Cakir et al., "Deep metric learning to rank" (CVPR 2019); paper B, eq. 37.

Dimensions: m anchors, R rows, b + 1 centres of b bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.losses.pairs import AnchorLoss, Comparison, Pairs

_FARTHEST = 4.0
"""The largest squared distance of two rows of norm 1."""


@dataclass(frozen=True)
class FastAP:
    """1 - FastAP of each anchor, averaged over anchors that have a positive:

        FastAP_i = 1/N+ sum_d h+(d) H+(d) / H(d)

    with h+ the histogram of the positives' squared distances 2 - 2 cos, and H+ and H the cumulated
    histograms of the positives and of all rows. (That is eq. 37 with P(D <= d) where it prints
    P(D < d): a bin counts towards its own precision, as in the authors' code; otherwise the first
    bin would be 0/0.) A distance falls into the two nearest of b + 1 evenly spaced centres in
    [0, 4], linearly, so that the histogram has gradients. Equal to pytorch-metric-learning's
    `FastAPLoss(num_bins=b)`.

    The loss is smooth but for kinks where a distance is a centre; the gradient there is that of the
    bin above. Costs a few passes over the block, whatever the number of bins.

    Attributes:
        bins: b.
    """

    bins: int = 10

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise UsageError(f"bins is {self.bins}, but FastAP needs at least 1: set it to 10")

    @property
    def comparison(self) -> Comparison:
        """Cosines."""
        return "cosine"

    def of_anchors(self, pairs: Pairs) -> AnchorLoss:
        """See `PairLoss`. The weight is 1 for each anchor that has a positive."""
        squares = (2 - 2 * pairs.values).clamp(0, _FARTHEST)
        position = squares * (self.bins / _FARTHEST)
        # The last bin includes the farthest distance.
        lower = position.detach().floor().clamp_max(self.bins - 1)
        share, lower = position - lower, lower.long()
        positives = self._histogram(lower, share, pairs.same)
        below = positives.cumsum(1)
        below_of_all = below + self._histogram(lower, share, pairs.other).cumsum(1)
        # Where nothing is below, positives are 0 as well.
        precision = below / torch.where(below_of_all > 0, below_of_all, 1)
        count = pairs.same.sum(1)
        average = (positives * precision).sum(1) / count.clamp_min(1)
        values = torch.where(count > 0, 1 - average, 0)
        return AnchorLoss(values, (count > 0).to(values.dtype))

    def _histogram(
        self, lower: Int[Tensor, "m R"], share: Float[Tensor, "m R"], chosen: Bool[Tensor, "m R"]
    ) -> Float[Tensor, "m b1"]:
        """What the chosen pairs add to each bin's centre.

        Args:
            lower: the nearest centre below the distance.
            share: of the distance that belongs to the next centre.
            chosen: the pairs.
        """
        # A pulse a bin, as usual, would keep bins * m * R numbers for the backward pass.
        of_upper = torch.where(chosen, share, 0)
        of_lower = chosen.to(share.dtype) - of_upper
        empty = share.new_zeros(len(share), self.bins + 1)
        return empty.scatter_add(1, lower, of_lower).scatter_add(1, lower + 1, of_upper)
