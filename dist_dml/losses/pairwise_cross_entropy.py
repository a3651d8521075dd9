"""Pairwise cross-entropy: what the cross-entropy asks of pairs, with and without a classifier.

PCE (paper B, Proposition 1) puts the minimisers of two halves of the cross-entropy into them; SPCE
puts the first half's into both, which leaves neither classifier weights nor a constant to choose.
With h_k = 1/n sum_{i: y_i = k} z_i and cs_k = 1/n sum_i p_ik z_i,

    SPCE = CE(theta = h)
    PCE  = CE(theta = cs / lambda) - 1/(2 lambda) sum_k |h_k - cs_k|^2

where CE(theta) is the cross-entropy of the bias-free classifier theta. The first is the paper's
eq. 15, the second its eq. 12 with the square completed: T = -1/(2 lambda) sum |h_k|^2, and the
label's logits under cs / lambda have mean 1/lambda sum_k <h_k, cs_k>. As h - cs is minus the
gradient of CE by theta, Proposition 1 (PCE <= CE) says

    CE(theta) + 1/(2 lambda) |grad CE(theta)|^2 >= CE(cs(theta) / lambda)

which holds at theta = 0, where both sides' CE are log C, and fails at the minimum of CE unless
cs / lambda is one as well. Nothing may rely on it.

Dimensions: m anchors, R rows, n any rows, C classes, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.losses.mutual_information import Parts
from dist_dml.losses.pairs import (
    AnchorLoss,
    Comparison,
    LabelledPairs,
    Pairs,
)


def _class_slots(labels: Int[Tensor, " R"]) -> Int[Tensor, " R"]:
    """Numbers 0, 1, ... of the classes that occur, in the order of their labels; below R.

    As `torch.unique`'s inverse, without waiting for the device to count them.
    """
    ordered, order = labels.sort()
    number = torch.zeros_like(order)
    number[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    return torch.zeros_like(order).scatter(0, order, number)


@dataclass(frozen=True)
class SPCE:
    """Simplified pairwise cross-entropy (paper B, eq. 15), over n rows that are not ignored:

        -1/n^2 sum_i sum_{j: y_j = y_i} z_i.z_j
        + 1/n sum_i log sum_k exp(1/n sum_{j: y_j = k} z_i.z_j)

    Equal to bias-free cross-entropy with classifier rows 1/n sum_{j: y_j = k} z_j, through which
    the gradient flows as well. Pairs include the anchor itself, which `Pairs.same` leaves out, and
    classes must be told apart among the others: it takes `LabelledPairs`. Rows are not normalised:
    for balanced classes of rows of norm 1 no logit would exceed 1/C, and no loss could be below
    log(1 + (C - 1) exp(-2/C)), which is near log C. Costs a few buffers of the block's size; one
    process with the whole batch needs R * C * D operations by the cross-entropy instead of R^2 * D.

    Attributes:
        num_classes: C: each class that is absent from the batch adds exp(0) to the sum over k. None
            sums over the batch's classes. The paper does not say which.
    """

    num_classes: int | None = None

    @property
    def comparison(self) -> Comparison:
        """Inner products."""
        return "inner"

    def parts(self, pairs: LabelledPairs) -> Parts:
        """Tightness and contrastive part (Table 2) of each anchor; their means are the paper's."""
        values = pairs.values
        known = pairs.labels != pairs.ignored
        n = known.sum().clamp_min(1)
        counted = pairs.anchor_labels != pairs.ignored
        alike = (pairs.anchor_labels[:, None] == pairs.labels) & known  # With the anchor itself.
        tightness = -torch.where(alike, values, 0).sum(1) / n
        slots = _class_slots(pairs.labels)
        logits = torch.zeros_like(values).index_add(1, slots, torch.where(known, values, 0)) / n
        present = torch.zeros_like(known, dtype=values.dtype).index_add(0, slots, known.to(values))
        log_mass = logits.masked_fill(present == 0, -torch.inf).logsumexp(1)
        if self.num_classes is not None:
            absent = self.num_classes - (present > 0).sum()
            log_mass = torch.logaddexp(log_mass, absent.to(values.dtype).log())
        return Parts(
            torch.where(counted, tightness, 0),
            torch.where(counted, log_mass, 0),
            counted.to(values.dtype),
        )

    def of_anchors(self, pairs: Pairs) -> AnchorLoss:
        """See `PairLoss`. The weight is 1 for each anchor that is not ignored."""
        assert isinstance(pairs, LabelledPairs), "SPCE sums over classes: it needs labels"
        tightness, contrastive, counted = self.parts(pairs)
        return AnchorLoss(tightness + contrastive, counted)


def ridge_weight(features: Float[Tensor, "R D"], probabilities: Float[Tensor, "R C"]) -> float:
    """The paper's lambda (eq. 25): the least eigenvalue of any 1/n sum_i (p_ik - p_ik^2) z_i z_i'.

    It vanishes as the probabilities approach the labels, and 1/lambda grows without bound. Costs
    C * (R * D^2 + D^3) operations: for a study, not for training. No gradient.

    Raises:
        UsageError: if there are fewer rows than features, where it is 0.
    """
    rows, width = features.shape
    if rows < width:
        raise UsageError(
            f"pairwise cross-entropy has {rows} rows of {width} features, but its lambda (eq. 25) "
            f"is 0 below {width} rows: give more rows, or choose `ridge`"
        )
    features, probabilities = features.detach(), probabilities.detach()
    least = [
        torch.linalg.eigvalsh((features * (p - p * p)[:, None]).mT @ features / rows)[0]
        for p in probabilities.unbind(1)
    ]
    return torch.stack(least).min().item()


def pairwise_cross_entropy_parts(
    features: Float[Tensor, "R D"],
    labels: Int[Tensor, " R"],
    probabilities: Float[Tensor, "R C"],
    ridge: float,
) -> Parts:
    """Tightness and contrastive part of PCE (eq. 12; Table 2's last factor is a misprint).

        T = -1/(2 ridge n^2) sum_i sum_{j: y_j = y_i} z_i.z_j
        C = 1/n sum_i log sum_k exp(1/(ridge n) sum_j p_jk z_i.z_j) - 1/(2 ridge) sum_k |cs_k|^2

    Its soft means couple all rows, so that it is of the whole batch and no `PairLoss`. Costs
    R * C * D operations, not R^2: double sums are squares of class sums.

    Args:
        features: of all rows.
        labels: class ids below C.
        probabilities: p_ik of the classifier. The paper's bound optimisation holds them fixed;
            given with a gradient, it flows through them.
        ridge: lambda, above 0: see `ridge_weight`.

    Raises:
        UsageError: if `ridge` is not above 0.
    """
    if not ridge > 0:
        raise UsageError(
            f"pairwise cross-entropy got ridge {ridge}, but lambda must be above 0: it is 0 where "
            "the classifier is certain or features are dependent; choose it"
        )
    rows, classes = probabilities.shape
    hard = features.new_zeros(classes, features.shape[1]).index_add(0, labels, features) / rows
    soft = probabilities.mT @ features / rows
    tightness = -hard.square().sum() / (2 * ridge)
    log_mass = (features @ soft.mT / ridge).logsumexp(1).mean()
    contrastive = log_mass - soft.square().sum() / (2 * ridge)
    return Parts(tightness, contrastive, torch.ones_like(tightness))


def pairwise_cross_entropy(
    features: Float[Tensor, "R D"],
    labels: Int[Tensor, " R"],
    probabilities: Float[Tensor, "R C"],
    ridge: float,
) -> Float[Tensor, ""]:
    """PCE (eq. 12) of the whole batch; see `pairwise_cross_entropy_parts`."""
    tightness, contrastive, _ = pairwise_cross_entropy_parts(features, labels, probabilities, ridge)
    return tightness + contrastive
