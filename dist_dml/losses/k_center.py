"""Greedy k-center: few points of each class that all its others are close to (papers.md, 4.2).

Dimensions: c classes, b points in the pool of a class, s points that already cover it, K points to
choose, D features.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dist_dml.errors import UsageError

CenterDistance = Literal["l2", "cosine"]
"""`l2` of the points as they come; `cosine` is l2 of their directions, which ranks alike."""


class Centers(NamedTuple):
    """What was chosen.

    Attributes:
        chosen: places in the pool, in the order of choice; -1 for a class without points.
        radii: the largest distance of a point of the pool to those that cover it and the first
            k + 1 chosen: what `distance` says, not squared. Never grows along a row. 0 for a class
            without points.
    """

    chosen: Int[Tensor, "c K"]
    radii: Float[Tensor, "c K"]


@torch.no_grad()
def k_center(
    pool: Float[Tensor, "c b D"],
    count: int,
    distance: CenterDistance = "l2",
    covering: Float[Tensor, "c s D"] | None = None,
    filled: Bool[Tensor, "c b"] | None = None,
    tile_bytes: int = 64 * 2**20,
) -> Centers:
    """The greedy answer for each class: `count` times the point farthest from all that cover it.

    Without `covering` the first point is that of largest norm, as in paper C's code, whose first
    initial set is the origin. Directions are all as far from the origin, so that rounding would
    decide there: `cosine` begins with the first filled point. Equal distances go to the lowest
    place. Without `covering` every radius is at most twice the smallest that k points of the pool
    can have (Gonzalez 1985), whatever the first point; with it, no such bound is claimed.

    Costs 3*c*b*D*(s + K) operations; beyond inputs and results at most `tile_bytes`, and never less
    than one class needs. Computed in float32 for smaller types. Distances are sums of squared
    differences, not of products: those lose the distances of points that nearly coincide, and a
    chosen point's own distance would not be 0, so that it could be chosen again. It is chosen
    again only where the pool has fewer distinct points than K.

    Args:
        pool: points to choose from.
        count: K.
        distance: what is measured.
        covering: what covers the classes already: paper C passes the last problem's proxies.
        filled: which places of the pool hold a point; all, if not given.
        tile_bytes: the memory's limit.

    Raises:
        UsageError: if K is below 1 or the pool has no place.
    """
    if count < 1:
        raise UsageError(f"k-center: got {count} points to choose; expected 1 or more proxies")
    if pool.shape[1] < 1:
        raise UsageError("k-center: got a pool of 0 points a class; expected 1 or more")
    dtype = torch.promote_types(pool.dtype, torch.float32)
    # A tile's buffers: points in `dtype`, without the unfilled ones, directions, differences.
    step = max(1, tile_bytes // (4 * pool.shape[1] * pool.shape[2] * dtype.itemsize + 1))
    parts = []
    for start in range(0, len(pool), step):
        own = slice(start, start + step)
        known = None if covering is None else covering[own].to(dtype)
        there = (
            torch.ones_like(pool[own, :, 0], dtype=torch.bool) if filled is None else filled[own]
        )
        parts.append(_of_tile(pool[own].to(dtype), count, distance, known, there))
    if not parts:
        return Centers(
            torch.zeros(0, count, dtype=torch.int64, device=pool.device),
            torch.zeros(0, count, dtype=dtype, device=pool.device),
        )
    return Centers(torch.cat([p.chosen for p in parts]), torch.cat([p.radii for p in parts]))


def _of_tile(
    points: Float[Tensor, "c b D"],
    count: int,
    distance: CenterDistance,
    covering: Float[Tensor, "c s D"] | None,
    filled: Bool[Tensor, "c b"],
) -> Centers:
    # Whatever an unfilled place holds, be it nan, must not reach a maximum.
    points = points.masked_fill(~filled[..., None], 0)
    if distance == "cosine":
        points = torch.nn.functional.normalize(points, dim=-1)
        covering = None if covering is None else torch.nn.functional.normalize(covering, dim=-1)
    nowhere = torch.full_like(points[..., 0], -1.0).masked_fill(filled, torch.inf)
    nearest = nowhere
    if covering is not None:
        for known in covering.unbind(1):
            nearest = torch.minimum(nearest, _squares(points, known))
    # What the first choice goes by; nothing is near yet where nothing covers.
    urgency = nearest
    if (covering is None or covering.shape[1] == 0) and distance == "l2":
        urgency = torch.minimum(nearest, (points * points).sum(-1))
    classes = torch.arange(len(points), device=points.device)
    chosen, radii = [], []
    for _ in range(count):
        place = urgency.argmax(1)  # The first of equal ones; -1 where there is no point.
        chosen.append(place)
        nearest = torch.minimum(nearest, _squares(points, points[classes, place]))
        urgency = nearest
        radii.append(nearest.amax(1).clamp_min(0).sqrt())
    empty = ~filled.any(1, keepdim=True)
    return Centers(torch.stack(chosen, 1).masked_fill(empty, -1), torch.stack(radii, 1))


def _squares(points: Float[Tensor, "c b D"], one: Float[Tensor, "c D"]) -> Float[Tensor, "c b"]:
    return (points - one[:, None]).square_().sum(-1)
