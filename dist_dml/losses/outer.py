"""The function F around the sum of paper A's losses (eq. 7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_dml.errors import UsageError


@dataclass(frozen=True)
class Outer:
    """The function F around the sum: F(0) = 0, strictly increasing, C^2 on [0, inf) (Def. 4).

    Increasing means that F never changes which of two images is nearer. Concave means that it
    keeps a triangle inequality: F(a + b) <= F(a) + F(b). Lemma 2 of the paper prints "non-convex";
    its proof uses F'' <= 0, and a function that is neither need not do.

    Attributes:
        name: stands in messages.
        function: elementwise, also at inf, where F may be infinite.
        is_concave: on [0, inf).
        makes_every_k_a_metric: F(-log(1 - u)) is concave in u on [0, 1): see the module's text.

    Raises:
        UsageError: if a claim fails on a grid of points; passing it proves nothing.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    is_concave: bool
    makes_every_k_a_metric: bool = False

    def __post_init__(self) -> None:
        # Evenly spaced by a factor, so that any scale of F is met somewhere.
        grid = torch.cat((torch.zeros(1), torch.logspace(-6, 2.5, 400))).double()
        values = self.function(grid)
        what = f"the outer function F={self.name}"
        if float(values[0]) != 0 or not bool((values[1:] > 0).all()):
            raise UsageError(f"{what} needs F(0) = 0 and F(t) > 0 beyond (paper A, Def. 4)")
        if bool((values.diff() < 0).any()):
            raise UsageError(f"{what} must increase strictly (paper A, Def. 4); it falls somewhere")
        if self.is_concave and not _is_concave_on(grid, values):
            raise UsageError(f"{what} is no concave function; say is_concave=False")
        if self.makes_every_k_a_metric:
            u = torch.linspace(0, 0.999, 400).double()
            if not (self.is_concave and _is_concave_on(u, self.function(-torch.log1p(-u)))):
                raise UsageError(f"{what} has no concave F(-log(1 - u)): k > K(p) stays no metric")


def _is_concave_on(points: Tensor, values: Tensor) -> bool:
    """Whether the slopes of the chords never rise, up to rounding."""
    slopes = values.diff() / points.diff()
    rounding = 1e-13 * values.abs()[1:] / points.diff()
    return bool((slopes.diff() <= rounding[:-1] + rounding[1:]).all())


IDENTITY = Outer("t", lambda t: t, is_concave=True)
LOGARITHM = Outer("log(1 + t)", torch.log1p, is_concave=True)
# As 1 - exp(-log(1 + t)): t / (1 + t) itself is nan at inf.
RATIO = Outer("t / (1 + t)", lambda t: -torch.expm1(-torch.log1p(t)), is_concave=True)
SATURATION = Outer(
    "1 - exp(-t)", lambda t: -torch.expm1(-t), is_concave=True, makes_every_k_a_metric=True
)
