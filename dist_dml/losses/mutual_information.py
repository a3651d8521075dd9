"""Losses of paper B split into a tightness and a contrastive part, and the bounds between them.

Paper B reads a loss of pairs as an estimate of the mutual information I(Z;Y) = H(Z) - H(Z|Y): its
tightness part bounds H(Z|Y), its contrastive part -H(Z) (Table 2). Both are parts of *anchors*, a
block at a time, so that they are computed in bounded memory and once in the group like the losses
themselves. The parts of PCE and SPCE need more than pairs: `losses.pairwise_cross_entropy`.

The bounds are Lemma 1's, with the constants that the paper's `=c` and `<=c` leave out, so that they
are inequalities of numbers. They suppose features of norm 1 and classes of one size.

Dimensions: m anchors, R rows, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dist_dml.losses.pairs import Pairs


class Parts(NamedTuple):
    """A loss in two parts, which are averages over anchors: sum(part) / sum(counted).

    Attributes:
        tightness: of each anchor (m,), or of the batch ().
        contrastive: likewise.
        counted: 1 for an anchor that takes part, 0 otherwise; its parts are 0 then.
    """

    tightness: Float[Tensor, "*m"]
    contrastive: Float[Tensor, "*m"]
    counted: Float[Tensor, "*m"]

    def means(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Both parts of the batch, if the anchors are all of its rows."""
        total = self.counted.sum().clamp_min(1)
        return self.tightness.sum() / total, self.contrastive.sum() / total


def _in_any_pair(pairs: Pairs) -> Float[Tensor, " m"]:
    return (pairs.same | pairs.other).any(1).to(pairs.values.dtype)


def contrastive_parts(pairs: Pairs, margin: float) -> Parts:
    """Of the contrastive loss (eq. 2), from squared distances.

        sum_{j: y_j = y_i} D_ij^2    and    sum_{j: y_j != y_i} max(0, margin - D_ij)^2

    The sums are over pairs, not means, so that both grow with the batch.
    """
    squares = pairs.values
    # The root has no gradient at 0: no direction parts equal rows.
    distances = torch.where(squares > 0, squares, torch.ones_like(squares)).sqrt() * (squares > 0)
    push = (margin - distances).clamp_min(0).square()
    tightness = torch.where(pairs.same, squares, 0).sum(1)
    return Parts(tightness, torch.where(pairs.other, push, 0).sum(1), _in_any_pair(pairs))


def center_parts(
    pairs: Pairs, logits: Float[Tensor, "m C"], anchor_labels: Int[Tensor, " m"]
) -> Parts:
    """Of center loss, from squared distances: `losses.center.CenterLoss` and the cross-entropy.

    The paper's tightness, 1/2 sum_i |z_i - c_{y_i}|^2, is a *sum* beside a contrastive part that is
    a mean: it is R times the mean of the tightness here.

    Args:
        pairs: all rows of the anchors' classes must be among them.
        logits: of the classifier.
        anchor_labels: class ids; negative where an anchor takes no part.
    """
    counted = _in_any_pair(pairs)
    size = pairs.same.sum(1) + 1
    tightness = torch.where(pairs.same, pairs.values, 0).sum(1) / (4 * size)
    entropy = F.cross_entropy(logits, anchor_labels.clamp_min(0), reduction="none")
    return Parts(tightness, torch.where(counted > 0, entropy, 0), counted)


def snca_parts(pairs: Pairs, sigma: float) -> Parts:
    """Of SNCA, from cosines.

        -log sum_{j: y_j = y_i} exp(cos_ij / sigma)    and    log sum_{k != i} exp(cos_ik / sigma)

    Positives exclude the anchor (the table does not say so, the proofs do). An anchor without one
    has no finite tightness and is not counted. The contrastive part is over positives as well.
    """
    scaled = pairs.values / sigma
    has_positive = pairs.same.any(1)
    absent = ~has_positive[:, None]
    # Rows that do not count are kept finite, lest their zeros have gradients of 0 * inf.
    positive = scaled.masked_fill(~(pairs.same | absent), -torch.inf).logsumexp(1)
    every = scaled.masked_fill(~(pairs.same | pairs.other | absent), -torch.inf).logsumexp(1)
    tightness = torch.where(has_positive, -positive, 0)
    contrastive = torch.where(has_positive, every, 0)
    return Parts(tightness, contrastive, has_positive.to(scaled.dtype))


def multi_similarity_parts(pairs: Pairs, alpha: float, beta: float, margin: float) -> Parts:
    """Of multi-similarity without its miner, from cosines.

        1/alpha log(1 + sum_{j: y_j = y_i} exp(-alpha (cos_ij - margin)))    and
        1/beta log(1 + sum_{j: y_j != y_i} exp(beta (cos_ij - margin)))

    Equal to pytorch-metric-learning's `MultiSimilarityLoss(alpha, beta, base=margin)` in sum. An
    anchor without a pair has 0 and is not counted.
    """
    shifted = pairs.values - margin

    def softplus_of_sum(terms: Tensor, chosen: Tensor) -> Tensor:
        one = torch.zeros_like(terms[:, :1])  # exp(0)
        return torch.cat((one, terms.masked_fill(~chosen, -torch.inf)), 1).logsumexp(1)

    tightness = softplus_of_sum(-alpha * shifted, pairs.same) / alpha
    contrastive = softplus_of_sum(beta * shifted, pairs.other) / beta
    return Parts(tightness, contrastive, _in_any_pair(pairs))


def spread(pairs: Pairs) -> Float[Tensor, " m"]:
    """-sum_{j: y_j != y_i} D_ij^2 of each anchor, from squared distances; its mean is C of eq. 16.

    What bounds the contrastive parts of SNCA and multi-similarity from below: the farther the other
    classes, the lower.
    """
    return -torch.where(pairs.other, pairs.values, 0).sum(1)


# Lemma 1 in numbers, for n rows of norm 1 in classes of `size` rows each. With T the contrastive
# loss's tightness, the mean over i of sum_j D_ij^2, and cos = 1 - D^2 / 2:
#   Jensen on the mean of exp(cos / sigma) over size - 1 positives,
#     -log(1/(size-1) sum_j exp(cos_ij / sigma)) <= -1/(size-1) sum_j cos_ij / sigma
#                                                 = -1/sigma + 1/(2 (size-1) sigma) sum_j D_ij^2;
#   and on the mean of exp(-alpha (cos - 1)) over all `size` rows of the class, the 1 in the
#   logarithm being the anchor's own term at margin 1,
#     1/alpha log sum_j exp(-alpha (cos_ij - 1)) >= 1/alpha log(size) + 1/(2 size) sum_j D_ij^2.


def center_tightness_of(contrastive_tightness: Float[Tensor, ""], size: int) -> Float[Tensor, ""]:
    """The mean of `center_parts`' tightness, exactly, for classes of one size (any norm)."""
    return contrastive_tightness / (4 * size)


def snca_tightness_at_most(
    contrastive_tightness: Float[Tensor, ""], size: int, sigma: float
) -> Float[Tensor, ""]:
    """T_SNCA <= this (eq. 8). Equality if all positives of an anchor are equally near.

    Args:
        contrastive_tightness: T, the mean of `contrastive_parts`' tightness.
        size: rows of each class, 2 at least.
        sigma: of SNCA.
    """
    others = torch.as_tensor(size - 1, dtype=contrastive_tightness.dtype)
    return contrastive_tightness / (2 * (size - 1) * sigma) - 1 / sigma - others.log()


def multi_similarity_tightness_at_least(
    contrastive_tightness: Float[Tensor, ""], size: int, alpha: float
) -> Float[Tensor, ""]:
    """T_MS >= this (eq. 8), for margin 1. Equality if the class is one point.

    Args:
        contrastive_tightness: T, the mean of `contrastive_parts`' tightness.
        size: rows of each class.
        alpha: of multi-similarity.
    """
    rows = torch.as_tensor(size, dtype=contrastive_tightness.dtype)
    return contrastive_tightness / (2 * size) + rows.log() / alpha


def snca_contrastive_at_least(
    mean_spread: Float[Tensor, ""], negatives: int, sigma: float
) -> Float[Tensor, ""]:
    """C_SNCA >= this (eq. 16-20): without the positive terms, then Jensen over the negatives.

    Args:
        mean_spread: the mean of `spread`.
        negatives: rows of other classes, the same number for each anchor.
        sigma: of SNCA.
    """
    rows = torch.as_tensor(negatives, dtype=mean_spread.dtype)
    return rows.log() + (1 + mean_spread / (2 * negatives)) / sigma


def multi_similarity_contrastive_at_least(
    mean_spread: Float[Tensor, ""], negatives: int, beta: float, margin: float
) -> Float[Tensor, ""]:
    """C_MS >= this (eq. 16-20): without the 1 in the logarithm, then Jensen over the negatives.

    Args:
        mean_spread: the mean of `spread`.
        negatives: rows of other classes, the same number for each anchor.
        beta: of multi-similarity.
        margin: of multi-similarity.
    """
    rows = torch.as_tensor(negatives, dtype=mean_spread.dtype)
    return rows.log() / beta + 1 - margin + mean_spread / (2 * negatives)
