"""The triplet loss [d_ap - d_an + margin]_+ with the usual minings.

No triplet is ever written down. With t_p = d_ap + margin, the sum over an anchor's triplets of
[t_p - d_an]_+ is

    sum_p k_p t_p - sum_n c_n d_an,     k_p = #{n: d_an < t_p},     c_n = #{p: t_p > d_an}

whose counts are found by binary search among the anchor's P positives, and are constants to the
gradient: R log P operations and a few buffers of R numbers for each anchor, of P (R - P) triplets.

Dimensions: m anchors of a block, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.losses.pairs import AnchorLoss, Comparison, Pairs

Mining = Literal["all", "semihard", "batch_hard", "easy_positive", "easy_positive_semihard"]
"""Which triplets of an anchor count:

- `all`.
- `semihard`: all with d_ap < d_an < d_ap + margin (Schroff et al., FaceNet, CVPR 2015), as
  pytorch-metric-learning's `TripletMarginMiner(margin, "semihard")`.
- `batch_hard`: the farthest positive with the nearest negative (Hermans et al., "In Defense of the
  Triplet Loss", 2017), as `BatchHardMiner`.
- `easy_positive`: the nearest positive with the nearest negative (Xuan et al., "Improved Embeddings
  with Easy Positive Triplet Mining", WACV 2020), as `BatchEasyHardMiner("easy", "hard")`.
- `easy_positive_semihard`: the nearest positive with the nearest negative farther than it (the
  same), as `BatchEasyHardMiner("easy", "semihard")`.
"""


@dataclass(frozen=True)
class Triplet:
    """The triplet loss; distances are values, or minus the values where these are similarities.

    With `reduction="anchors"` an anchor's value is the mean over its mined triplets, 0 if there are
    none, and the batch's loss the mean over anchors that have a positive and a negative; others add
    0 with weight 0. It is the default because the loss of an anchor then counts as much whatever
    the rest of the batch is, and classes of many rows do not outweigh the others by the square of
    their size. Equal to pytorch-metric-learning's `TripletMarginLoss` with `MeanReducer` for
    `batch_hard` and `easy_positive`, and for `all` where all classes of the batch are of one size.

    With `"nonzero"` the batch's loss is the mean over all mined triplets above zero: an anchor
    weighs as many as it has. Equal to that library's default (`AvgNonZeroReducer`), and to paper C,
    for all minings.

    Attributes:
        margin: .05 in that library and in paper C's code; paper C's runs have .0961 for CUB, .1190
            for Cars196, .0451 for In-Shop and SOP, with "l2", "all" and "nonzero".
        mining: see `Mining`.
        comparison: "l2", or "cosine" for [s_an - s_ap + margin]_+.
        reduction: what triplets are averaged over.
    """

    margin: float = 0.05
    mining: Mining = "all"
    comparison: Comparison = "l2"
    reduction: Literal["anchors", "nonzero"] = "anchors"

    def __post_init__(self) -> None:
        """Raises UsageError for a negative margin."""
        if not self.margin >= 0:
            raise UsageError(
                f"triplet loss: got margin {self.margin:g}, expected a number of at least 0"
            )

    def of_anchors(self, pairs: Pairs) -> AnchorLoss:
        """See `PairLoss`. Up to nine buffers of m x R numbers while all triplets are counted, and
        two kept for the gradient; with one triplet an anchor, three and none.
        """
        similar = self.comparison in ("cosine", "inner")
        distances = -pairs.values if similar else pairs.values
        if self.mining in ("all", "semihard"):
            total, counts = self._all_triplets(distances, pairs)
            values, active = total, counts.active
            if self.reduction == "anchors":
                values = total / counts.mined.clamp_min(1).to(total.dtype)
        else:
            values = self._one_triplet(distances, pairs)
            active = values > 0
        if self.reduction == "nonzero":
            return AnchorLoss(values, active.to(values.dtype))
        weights = pairs.same.any(1) & pairs.other.any(1)
        return AnchorLoss(values, weights.to(values.dtype))

    def _all_triplets(
        self, distances: Float[Tensor, "m R"], pairs: Pairs
    ) -> tuple[Float[Tensor, " m"], _Counts]:
        """The sum over each anchor's triplets, and how many there are."""
        reaches = distances + self.margin
        with torch.no_grad():
            counts = _count(distances, reaches, pairs, self.mining == "semihard")
        # Both sums count the same triplets, so that what is common to all distances cancels.
        of_positives = (counts.of_positive * reaches).sum(1)
        return of_positives - (counts.of_negative * distances).sum(1), counts

    def _one_triplet(self, distances: Float[Tensor, "m R"], pairs: Pairs) -> Float[Tensor, " m"]:
        """The loss of the one triplet mined for each anchor, 0 if there is none."""
        found, infinity = distances.detach(), float("inf")
        if self.mining == "batch_hard":
            positive = found.masked_fill(~pairs.same, -infinity).argmax(1, keepdim=True)
        else:
            positive = found.masked_fill(~pairs.same, infinity).argmin(1, keepdim=True)
        candidates = pairs.other
        if self.mining == "easy_positive_semihard":
            candidates = candidates & (found > found.gather(1, positive))
        negative = found.masked_fill(~candidates, infinity).argmin(1, keepdim=True)
        # Taken from the distances, not from the filled ones: finite also where there is no triplet.
        near, far = distances.gather(1, positive)[:, 0], distances.gather(1, negative)[:, 0]
        there = pairs.same.any(1) & candidates.any(1)
        return torch.where(there, F.relu(near - far + self.margin), 0.0)


class _Counts(NamedTuple):
    """How many mined triplets above zero a row is the positive of, or the negative, for each
    anchor; and how many an anchor has, above zero (`active`) and at all (`mined`).
    """

    of_positive: Int[Tensor, "m R"]
    of_negative: Int[Tensor, "m R"]
    active: Int[Tensor, " m"]
    mined: Int[Tensor, " m"]


def _count(
    distances: Float[Tensor, "m R"],
    reaches: Float[Tensor, "m R"],
    pairs: Pairs,
    semihard: bool,
) -> _Counts:
    """k_p and c_n of the module's text; for semi-hard triplets less those with d_ap >= d_an."""
    if semihard:  # What is taken away must be there, also if the margin is lost to rounding or 0.
        reaches = reaches.maximum(distances.nextafter(torch.full_like(distances, torch.inf)))
    of_positive, of_negative = _triplets_within(distances, reaches, pairs, closed=False)
    if semihard:
        harder = _triplets_within(distances, distances, pairs, closed=True)
        of_positive -= harder[0]
        of_negative -= harder[1]
    active = of_positive.sum(1)
    mined = active if semihard else pairs.same.sum(1) * pairs.other.sum(1)
    return _Counts(of_positive, of_negative, active, mined)


def _triplets_within(
    distances: Float[Tensor, "m R"],
    reaches: Float[Tensor, "m R"],
    pairs: Pairs,
    closed: bool,
) -> tuple[Int[Tensor, "m R"], Int[Tensor, "m R"]]:
    """Triplets with t_p > d_an (`closed`: or equal), by their positive and by their negative.

    Both counts come from one comparison of the same two numbers: if the second were of d_ap and
    d_an - margin, rounding would give a triplet to one sum alone, and a whole distance to the loss.
    """
    num_positives = pairs.same.sum(1)
    # The one number that the device is waited for: rows have few positives among very many classes.
    widest = max(num_positives.tolist(), default=0)
    hidden = reaches.masked_fill(~pairs.same, float("inf"))
    ascending, at = hidden.topk(max(widest, 1), dim=1, largest=False, sorted=True)
    del hidden
    # How many of the anchor's reaches end before a row: it is the negative of all the others.
    before = torch.searchsorted(ascending, distances.contiguous(), right=not closed)
    # The j-th reach, from 0, has as negatives the rows which at most j reaches end before.
    ending = torch.zeros_like(before[:, :1], dtype=torch.int32).repeat(1, ascending.shape[1] + 1)
    ending.scatter_add_(1, before, pairs.other.int())
    within = ending.cumsum(1, dtype=torch.int32)[:, :-1]
    # Counts in int32 and in place: indices have to be int64, twice a buffer of float32.
    of_negative = num_positives[:, None].int() - before.int()
    of_negative *= pairs.other
    del before
    of_positive = torch.zeros_like(of_negative).scatter_(1, at, within)
    of_positive *= pairs.same
    return of_positive, of_negative
