"""Center loss over the means of the batch's classes.

Paper B (section 3.3, Table 2) takes as centres the hard means c_k of the class's features, of the
batch here; the original (Wen et al., ECCV 2016) keeps centres of its own, which follow the means by
a rate. The form is the tightness part alone: beside it stands the cross-entropy, without which all
features at one point are optimal.

Dimensions: m anchors, R rows, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_dml.losses.pairs import AnchorLoss, Comparison, Pairs


@dataclass(frozen=True)
class CenterLoss:
    """1/2 mean_i |z_i - c_{y_i}|^2, without class means: by the identity

        sum_{i in k} |z_i - c_k|^2 = 1/(2 n_k) sum_{i, j in k} |z_i - z_j|^2

    each anchor has 1/(4 n_k) sum_{j in k} D_ij^2. An anchor's value is not its own distance to the
    mean, but their sum over the batch is the same, and so is the gradient. The paper's sum is the
    mean here, as a sum would grow with the batch: its T_center is R times this. A row alone in its
    class has 0 and counts.

    If a memory adds rows that are no anchors, it is the mean over anchors of the mean squared
    distance to the class's rows, over 4; the identity is of whole classes.
    """

    @property
    def comparison(self) -> Comparison:
        """Squared distances."""
        return "squared_l2"

    def of_anchors(self, pairs: Pairs) -> AnchorLoss:
        """See `PairLoss`. The weight is 1 for each anchor that is in any pair."""
        size = pairs.same.sum(1) + 1
        values = torch.where(pairs.same, pairs.values, 0).sum(1) / (4 * size)
        return AnchorLoss(values, (pairs.same | pairs.other).any(1).to(values.dtype))


def squared_distances_to_means(
    features: Float[Tensor, "R D"], labels: Int[Tensor, " R"]
) -> Float[Tensor, " R"]:
    """|z_i - c_{y_i}|^2 of each row of a whole batch, c the mean of the rows that share its label.

    Half its mean is `CenterLoss` of the batch. Costs R * D operations instead of R^2 * D: for one
    process that holds all rows.
    """
    # Any ids: of each class the first row in label order stands for it.
    _, slots, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    sums = features.new_zeros(len(counts), features.shape[1]).index_add(0, slots, features)
    means = sums / counts[:, None]
    return (features - means[slots]).square().sum(1)
