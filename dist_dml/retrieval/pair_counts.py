"""How many pairs of the same and of different classes have which value.

Pairs of the same class (genuine) are few: each is computed in float64 and kept. Pairs of different
classes (impostors) are nearly all q*g pairs: they are counted in fine bins, tile by tile.

Which pairs there are. With a separate gallery, each query with each gallery item, without pairs of
one id. Among the queries themselves, each two of them once. Beyond a number of pairs, only those of
queries drawn at random: drawing whole pairs would leave no tile to multiply. Among themselves, a
pair counts if either end is drawn, so that all pairs have the same chance.

Dimensions: `q` queries, `g` gallery items, `b` bins with `e` = b + 1 edges, `n` pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.keyed_random import generator, key_of
from dist_dml.retrieval.class_pairs import check_embedding_distance, class_pairs, pair_values
from dist_dml.retrieval.distances import Distance
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.exact_values import as_tensor
from dist_dml.retrieval.neighbours import check_search
from dist_dml.retrieval.protocol import relevant_counts

NUM_BINS = 2**16
MOST_GENUINE = 2**22
"""Pairs of one class that are kept: 32 MiB, and about 4 s at D = 512."""
MOST_IMPOSTORS = 2**28
"""Pairs that are multiplied and counted: about 9 s of one core at D = 512 (November 2026)."""
_LARGEST_SQUARE = 1e36
_TILE_ROWS = 512
_TILE_COLUMNS = 4096


@dataclass(frozen=True)
class PairTotals:
    """All pairs there are, whether they are looked at or not."""

    genuine: int
    impostor: int


def pair_totals(queries: Embeddings, gallery: Embeddings | None) -> PairTotals:
    """Pairs of the same class and of different classes, counted from labels and ids alone."""
    if gallery is None:
        genuine = int(relevant_counts(queries, queries).sum()) // 2
        return PairTotals(genuine, len(queries) * (len(queries) - 1) // 2 - genuine)
    genuine = int(relevant_counts(queries, gallery).sum())
    itself = int(np.isin(queries.ids, gallery.ids).sum())
    return PairTotals(genuine, len(queries) * len(gallery) - itself - genuine)


@dataclass(frozen=True)
class PairCounts:
    """Values of genuine pairs, and counts of both kinds by bin."""

    edges: Float64[np.ndarray, " e"]
    """Ascending. Bins hold their lower edge; what is beyond an end is in the last bin there."""
    genuine_values: Float64[np.ndarray, " n"]
    """Ascending."""
    genuine: Int64[np.ndarray, " b"]
    impostor: Int64[np.ndarray, " b"]
    totals: PairTotals
    """Of all queries; counts are of the queries drawn."""
    queries_of_genuine: int
    """Queries whose genuine pairs are counted."""
    queries_of_impostors: int


def count_pairs(
    queries: Embeddings,
    gallery: Embeddings | None,
    distance: Distance,
    seed: int,
    most_genuine: int = MOST_GENUINE,
    most_impostors: int = MOST_IMPOSTORS,
) -> PairCounts:
    """Counts the pairs of both kinds; the same for the same seed.

    Costs 2*D operations for each impostor pair looked at, on torch's threads, and beside prepared
    vectors at most `8 * most_genuine` bytes and 80 MiB. Impostors are computed in float32: a
    squared distance is uncertain by about 1e-7 times the squared lengths.

    Args:
        queries: one side of the pairs.
        gallery: the other; None pairs the queries among themselves.
        distance: `cosine` or `l2`.
        seed: of the draw of queries, where there are more pairs than the next two allow.
        most_genuine: genuine pairs looked at, in whole queries and those of one query at least.
        most_impostors: likewise pairs among which impostors are counted.

    Raises:
        UsageError: for other distances; where there is no genuine pair or no impostor pair; where
            ids or widths do not fit.
    """
    check_embedding_distance(distance)
    searched = queries if gallery is None else gallery
    check_search(queries.vectors, searched.vectors, 1, queries.ids, searched.ids)
    totals = pair_totals(queries, gallery)
    if not totals.genuine or not totals.impostor:
        kind = "the same class" if not totals.genuine else "different classes"
        raise UsageError(
            f"{len(queries)} queries and {len(searched)} gallery items make no pair of {kind}; "
            "verification needs both kinds"
        )
    drawn = _Drawn.of(queries, gallery, seed, most_genuine, most_impostors)
    _check_lengths(queries, searched, distance)
    left = distance.prepare(drawn.queries.vectors)
    right = left if gallery is None else distance.prepare(gallery.vectors)
    values = _genuine_values(drawn, left, right, distance)
    edges = np.linspace(*_range_of(values, distance), NUM_BINS + 1)
    impostor = _impostor_counts(drawn, left, right, distance, edges)
    if not impostor.any():
        raise UsageError(
            f"the {drawn.of_impostors} queries drawn make no pair of different classes; raise "
            f"most_impostors={most_impostors}"
        )
    genuine_bins = bins_of(torch.from_numpy(values).float(), edges)
    return PairCounts(
        edges=edges,
        genuine_values=values,
        genuine=np.bincount(genuine_bins.numpy(), minlength=NUM_BINS),
        impostor=impostor,
        totals=totals,
        queries_of_genuine=drawn.of_genuine,
        queries_of_impostors=drawn.of_impostors,
    )


@dataclass(frozen=True)
class _Drawn:
    """The queries in the order in which they are looked at, and how many of them are."""

    queries: Embeddings
    gallery: Embeddings | None
    of_genuine: int
    of_impostors: int

    @staticmethod
    def of(
        queries: Embeddings, gallery: Embeddings | None, seed: int, genuine: int, impostors: int
    ) -> _Drawn:
        among = gallery is None
        count = len(queries)
        pairs = np.arange(count - 1, -1, -1) if among else np.full(count, len(gallery or ()))
        matches = relevant_counts(queries, queries if gallery is None else gallery)
        needs_draw = pairs.sum() > impostors or matches.sum() // (2 if among else 1) > genuine
        if needs_draw:
            order = generator(key_of(seed, "verification pairs")).permutation(count)
            queries, matches = queries.rows(order), matches[order]
        # Of genuine pairs a bound: each counts for both of its ends.
        limits = ((matches, genuine if needs_draw else matches.sum()), (pairs, impostors))
        cuts = [int(np.searchsorted(np.cumsum(one), most, side="right")) for one, most in limits]
        # A query without a match is no draw: the first one with any is always looked at.
        cuts[0] = max(cuts[0], int((matches > 0).argmax()) + 1)
        return _Drawn(queries, gallery, cuts[0], max(cuts[1], 1))


def _genuine_values(
    drawn: _Drawn, left: np.ndarray, right: np.ndarray, distance: Distance
) -> np.ndarray:
    some = drawn.queries.rows(slice(0, drawn.of_genuine))
    gallery = drawn.queries if drawn.gallery is None else drawn.gallery
    parts = []
    for rows, columns in class_pairs(some, gallery):
        if drawn.gallery is None:
            once = rows < columns
            rows, columns = rows[once], columns[once]
        parts.append(pair_values(left, right, rows, columns, distance))
    return np.sort(np.concatenate(parts))


def _range_of(genuine: np.ndarray, distance: Distance) -> tuple[float, float]:
    """Between which values bins are needed: beyond the farthest genuine pair all are accepted."""
    if distance.larger_is_nearer:
        return -1.0, 1.0
    farthest = float(genuine[-1])
    return 0.0, farthest * (1 + 2.0**-8) if farthest > 0 else 1.0


def bins_of(values: Float32[Tensor, "*n"], edges: Float64[np.ndarray, " e"]) -> Int64[Tensor, "*n"]:
    """The bin of each value, 0..b-1; `values` is overwritten.

    In float32 for both kinds of pairs, so that equal values share a bin.
    """
    scale = (len(edges) - 1) / float(edges[-1] - edges[0])
    return values.sub_(float(edges[0])).mul_(scale).clamp_(0, len(edges) - 2).to(torch.int64)


def _impostor_counts(
    drawn: _Drawn, left: np.ndarray, right: np.ndarray, distance: Distance, edges: np.ndarray
) -> np.ndarray:
    gallery = drawn.queries if drawn.gallery is None else drawn.gallery
    labels, items = torch.from_numpy(drawn.queries.labels), torch.from_numpy(gallery.labels)
    lengths = None if distance.larger_is_nearer else (_lengths(left), _lengths(right))
    counts = torch.zeros(NUM_BINS + 1, dtype=torch.int64)
    for start in range(0, drawn.of_impostors, _TILE_ROWS):
        rows = slice(start, min(start + _TILE_ROWS, drawn.of_impostors))
        # Among themselves, a pair is met in the row of the query that stands first.
        begin = start if drawn.gallery is None else 0
        for first in range(begin, len(gallery), _TILE_COLUMNS):
            columns = slice(first, min(first + _TILE_COLUMNS, len(gallery)))
            values = as_tensor(left[rows]) @ as_tensor(right[columns]).T
            if lengths is not None:
                both = lengths[0][rows, None] + lengths[1][None, columns]
                values = values.mul_(-2).add_(both)
            found = bins_of(values, edges)
            # An item of the query's own id has its label too.
            found.masked_fill_(labels[rows, None] == items[None, columns], NUM_BINS)
            if drawn.gallery is None and first < rows.stop:
                place = torch.arange(columns.start, columns.stop)
                met = place[None, :] <= torch.arange(rows.start, rows.stop)[:, None]
                found.masked_fill_(met, NUM_BINS)
            counts += torch.bincount(found.view(-1), minlength=NUM_BINS + 1)
    return counts[:NUM_BINS].numpy()


def _check_lengths(queries: Embeddings, gallery: Embeddings, distance: Distance) -> None:
    largest = max(float(np.abs(part.vectors).max(initial=0)) for part in (queries, gallery))
    if not distance.larger_is_nearer and largest**2 * queries.vectors.shape[1] > _LARGEST_SQUARE:
        raise UsageError(
            f"embeddings hold a value of {largest:g}, whose squared distances are too large for "
            "float32; divide all of them by one number, or verify by cosine"
        )


def _lengths(vectors: np.ndarray) -> Tensor:
    return torch.from_numpy(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)).float()
