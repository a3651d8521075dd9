"""Scores of low precision that rank like the exact values, and how far off they may be.

A query q and an item g are moved by the gallery's mean m and scaled by a power of two s:
q' = (q - m) s, g' = (g - m) s. Then `q'.g' + b(g)` ranks the items of a query like the inner
product, with b = m s.g', and like the squared distance, with b = -|g'|^2 / 2: all other terms are
the same for every item. The product is computed from rounded q' and g' in float32. It differs from
the true one by at most

    |q' - q~| |g'|  +  |q~| |g' - g~|  +  (D + 4) 2^-22 |q~| |g~|  +  2^-20 |b|

(Cauchy-Schwarz), where q~ and g~ are the rounded vectors, whose distances from the true ones are
measured, and the third term covers float32 sums in any order. Moving makes all norms small where
embeddings lie close together, as those of an untrained network do. A few items far from all others
would make the largest norm, and with it every bound, useless: they are candidates of every query.

Let E be this bound and t the k-th largest computed score of a query. The k items from t up truly
score at least t - E; so whatever is computed below t - 2 E is not among the k nearest.
`native/neighbours.hpp` does the same in C++.

Dimensions: `g` items, `q` queries, vectors of width `D`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

_ROWS = 8192
"""Rows that are moved in float64 at a time."""
_FAR = 8.0
"""Times the median distance from the mean."""
_MOST_FAR = 64
"""Items that every query may be compared with in float64 besides: as many as it has candidates."""
_BELOW_ALL = -3e38
"""The score of a far item, whose true one nobody asks for."""


@dataclass(frozen=True)
class Move:
    """How a gallery is moved."""

    mean: Float64[np.ndarray, " D"]
    """m, without the far items."""
    scale: float
    """s, a power of two: all other |g'| are at most 1."""
    far: Int64[np.ndarray, " f"]
    """Positions of a few items far from all others, in order."""

    @staticmethod
    def of(gallery: Float32[np.ndarray, "g D"]) -> Move:
        """Two passes over the gallery in float64."""
        mean = gallery.mean(axis=0, dtype=np.float64)
        norms = _distances(gallery, mean)
        far = np.flatnonzero(norms > _FAR * np.median(norms))
        if 0 < len(far) <= _MOST_FAR:
            near = len(gallery) - len(far)
            mean = (mean * len(gallery) - gallery[far].sum(axis=0, dtype=np.float64)) / near
            norms = _distances(gallery, mean)
            far = np.flatnonzero(norms > _FAR * np.median(norms))
        if len(far) > _MOST_FAR:  # They are no exceptions.
            far = far[:0]
        norms[far] = 0
        largest = float(norms.max())
        scale = float(2.0 ** -np.ceil(np.log2(largest))) if largest > 0 else 1.0
        return Move(mean, scale, far)


def _distances(gallery: np.ndarray, mean: np.ndarray) -> Float64[np.ndarray, " g"]:
    squares = np.empty(len(gallery))
    for start in range(0, len(gallery), _ROWS):
        part = gallery[start : start + _ROWS] - mean
        squares[start : start + _ROWS] = np.einsum("nd,nd->n", part, part)
    return np.sqrt(squares)


@dataclass(frozen=True)
class MovedRows:
    """Rounded rows and what the bound needs of each: norms of q', of q' - q~ and of q~."""

    rows: Tensor
    whole: Float64[Tensor, " q"]
    rest: Float64[Tensor, " q"]
    rounded: Float64[Tensor, " q"]


@dataclass(frozen=True)
class ScoreProblem:
    """A gallery as a matrix product reads it."""

    gallery: Float32[Tensor, "g D"]
    """As given: what exact values are computed from."""
    ids: Int64[Tensor, " g"]
    squares: bool
    mean: Float64[Tensor, " D"]
    scale: float
    moved: Tensor
    """g~, (g, D), of the products' dtype."""
    bias: Float32[Tensor, " g"]
    largest: tuple[float, float, float, float]
    """Over the gallery but for the far items: of |g'|, |g' - g~|, |g~| and |b|."""
    far: Int64[Tensor, " f"]
    """Items that are candidates of every query; their scores are below all others."""

    @staticmethod
    def of(
        gallery: Float32[Tensor, "g D"],
        ids: Int64[Tensor, " g"],
        squares: bool,
        dtype: torch.dtype,
    ) -> ScoreProblem:
        """Move and round a gallery; costs one more copy of it, in `dtype`."""
        move = Move.of(gallery.cpu().numpy())
        scale, far = move.scale, torch.from_numpy(move.far).to(gallery.device)
        middle = torch.from_numpy(move.mean).to(gallery.device)
        parts = [_moved(rows, middle, scale, dtype) for rows in gallery.split(_ROWS)]
        biases = []
        for rows, part in zip(gallery.split(_ROWS), parts, strict=True):
            if squares:
                biases.append(-part.whole.square() / 2)
            else:
                biases.append(((rows.double() - middle) * scale) @ (middle * scale))
        bias = torch.cat(biases).index_fill(0, far, 0.0)
        norms = []
        for name in ("whole", "rest", "rounded"):
            every = torch.cat([getattr(part, name) for part in parts])
            norms.append(float(every.index_fill(0, far, 0.0).max()))
        largest = (norms[0], norms[1], norms[2], float(bias.abs().max()))
        moved = torch.cat([part.rows for part in parts]).index_fill(0, far, 0.0)
        scores = bias.float().index_fill(0, far, _BELOW_ALL)
        return ScoreProblem(gallery, ids, squares, middle, scale, moved, scores, largest, far)

    def move(self, queries: Float32[Tensor, "q D"]) -> tuple[Tensor, Float64[Tensor, " q"]]:
        """q~ of each query, and 2 E; infinite where float32 scores could overflow."""
        moved = _moved(queries, self.mean, self.scale, self.moved.dtype)
        width, (whole, rest, rounded, bias) = queries.shape[1], self.largest
        product = moved.rounded * rounded
        sums = 2.0**-22 * ((width + 4) * product + 4 * bias)
        # The values and b are sums in float64, in which the mean takes part.
        middle = 0.0 if self.squares else float(self.mean.norm()) * self.scale
        values = 2.0**-51 * (width + 16) * (moved.whole + whole + middle).square()
        least = 2.0**-120 * width  # What float32 cannot hold counts as 0.
        error = (moved.rest * whole + moved.rounded * rest + sums + values) * 1.001 + least
        usable = torch.isfinite(error) & (product < 1e30) & (torch.tensor(bias) < 1e30)
        return moved.rows, torch.where(usable, 2 * error, torch.inf)


def _moved(
    rows: Float32[Tensor, "q D"], mean: Float64[Tensor, " D"], scale: float, dtype: torch.dtype
) -> MovedRows:
    exact = (rows.double() - mean) * scale
    rounded = exact.to(torch.float32).to(dtype)
    back = rounded.double()
    # Norms are rounded up: their own sums are off by far less than a billionth.
    norms = [torch.linalg.vector_norm(x, dim=1) * (1 + 1e-9) for x in (exact, exact - back, back)]
    return MovedRows(rounded, norms[0], norms[1], norms[2])
