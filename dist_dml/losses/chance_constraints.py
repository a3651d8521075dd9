"""Chance-constrained proxies (paper C): its transform, its losses, and its projection term.

What follows what is in `ccp_states`.

Dimensions: n rows, c classes whose proxies are given, K proxies of a class, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_dml.losses.pairs import AnchorLoss, PairLoss, compare, pairs_of


def unit_ball(vectors: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
    """v / max(1, ||v||), the nearest point of the unit ball (papers.md, 4.3): 1-Lipschitz.

    Its gradient is (dy - <v_hat, dy> v_hat) / ||v|| outside, dy inside and on the sphere, as in
    paper C's code; 0 has one too, unlike with l2 normalisation.
    """
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / torch.where(norms > 1, norms, torch.ones_like(norms))


def against_proxies(
    rows: Float[Tensor, "n D"],
    labels: Int[Tensor, " n"],
    proxies: Float[Tensor, "c K D"],
    loss: PairLoss,
    ignored: int,
    first_class: int = 0,
) -> AnchorLoss:
    """What each row loses against all proxies: rows are the anchors (papers.md, 4.4).

    Equal to the loss of the pairs of rows and proxies alone: no two rows and no two proxies meet,
    and no proxy is a row's own. Proxies lie class by class; paper C's code has the j-th proxy of
    class i at j * C + i, which gives the same. Costs 2*n*c*K*D operations and some n * c*K buffers:
    call it for blocks of rows and add up. A row whose class is not among the c has no positive.

    Args:
        rows: as the loss compares them, after `unit_ball` or normalisation.
        labels: global class ids.
        proxies: likewise.
        loss: the rule.
        ignored: label of rows that take part in no pair.
        first_class: id of the class of `proxies[0]`.
    """
    num_classes, per_class, _ = proxies.shape
    ids = torch.arange(first_class, first_class + num_classes, device=labels.device)
    own = torch.full_like(labels, -1)  # No row lies among the proxies.
    values = compare(rows, proxies.flatten(0, 1), loss.comparison)
    return loss.of_anchors(
        pairs_of(values, labels, ids.repeat_interleave(per_class).to(labels), own, ignored)
    )


def projection_term(
    weights: Sequence[Tensor], last: Sequence[Tensor], strength: float
) -> Float[Tensor, ""]:
    """(strength / 2) * ||theta - theta_prev||^2 of the *model's* weights, never of the proxies."""
    total = torch.zeros((), dtype=weights[0].dtype, device=weights[0].device)
    for weight, before in zip(weights, last, strict=True):
        total = total + (weight - before).square().sum().to(total)
    return strength / 2 * total


@torch.no_grad()
def add_projection_gradients_(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], last: Sequence[Tensor], strength: float
) -> None:
    """Add the gradient of `projection_term`, as paper C's code does.

    Belongs between the sum over workers and the clipping: every worker has the whole term, so that
    within a sum of gradients it would count once for each. Costs one buffer of the largest weight.
    """
    for gradient, weight, before in zip(gradients, weights, last, strict=True):
        gradient.add_((weight - before).to(gradient.dtype), alpha=strength)
