"""Neighbourhood components over pairs: the chance that a random neighbour has the row's label.

Goldberger et al., "Neighbourhood Components Analysis", NeurIPS 2004, with squared distances; with
cosines SNCA (Wu et al., "Improving Generalization via Scalable Neighborhood Component Analysis",
ECCV 2018), in paper B's Table 2:

    -log [ sum over positives j of exp(s_ij / t) / sum over all k != i of exp(s_ik / t) ]

Dimensions: m anchors of a block, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from dist_dml.errors import UsageError
from dist_dml.losses.pairs import AnchorLoss, Pairs


@dataclass(frozen=True)
class NeighbourhoodComponents:
    """The loss above: SNCA with cosines, NCA with s_ij = -D_ij^2.

    The batch's loss is the mean over anchors with a positive. Equal to pytorch-metric-learning's
    `NCALoss(softmax_scale=1/t)` with its `MeanReducer`, with `CosineSimilarity` or its default
    squared l2 distance, except where all of that library's numerators underflow: it then leaves the
    anchor out, which is the worst of all.

    An anchor without positives has no finite loss: it adds 0 with weight 0. (The authors' code adds
    0 and divides by all rows, which makes the loss fall with the share of such anchors.) One with
    positives alone is right with certainty: it adds 0 with weight 1.

    Attributes:
        temperature: t, sigma in papers B and SNCA; .05 in SNCA's code. NCA has 1 (t is then a
            square of a length).
        comparison: what pairs are compared by.
    """

    temperature: float = 0.05
    comparison: Literal["cosine", "inner", "squared_l2"] = "cosine"

    def __post_init__(self) -> None:
        """Raises UsageError unless the temperature is positive."""
        if not self.temperature > 0:
            raise UsageError(
                f"SNCA: got temperature {self.temperature:g}, expected a number above 0"
            )

    def of_anchors(self, pairs: Pairs) -> AnchorLoss:
        """See `PairLoss`. Three or four buffers of m x R numbers, and two more in the gradient."""
        sign = -1 if self.comparison == "squared_l2" else 1
        logits = pairs.values * (sign / self.temperature)
        # Not -inf: anchors without a kind of pair would have gradients of nan in between, which
        # PyTorch's anomaly detection takes for an error.
        nothing = torch.finfo(logits.dtype).min / 4
        log_same = logits.masked_fill(~pairs.same, nothing).logsumexp(1)
        log_other = logits.masked_fill(~pairs.other, nothing).logsumexp(1)
        # -log(P / (P + N)) = log(1 + N / P), which keeps its digits where it is 1e-30 as well.
        gap = log_other - log_same
        weights = pairs.same.any(1)
        has_both = weights & pairs.other.any(1)
        values = torch.where(has_both, torch.logaddexp(gap, torch.zeros_like(gap)), 0.0)
        return AnchorLoss(values, weights.to(values.dtype))
