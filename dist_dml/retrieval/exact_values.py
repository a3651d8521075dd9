"""The value of a pair of embeddings, defined to the bit, and the order of neighbours.

A search may choose its candidates by any arithmetic whose error is bounded; what it returns is
ranked by these values. So all backends, devices, block sizes and numbers of workers give the same
neighbours in the same order, also where distances differ by less than float32 can hold.

Dimensions: `n` pairs of vectors of width `D`, `q` queries, `m` candidates of each.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

SUMS = 32
"""Partial sums; `native/exact_values.hpp` has the same number."""


def as_tensor(array: np.ndarray) -> Tensor:
    """The same memory where torch can take it."""
    usable = np.require(array, requirements=["C", "W"])
    # A slice backwards of one element is contiguous for numpy; torch knows no negative strides.
    return torch.from_numpy(usable.copy() if min(usable.strides, default=0) < 0 else usable)


def pair_values(
    queries: Float32[Tensor, "n D"], items: Float32[Tensor, "n D"], squares: bool
) -> Float64[Tensor, " n"]:
    """Inner products of pairs, or their squared distances, in float64.

    Term d, `x_d y_d` or `(x_d - y_d)^2`, is added to partial sum `d % 32` in the order of d; then
    the upper half of the sums is added to the lower until one is left. A product of two float32 is
    exact in float64. Holds 8 n D bytes a few times.
    """
    a, b = queries.double(), items.double()
    terms = (a - b) * (a - b) if squares else a * b
    terms = torch.nn.functional.pad(terms, (0, -terms.shape[1] % SUMS))
    sums = torch.zeros(len(terms), SUMS, dtype=torch.float64, device=terms.device)
    for group in terms.unflatten(1, (-1, SUMS)).unbind(1):
        sums = sums + group
    width = SUMS
    while width > 1:
        width //= 2
        sums = sums[:, :width] + sums[:, width:]
    return sums[:, 0]


def nearest_first(keys: Float64[Tensor, "q m"], ids: Int64[Tensor, "q m"]) -> Int64[Tensor, "q m"]:
    """The order of candidates: by key (smaller is nearer), equal ones by id."""
    by_id = torch.argsort(ids, dim=1, stable=True)
    by_key = torch.argsort(torch.gather(keys, 1, by_id), dim=1, stable=True)
    return torch.gather(by_id, 1, by_key)


def merge_nearest(
    values: list[Float64[np.ndarray, "q m"]],
    ids: list[Int64[np.ndarray, "q m"]],
    positions: list[Int64[np.ndarray, "q m"]],
    k: int,
    squares: bool,
) -> tuple[Float64[np.ndarray, "q k"], Int64[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]:
    """The `k` nearest of the nearest of several parts of a gallery.

    Equal to searching all parts at once, for values of `pair_values`.

    Args:
        values: of each part; infinitely far where there is no neighbour.
        ids: what orders equal values.
        positions: -1 where there is no neighbour.
        k: neighbours wanted; each part has its `k` nearest, or all it has.
        squares: whether values are squared distances, smaller is nearer.

    Returns:
        Values, ids and positions, filled up with far, 0 and -1.
    """
    far = np.inf if squares else -np.inf
    parts = (np.concatenate(part, axis=1) for part in (values, ids, positions))
    value, number, position = parts
    missing = max(0, k - value.shape[1])
    value = np.pad(value, ((0, 0), (0, missing)), constant_values=far)
    number = np.pad(number, ((0, 0), (0, missing)))
    position = np.pad(position, ((0, 0), (0, missing)), constant_values=-1)
    key = value if squares else -value
    # What is no neighbour stands last also beside infinite values.
    order = np.lexsort((number, position < 0, key), axis=1)[:, :k]
    taken = (np.take_along_axis(part, order, axis=1) for part in (value, number, position))
    value, number, position = taken
    return value, number, position
