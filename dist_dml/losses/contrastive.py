"""Contrastive losses: positives pulled within one margin, negatives pushed beyond another.

Of one anchor i, with values v_ij that are distances (similarities: the differences turned round):

    sum over positives j of [v_ij - m+]_+^q  +  sum over negatives j of [m- - v_ij]_+^q

Three forms are in use, and each has its function: paper B's (2), and paper C's C1 and C2.

Dimensions: m anchors of a block, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.losses.pairs import AnchorLoss, Comparison, Pairs


@dataclass(frozen=True)
class Contrastive:
    """A contrastive loss, or one of its two parts.

    With `reduction="anchors"` the batch's loss is the sum of all terms over the number n of rows
    that are not ignored: pytorch-metric-learning's `ContrastiveLoss` with `SumReducer`, over n
    (power 1). It is the default because it is what papers B (2) and C (C1) write, and because a
    pair's gradient does not depend on how many other pairs of the batch still cost something. An
    anchor without positives or negatives adds what it has, with weight 1.

    With `"nonzero"` a part is averaged over its own terms above zero, the library's default
    (`AvgNonZeroReducer`): an anchor weighs as many as it has of them. The two parts have different
    numbers of terms and are two losses, whose results are added: see `parts`.

    Attributes:
        comparison: "l2" in paper B and for C2, "cosine" for C1, where v grows with similarity.
        positive_margin: m+, 0 for distances and 1 for cosines unless alike rows may stay apart.
        negative_margin: m-. Beyond it, a negative costs nothing.
        power: q; 2 in paper B (2), 1 in paper C.
        part: "positive" is the tightness part of paper B's Table 2, "negative" the contrastive.
        reduction: what the terms are averaged over.
    """

    comparison: Comparison = "l2"
    positive_margin: float = 0.0
    negative_margin: float = 0.5
    power: Literal[1, 2] = 1
    part: Literal["both", "positive", "negative"] = "both"
    reduction: Literal["anchors", "nonzero"] = "anchors"

    def __post_init__(self) -> None:
        """Raises UsageError for a mean over non-zero terms of both parts together."""
        if self.reduction == "nonzero" and self.part == "both":
            raise UsageError(
                "contrastive loss: reduction 'nonzero' averages each part over its own terms; "
                "got part 'both', expected 'positive' or 'negative': take both and add them"
            )

    def parts(self) -> tuple[Contrastive, Contrastive]:
        """The positive and the negative part; the loss is the sum of what both come to."""
        return replace(self, part="positive"), replace(self, part="negative")

    def of_anchors(self, pairs: Pairs) -> AnchorLoss:
        """See `PairLoss`. One buffer of m x R numbers kept for each part, three more at work."""
        terms = []
        if self.part != "negative":
            terms.append(self._terms(pairs.values, pairs.same, self.positive_margin, 1))
        if self.part != "positive":
            terms.append(self._terms(pairs.values, pairs.other, self.negative_margin, -1))
        values = torch.stack([term.sum(1) for term in terms]).sum(0)
        if self.reduction == "anchors":
            weights = pairs.same.any(1) | pairs.other.any(1)  # Of rows that are not ignored.
        else:
            weights = (terms[0] > 0).sum(1)
        return AnchorLoss(values, weights.to(values.dtype))

    def _terms(
        self, values: Float[Tensor, "m R"], of: Bool[Tensor, "m R"], margin: float, sign: int
    ) -> Float[Tensor, "m R"]:
        """[sign (v - margin)]_+^q of these pairs, 0 elsewhere; `sign` is that of distances."""
        if self.comparison in ("cosine", "inner"):
            sign = -sign
        # Not `clamp_min`, whose derivative on the margin is 1: there a term costs nothing.
        terms = F.relu(torch.where(of, sign * (values - margin), 0.0))
        return terms if self.power == 1 else terms.square()


def squared_contrastive(margin: float = 1.0) -> Contrastive:
    """Paper B (2): (1/n) sum_i (sum_pos D_ij^2 + sum_neg [m - D_ij]_+^2).

    The paper leaves m open; 1 is pytorch-metric-learning's.
    """
    return Contrastive("l2", 0.0, margin, power=2)


def c1(margin: float = 0.5, similarity: Literal["cosine", "inner"] = "cosine") -> Contrastive:
    """Paper C's C1, the form of XBM: (1/n) sum_i (sum_pos [1 - s_ij]_+ + sum_neg [s_ij - m]_+).

    The default is paper C's on all its data. XBM's own code adds s_ij, not s_ij - m, for a negative
    beyond the margin: more by m in value, the same in gradient. It and paper C's leave out
    positives within 1e-5 of 1, to be rid of the row itself, which is in no pair here.

    Args:
        margin: cosine from which on negatives cost.
        similarity: "inner" for rows in the unit ball (paper C's transform), of length below 1.
    """
    return Contrastive(similarity, 1.0, margin)


def c2(
    positive_margin: float = 0.0, negative_margin: float = 0.5
) -> tuple[Contrastive, Contrastive]:
    """Paper C's C2: the mean of [D - m+]_+ over positives plus that of [m- - D]_+ over negatives.

    Each is over the terms above zero of the batch, with D the l2 distance. Equal to
    pytorch-metric-learning's `ContrastiveLoss` as it comes. The defaults are those of paper C's
    code, which its runs set by hand: (m+, m-) is (0, .3841) for CUB, (.2652, .5409) for Cars196,
    (.2858, .5130) for In-Shop and SOP.

    Returns:
        The positive and the negative part, whose results are to be added.
    """
    loss = Contrastive("l2", positive_margin, negative_margin, part="positive", reduction="nonzero")
    return loss.parts()
