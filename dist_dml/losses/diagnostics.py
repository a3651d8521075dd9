"""What embeddings say of themselves during training: spread, classes, information, rank.

Numbers to log, without gradient, of a sample of whole classes (`whole_classes`), which bounds their
cost. Papers B (entropies, papers.md 3.2) and C (covering radius, inter-class distance, 4.11).
Information is in nats.

Dimensions: n rows, D features.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.losses.k_center import k_center

# Distances below count as this: equal rows would make an entropy -inf, which no plot shows.
_LEAST_DISTANCE = 1e-6


class Diagnosis(NamedTuple):
    """The numbers of one sample; nan where it does not determine one.

    Attributes:
        entropy: Hhat(Z), see `feature_entropy`.
        entropy_within: Hhat(Z|Y), the mean of the classes' own, by their rows.
        information: the generative difference `entropy` - `entropy_within`, from rows of classes
            that have two rows or more. A trend, not a value: the estimates' constants differ.
        gaussian_entropy: an upper bound of H(Z|Y), see `gaussian_cross_entropy`.
        inter_class: mean distance of rows of different classes.
        covering_radius: see `covering_radius`. Training goes well while it falls and `inter_class`
            does not.
        effective_rank: see `effective_rank`.
    """

    entropy: Float[Tensor, ""]
    entropy_within: Float[Tensor, ""]
    information: Float[Tensor, ""]
    gaussian_entropy: Float[Tensor, ""]
    inter_class: Float[Tensor, ""]
    covering_radius: Float[Tensor, ""]
    effective_rank: Float[Tensor, ""]


@torch.no_grad()
def diagnose(
    rows: Float[Tensor, "n D"], labels: Int[Tensor, " n"], ignored: int, cap: int = 512
) -> Diagnosis:
    """All numbers of at most `cap` rows, in float32 at least.

    Costs about 10 * cap^2 * D operations and 5 * cap^2 numbers of memory whatever n is, the sorting
    of n labels, and a few waits for the device; on one core 0.05 s at 128 features, 0.11 s at 512.
    Call it when a log is due rather than in every step.

    Raises:
        UsageError: if `cap` is below 2.
    """
    if cap < 2:
        raise UsageError(f"cap of diagnostics: got {cap}; expected 2 rows or more")
    chosen = whole_classes(labels, cap, ignored)
    rows = rows[chosen].to(torch.promote_types(rows.dtype, torch.float32))
    labels = labels[chosen]
    distances = _distances(rows)
    alike = labels[:, None] == labels
    of_pair = _entropy_of_pairs(distances, rows.shape[1])
    mates = alike.sum(1) - 1
    paired = mates > 0
    both = paired[:, None] & paired
    within = _mean_of_classes(of_pair * alike, mates)
    entropy = of_pair.sum() / _or_nan(len(rows) * (len(rows) - 1), rows)
    count = paired.sum()
    of_paired = (of_pair * both).sum() / _or_nan(count * (count - 1), rows)
    return Diagnosis(
        entropy,
        within,
        of_paired - within,
        gaussian_cross_entropy(rows, labels),
        (distances * ~alike).sum() / _or_nan((~alike).sum(), rows),
        covering_radius(rows, labels),
        effective_rank(rows),
    )


def whole_classes(labels: Int[Tensor, " n"], cap: int, ignored: int) -> Int[Tensor, " m"]:
    """Rows of some classes, all of each, until there are `cap`: only the last one may be cut.

    Classes lie evenly among the ids that occur; the same for the same labels, class by class. Rows
    drawn without regard to classes would leave hardly two of any. Waits for the device.
    """
    there = (labels != ignored).nonzero()[:, 0]
    rank = labels[there].unique(return_inverse=True)[1]
    # Classes of one size would fill the cap exactly with every `stride`-th of them.
    stride = max(1, math.ceil(len(there) / cap))
    kept = rank % stride == 0
    there, rank = there[kept], rank[kept]
    return there[rank.argsort(stable=True)][:cap]


@torch.no_grad()
def feature_entropy(rows: Float[Tensor, "n D"]) -> Float[Tensor, ""]:
    """D / (n (n - 1)) * the sum over i != j of log ||z_i - z_j||^2 (paper B, eq. 6 and 21).

    An estimate of H(Z) up to a constant: it grows by 2 * D * log a where rows grow by a. Distances
    below 1e-6 count as 1e-6. Costs n^2 * D operations and n^2 numbers; nan for a single row.
    """
    total = _entropy_of_pairs(_distances(rows), rows.shape[1]).sum()
    return total / _or_nan(len(rows) * (len(rows) - 1), rows)


@torch.no_grad()
def conditional_entropy(rows: Float[Tensor, "n D"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """Hhat(Z|Y): sum of n_k / n * `feature_entropy` of class k, over classes of two rows or more.

    n counts their rows; nan where there is none. Costs as `feature_entropy`.
    """
    alike = labels[:, None] == labels
    of_pair = _entropy_of_pairs(_distances(rows), rows.shape[1])
    return _mean_of_classes(of_pair * alike, alike.sum(1) - 1)


@torch.no_grad()
def gaussian_cross_entropy(
    rows: Float[Tensor, "n D"], labels: Int[Tensor, " n"]
) -> Float[Tensor, ""]:
    """H(Z; Zbar | Y) for Zbar | Y ~ N(c_Y, I), with c_Y the class's mean (paper B, eq. 3 and 4):

        D/2 log(2 pi) + (1 / 2n) sum_i ||z_i - c_{y_i}||^2

    H(Z|Y) plus a KL divergence, so an upper bound of it where the means are the true ones; those of
    few rows are nearer to them than the true ones. Costs n * D operations.
    """
    _, rank = labels.unique(return_inverse=True)
    counts = torch.bincount(rank).clamp_min(1).to(rows)
    sums = rows.new_zeros(len(counts), rows.shape[1]).index_add_(0, rank, rows)
    away = rows - (sums / counts[:, None])[rank]
    spread = away.square().sum() / (2 * _or_nan(len(rows), rows))
    return rows.shape[1] / 2 * math.log(2 * math.pi) + spread


@torch.no_grad()
def label_entropy(labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """H(Y) of the labels' frequencies, in float64. The log of the number of classes if balanced."""
    counts = labels.unique(return_counts=True)[1].double()
    shares = counts / counts.sum()
    return -(shares * shares.log()).sum()


def information_at_least(
    labels: Int[Tensor, " n"], cross_entropy: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """H(Y) - L_CE <= I(Z;Y), the discriminative bound (paper B, eq. 35 and 36).

    Args:
        labels: of the rows on which information is wanted.
        cross_entropy: their mean cross-entropy, *without* label smoothing, margins or scales that
            are not part of the posterior that is meant.
    """
    return label_entropy(labels) - cross_entropy


@torch.no_grad()
def inter_class_distance(
    rows: Float[Tensor, "n D"], labels: Int[Tensor, " n"]
) -> Float[Tensor, ""]:
    """Mean distance of two rows of different classes (papers.md, 4.11); nan for a single class."""
    apart = labels[:, None] != labels
    return (_distances(rows) * apart).sum() / _or_nan(apart.sum(), rows)


@torch.no_grad()
def covering_radius(rows: Float[Tensor, "n D"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """The mean over classes of the mean over k = 1..n_c of the radius of k centres (4.11).

    By greedy k-center, whose radius is at most twice the smallest: one run of n_c choices gives the
    radii for all k, as the first k of them are the answer for k. A class begins with the row next
    to its mean, for the answer must not depend on where the origin is. Costs 3 * sum of n_c^2 * D
    operations; waits for the device once for each size that classes have.
    """
    _, rank, counts = labels.unique(return_inverse=True, return_counts=True)
    if len(counts) == 0:
        return rows.new_full((), math.nan)
    by_class = rows[rank.argsort(stable=True)]
    ends = counts.cumsum(0)
    means = []
    for size in counts.unique().tolist():
        first = (ends - counts)[counts == size]
        pool = by_class[first[:, None] + torch.arange(size, device=rows.device)]
        means.append(_radii_of_all_counts(pool).mean(1))
    return torch.cat(means).mean()


def _radii_of_all_counts(pool: Float[Tensor, "c b D"]) -> Float[Tensor, "c b"]:
    """The radii of 1..b centres of each class."""
    away = (pool - pool.mean(1, keepdim=True)).square().sum(-1)
    start = pool[torch.arange(len(pool), device=pool.device), away.argmin(1)][:, None]
    one = (pool - start).square().sum(-1).amax(1, keepdim=True).sqrt()
    if pool.shape[1] == 1:
        return one
    return torch.cat([one, k_center(pool, pool.shape[1] - 1, covering=start).radii], 1)


@torch.no_grad()
def effective_rank(rows: Float[Tensor, "n D"]) -> Float[Tensor, ""]:
    """exp of the entropy of the singular values over their sum (Roy and Vetterli 2007).

    From 1, for rows on one line through the origin, to min(n, D); the same for scaled and rotated
    rows. Rows are not centred. Costs some 10 * n * D * min(n, D) operations, in float64; nan for
    no rows and for rows that are all 0.
    """
    if len(rows) == 0:
        return rows.new_full((), math.nan)
    values = torch.linalg.svdvals(rows.double())
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp().to(rows)


def _distances(rows: Float[Tensor, "n D"]) -> Float[Tensor, "n n"]:
    """From differences: from products near rows would lose their distance, which logs magnify."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")


def _entropy_of_pairs(distances: Float[Tensor, "n n"], features: int) -> Float[Tensor, "n n"]:
    """D log D_ij^2; 0 on the diagonal, where the logarithm diverges."""
    terms = 2 * features * distances.clamp_min(_LEAST_DISTANCE).log()
    return terms.fill_diagonal_(0)


def _mean_of_classes(terms: Float[Tensor, "n n"], mates: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """Sum of n_k / n * mean of the terms in class k: each row's mean, averaged over rows."""
    paired = mates > 0
    return (terms.sum(1) / mates.clamp_min(1)).sum() / _or_nan(paired.sum(), terms)


def _or_nan(count: Tensor | int, like: Tensor) -> Float[Tensor, ""]:
    """The count as a divisor: nan for 0, so that nothing is divided by it."""
    value = torch.as_tensor(count, dtype=like.dtype, device=like.device)
    return torch.where(value > 0, value, math.nan)
