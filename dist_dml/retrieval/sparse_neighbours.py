"""Neighbours by L_m between truncated probability vectors: for classes too many to keep.

Each vector keeps its T largest probabilities, all others count as 0. This is another distance than
the full L_m, and named so (`metric(..., top=T)`); at T = C it is the same.

With h(d) = -(1/p) log(1 - k d^p), S_x the classes kept of x:

    L(x, y) = sum over S_x of h(x_i) + sum over S_y of h(y_i)
              + sum over both of [h(|x_i - y_i|) - h(x_i) - h(y_i)]

so only classes that both keep cost anything: an inverted index lists, for each class, the gallery
items that keep it. Two precautions against the subtraction: the largest class of a vector, which
outweighs the others by far, is left out of the sums and added only where the other vector lacks it;
and where both keep the same classes nothing remains, exactly. So equal vectors have distance 0.

Dimensions: `q` queries, `g` gallery items, `T` kept classes, `k` neighbours.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64

from dist_dml.errors import UsageError
from dist_dml.metric_parameters import MetricParameters
from dist_dml.retrieval.distances import Distance
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.neighbours import check_search
from dist_dml.retrieval.probability_distances import (
    coordinate_distances,
    log_differences,
)
from dist_dml.retrieval.probability_neighbours import (
    BUDGET_BYTES,
    exclude_,
    nearest_in_rows,
    own_positions,
)

_BYTES_PER_PAIR = 48  # Accumulators and distances of one query and one gallery item.
_BYTES_PER_MATCH = 128  # Temporaries of one kept class that a query and an item share.


@dataclass(frozen=True)
class Truncated:
    """Truncated vectors, with h of each kept probability against 0."""

    logs: Float64[np.ndarray, "n T"]
    classes: Int64[np.ndarray, "n T"]
    alone: Float64[np.ndarray, "n T"]
    """h(x_i)."""
    is_largest: Bool[np.ndarray, "n T"]
    """The first largest class of each row."""
    largest: Float64[np.ndarray, " n"]
    """h of that class; infinite for k = 1 and a probability of 1."""
    others: Float64[np.ndarray, " n"]
    """The sum of h over all other kept classes."""


def truncated(
    logs: Float32[np.ndarray, "n T"],
    support: Int64[np.ndarray, "n T"],
    parameters: MetricParameters,
) -> Truncated:
    """Everything about each vector that does not depend on the other one."""
    values = np.minimum(logs.astype(np.float64), 0)
    alone = coordinate_distances(torch.from_numpy(values).exp(), parameters).numpy()
    rows, largest = np.arange(len(values)), values.argmax(axis=1)
    is_largest = np.zeros(values.shape, dtype=bool)
    is_largest[rows, largest] = True
    others = np.where(is_largest, 0.0, alone).sum(axis=1)
    return Truncated(values, support, alone, is_largest, alone[rows, largest], others)


@dataclass(frozen=True)
class InvertedIndex:
    """The gallery by class: entries `starts[j]` to `starts[j + 1]` keep `classes[j]`."""

    classes: Int64[np.ndarray, " u"]
    starts: Int64[np.ndarray, " _"]
    order: Int64[np.ndarray, " m"]
    """Entry -> its place in the flattened (g, T) arrays of the gallery."""

    @staticmethod
    def of(support: Int64[np.ndarray, "g T"]) -> InvertedIndex:
        """Costs one sort of g*T class ids and 8 bytes for each; C does not matter."""
        flat = support.ravel()
        order = np.argsort(flat, kind="stable")
        classes, starts = np.unique(flat[order], return_index=True)
        return InvertedIndex(classes, np.append(starts, len(flat)), order)

    def lists(
        self, wanted: Int64[np.ndarray, " w"]
    ) -> tuple[Int64[np.ndarray, " w"], Int64[np.ndarray, " w"]]:
        """First entry and number of entries of each wanted class."""
        place = np.searchsorted(self.classes, wanted).clip(max=len(self.classes) - 1)
        found = self.classes[place] == wanted
        return self.starts[place], np.where(found, np.diff(self.starts)[place], 0)


def sparse_blocks(
    queries: Embeddings, gallery: Embeddings, k: int, distance: Distance
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """The `k` nearest items block by block: (rows of `queries`, positions (b, k), L (b, k)).

    As `probability_neighbours.probability_blocks`, ids included, for embeddings that hold the
    largest log-probabilities and their `support`. Equal, to about 1e-15 of the sums above, to the
    dense distance of the truncated vectors. Costs one evaluation of h for each class that a query
    and an item both keep, O(g) a query for the selection, about 40 bytes a kept log-probability of
    the gallery, and `BUDGET_BYTES`.
    """
    assert distance.parameters is not None
    assert queries.support is not None
    assert gallery.support is not None
    check_search(queries.vectors, gallery.vectors, k, queries.ids, gallery.ids)
    own = own_positions(queries.ids, gallery.ids)
    assert own is not None
    items = truncated(gallery.vectors, gallery.support, distance.parameters)
    index = InvertedIndex.of(gallery.support)
    step = max(1, BUDGET_BYTES // 2 // (_BYTES_PER_PAIR * len(gallery)))
    for start in range(0, len(queries), step):
        rows = slice(start, min(start + step, len(queries)))
        block = truncated(queries.vectors[rows], queries.support[rows], distance.parameters)
        values = _distances(block, items, index, distance.parameters)
        exclude_(values, own[rows])
        yield rows, *nearest_in_rows(values, k)


def _distances(
    queries: Truncated, items: Truncated, index: InvertedIndex, parameters: MetricParameters
) -> Float64[np.ndarray, "b g"]:
    """L between every query of a block and every item of the gallery."""
    b, g = len(queries.largest), len(items.largest)
    count = np.zeros(b * g, dtype=np.int64)
    has_query_largest, has_item_largest = np.zeros((2, b * g), dtype=bool)
    query_others, item_others, both = np.zeros((3, b * g))
    for query_place, item_place in _matches(queries.classes, items.classes.shape[1], index):
        a, b_ = (
            torch.from_numpy(values.logs.ravel()[place])
            for values, place in ((queries, query_place), (items, item_place))
        )
        shared = coordinate_distances(log_differences(a, b_), parameters).numpy()
        pair = query_place // queries.classes.shape[1] * g + item_place // items.classes.shape[1]
        query_top = queries.is_largest.ravel()[query_place]
        item_top = items.is_largest.ravel()[item_place]
        # `add.at` adds one after the other: the result does not depend on how matches are cut.
        np.add.at(count, pair, 1)
        np.add.at(both, pair, shared)
        np.add.at(query_others, pair, np.where(query_top, 0, queries.alone.ravel()[query_place]))
        np.add.at(item_others, pair, np.where(item_top, 0, items.alone.ravel()[item_place]))
        has_query_largest[pair[query_top]] = True
        has_item_largest[pair[item_top]] = True
    values = (queries.largest + queries.others)[:, None] + (items.largest + items.others)
    pairs = np.flatnonzero(count)
    x, y = pairs // g, pairs % g
    # Only rounding makes a rest negative; none is left where the kept classes coincide.
    differ = (count[pairs] < queries.classes.shape[1]) | (count[pairs] < items.classes.shape[1])
    rest = np.maximum(queries.others[x] - query_others[pairs], 0)
    rest += np.maximum(items.others[y] - item_others[pairs], 0)
    rest = np.where(differ, rest, 0.0)
    rest += np.where(has_query_largest[pairs], 0.0, queries.largest[x])
    rest += np.where(has_item_largest[pairs], 0.0, items.largest[y])
    values.ravel()[pairs] = rest + both[pairs]
    return values


def _matches(
    wanted: Int64[np.ndarray, "b T"], width: int, index: InvertedIndex
) -> Iterator[tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]]:
    """Places (query, item) in the flattened arrays of classes kept by both, query by query.

    In parts of half the budget; one query's class is never cut, as it has at most g matches.
    """
    first, number = index.lists(wanted.ravel())
    most = max(1, BUDGET_BYTES // 2 // _BYTES_PER_MATCH)
    part = np.cumsum(number) // most
    cuts = [0, *(np.flatnonzero(np.diff(part)) + 1), len(part)]
    for start, stop in itertools.pairwise(cuts):
        some = number[start:stop]
        query_place = np.repeat(np.arange(start, stop), some)
        within = np.arange(some.sum()) - np.repeat(np.cumsum(some) - some, some)
        entry = np.repeat(first[start:stop], some) + within
        if len(entry):
            yield query_place, index.order[entry]


def truncate(embeddings: Embeddings, distance: Distance) -> Embeddings:
    """The `distance.top` largest log-probabilities of full ones, and their classes.

    Of equal ones the lower class ids. What the evaluation of many classes gets from the classifier
    directly; this is for comparing both distances where full vectors exist.

    Raises:
        UsageError: if these embeddings have a support already.
    """
    if embeddings.support is not None:
        raise UsageError(f"{distance.name}: the vectors are truncated already; give full ones")
    top = min(distance.top, embeddings.vectors.shape[1])
    support = np.argsort(-embeddings.vectors, axis=1, kind="stable")[:, :top]
    vectors = np.take_along_axis(embeddings.vectors, support, axis=1)
    return Embeddings(vectors, embeddings.labels, embeddings.ids, support)
