"""Exact neighbours by L_m with fewer distances: the triangle inequality, class vertices as pivots.

For a metric, `|L(q, l) - L(g, l)| <= L(q, g)` for any point l. The vertices of the simplex (the
one-hot labels) are pivots that cost nothing: with H(x) = sum_j h(x_j) and h(d) = -(1/p) log(1 - k
d^p), `L(x, vertex l) = H(x) - h(x_l) + h(1 - x_l)`, one number a class after O(C) work a sample.
A gallery item whose bound exceeds the k-th best distance found so far need not be compared.

Only for L_m itself, whose outer function is the identity, and only for k <= K(p) (eq. 17).

Dimensions: `q` queries, `g` gallery items, `C` classes, `k` neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.metric_parameters import MetricParameters, largest_metric_k
from dist_dml.retrieval.exact_values import as_tensor
from dist_dml.retrieval.neighbours import NO_NEIGHBOUR, check_search
from dist_dml.retrieval.probability_distances import (
    Reduction,
    coordinate_distances,
    metric_sums,
    pairwise_sums,
)
from dist_dml.retrieval.probability_neighbours import (
    nearest_in_rows,
    nearest_of,
    own_positions,
    query_blocks,
)


@dataclass(frozen=True)
class PrunedNeighbours:
    """What `pruned_neighbours` found."""

    indices: Int64[np.ndarray, "q k"]
    """Gallery positions, nearest first; -1 where fewer than `k` remain."""
    distances: Float64[np.ndarray, "q k"]
    """L_m; infinite where there is no neighbour."""
    share_computed: float
    """Distances computed over all q*g. Slightly above 1 where pruning was tried and given up."""


def pruned_neighbours(
    queries: Float32[np.ndarray, "q C"],
    gallery: Float32[np.ndarray, "g C"],
    k: int,
    parameters: MetricParameters,
    query_ids: Int64[np.ndarray, " q"] | None = None,
    gallery_ids: Int64[np.ndarray, " g"] | None = None,
) -> PrunedNeighbours:
    """The `k` nearest items, without comparing those that the triangle inequality excludes.

    Neighbours and distances are bitwise those of `probability_neighbours.probability_blocks`, ties
    and self matches included. Each query visits the gallery in the order of the lower bound, in
    blocks that double, until the k-th best distance lies below the next bound; where more than a
    quarter of the gallery remains after the first block, all is compared. Worth it for a confident
    classifier, p about 1/2 and fewer neighbours than a class has: docs/evaluation.md has
    measurements.

    Args:
        queries: log-probabilities.
        gallery: likewise.
        k: neighbours a query.
        parameters: of a metric.
        query_ids: as everywhere: no query finds the item of its own id.
        gallery_ids: no id twice.

    Raises:
        UsageError: if the parameters make no metric, or as `neighbours.exact_neighbours`.
    """
    if not parameters.is_metric:
        raise UsageError(
            f"pruning needs the triangle inequality, which k={parameters.k:g}, p={parameters.p:g} "
            f"break: it holds for k <= K(p) = {largest_metric_k(parameters.p):.6g}; lower k, or "
            "search without pruning"
        )
    check_search(queries, gallery, k, query_ids, gallery_ids)
    own = own_positions(query_ids, gallery_ids)
    rows, items, reduce_ = as_tensor(queries), as_tensor(gallery), metric_sums(parameters)
    bounds, sums = _Bounds.of(items, parameters), _class_sums(rows, parameters)
    indices = np.full((len(queries), k), NO_NEIGHBOUR, dtype=np.int64)
    distances = np.full((len(queries), k), np.inf)
    computed, hopeless = 0, []
    top_class = queries.argmax(axis=1)
    for pivot in np.unique(top_class):
        to_pivot = _to_vertices(bounds.sums, items[:, pivot], parameters)
        for i in np.flatnonzero(top_class == pivot):
            lower = bounds.below(rows[i], sums[i], int(pivot), to_pivot)
            excluded = -1 if own is None else int(own[i])
            places, values = _compare(rows[i], items, lower, k, excluded, reduce_)
            computed += len(places)
            if values is None:
                hopeless.append(i)
                continue
            found, best = nearest_in_rows(values[None], k)
            indices[i] = np.where(found[0] == NO_NEIGHBOUR, NO_NEIGHBOUR, places[found[0]])
            distances[i] = best[0]
    for block in query_blocks(len(hopeless), len(gallery), k):
        some = np.array(hopeless[block])
        excluded = None if own is None else own[some]
        indices[some], distances[some] = nearest_of(rows[some], items, k, reduce_, excluded)
        computed += len(some) * len(gallery)
    return PrunedNeighbours(indices, distances, computed / max(1, len(queries) * len(gallery)))


@dataclass(frozen=True)
class _Bounds:
    """What the lower bounds are made of, computed once for the gallery."""

    parameters: MetricParameters
    sums: Tensor
    """H of each item (g,)."""
    top_class: Tensor
    """The most probable class of each item (g,)."""
    to_top_class: Tensor
    """L(item, vertex of that class) (g,)."""

    @staticmethod
    def of(gallery: Tensor, parameters: MetricParameters) -> _Bounds:
        sums = _class_sums(gallery, parameters)
        top, top_class = gallery.max(dim=1)
        return _Bounds(parameters, sums, top_class, _to_vertices(sums, top, parameters))

    def below(self, query: Tensor, its_sum: Tensor, pivot: int, to_pivot: Tensor) -> np.ndarray:
        """Numbers (g,) that surely are at most L(query, item), rounding included.

        Two pivots: the query's most probable class (`to_pivot`: from each item) and the item's own,
        as items of another class differ most from the query at these. Up to seven more of the
        query's excluded nothing more (November 2026, 100 classes).
        """
        to_every = _to_vertices(its_sum, query, self.parameters)
        at_item_class = to_every[self.top_class]
        bound = torch.maximum(
            (at_item_class - self.to_top_class).abs_(), (to_pivot - to_every[pivot]).abs_()
        )
        largest = to_every.max() + torch.maximum(self.to_top_class.max(), to_pivot.max())
        bound -= _slack(float(largest), self.parameters, len(query))
        # Infinite minus infinite, where k rounds to 1, says nothing.
        return torch.nan_to_num(bound, nan=-torch.inf, posinf=torch.inf).numpy()


def _compare(
    query: Tensor,
    gallery: Tensor,
    lower: np.ndarray,
    k: int,
    excluded: int,
    reduce_: Reduction,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Places of the items that were compared, ascending, and their distances (NaN: excluded).

    Gives up (None) after the first block where more than a quarter of the gallery remains: one
    query alone costs up to four times as much a distance as many together.
    """

    def distances_to(places: np.ndarray) -> np.ndarray:
        found = pairwise_sums(query[None], gallery[torch.from_numpy(places)], reduce_)[0].numpy()
        found[places == excluded] = np.nan
        return found

    step = 2 * k + 64
    if 4 * step > len(lower):
        return np.arange(0), None
    order = np.argpartition(lower, step)
    places, order = order[:step], order[step:]
    values = distances_to(places)
    while True:
        # An item whose bound equals the worst may tie with it, and stand before it.
        worst = np.partition(values, k - 1)[k - 1]
        order = order[lower[order] <= worst]
        if 4 * len(order) > len(lower):
            return places, None
        if len(order) == 0:
            break
        step = min(2 * step, len(order))
        order = order[np.argpartition(lower[order], step - 1)]
        places = np.append(places, order[:step])
        values = np.append(values, distances_to(order[:step]))
        order = order[step:]
    # Ascending, so that ties come out in the order of the gallery.
    ascending = np.argsort(places)
    return places[ascending], values[ascending]


def _class_sums(logs: Tensor, parameters: MetricParameters) -> Tensor:
    """H: the sum of h(x_j) over all classes (n,), which is the distance to no probability."""
    nothing = torch.full((1, logs.shape[1]), -torch.inf)
    return pairwise_sums(nothing, logs, metric_sums(parameters))[0]


def _to_vertices(sums: Tensor, logs: Tensor, parameters: MetricParameters) -> Tensor:
    """L(x, vertex l) from H(x) and log x_l, elementwise."""
    values = logs.double().clamp_(max=0)
    rest = coordinate_distances(values.exp(), parameters)
    return sums - rest + coordinate_distances(-values.expm1(), parameters)


def _slack(largest: float, parameters: MetricParameters, num_classes: int) -> float:
    """What rounding may take from a bound or add to a distance.

    1 - k d^p is known to 2e-16, its logarithm therefore to 2e-16 / (1 - k), C times; sums of
    logarithms to 1e-13 of themselves. A k above K(p) by its own rounding adds the excess.
    """
    excess = max(0.0, parameters.k - largest_metric_k(parameters.p))
    least = max(1 - parameters.k, 1e-16)
    each = (1e-15 + 4 * excess) / least / parameters.p
    return largest * 1e-12 + num_classes * each
