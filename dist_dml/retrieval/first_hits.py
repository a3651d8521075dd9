"""The rank of the first hit of queries that have none among their searched neighbours.

Recall@K, R-precision and MAP@R look at a few neighbours; the reciprocal rank needs the place of the
nearest item of the query's class wherever it stands. It is found without sorting the gallery: the
nearest own item first, then the number of items that are nearer.

Dimensions: `q` queries, `g` gallery items, embeddings of width `D`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.retrieval.class_pairs import class_pairs, pair_values
from dist_dml.retrieval.distances import Distance
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.exact_values import as_tensor
from dist_dml.retrieval.metrics import QueryScores
from dist_dml.retrieval.probability_neighbours import own_positions
from dist_dml.retrieval.ranking import nearest_blocks

_TILE_ROWS = 512
_TILE_COLUMNS = 4096
_SEARCHED_AT_A_TIME = 64
_MOST_UNSURE = 0.01
_LARGEST = 1e37  # Sums of squares near it overflow in float32.
NO_ID = np.iinfo(np.int64).max
"""Stands where a query has no item of its class."""


def complete_first_hits(
    scores: QueryScores, queries: Embeddings, gallery: Embeddings, distance: Distance
) -> QueryScores:
    """`scores` with `first_hit_rank` of every query that has a match.

    Only queries whose first hit stands behind the searched neighbours cost anything: by cosine and
    l2 2*g*D operations each, in tiles of 8 MiB; by distances of class probabilities one
    search of the whole gallery. The rank of an item is 1 + the number of items nearer, and of
    items of the same value with a smaller id; the query's own item has none. The same for any
    slices of the queries.

    Args:
        scores: of exactly these queries, in their order.
        queries: a worker's slice, or all.
        gallery: what was searched; the queries themselves if there is no other.
        distance: by which the neighbours were searched.

    Raises:
        UsageError: if `scores` are of other queries.
    """
    check_scored(scores, queries)
    missed = without_hit(scores)
    if not len(missed):
        return scores
    find = _counted_ranks if distance.space == "embedding" else _searched_ranks
    rank = scores.first_hit_rank.copy()
    found = find(queries.rows(missed), gallery, distance)
    # The search has looked at these; where values are a rounding apart, its order counts.
    rank[missed] = np.maximum(found, max(scores.recall_at, default=0) + 1)
    return replace(scores, first_hit_rank=rank)


def check_scored(scores: QueryScores, queries: Embeddings) -> None:
    """Whether the scores can be of these queries.

    Raises:
        UsageError: if not.
    """
    if not np.array_equal(scores.query_label, queries.labels):
        raise UsageError(
            f"scores of {len(scores.query_label)} queries do not belong to these {len(queries)}; "
            "give the queries that were scored, in their order"
        )


def without_hit(scores: QueryScores) -> Int64[np.ndarray, " n"]:
    """Rows of the queries that have a match, but none among the searched neighbours."""
    return np.flatnonzero(scores.has_match & (scores.first_hit_rank == 0))


def _searched_ranks(
    queries: Embeddings, gallery: Embeddings, distance: Distance
) -> Int64[np.ndarray, " q"]:
    """By the whole ranking of the gallery, for few queries at a time."""
    ranks = np.zeros(len(queries), dtype=np.int64)
    for start in range(0, len(queries), _SEARCHED_AT_A_TIME):
        part = queries.rows(slice(start, start + _SEARCHED_AT_A_TIME))
        for rows, positions, _ in nearest_blocks(part, gallery, len(gallery), distance):
            # Position -1 stands last, where no first hit is.
            hits = gallery.labels[positions] == part.labels[rows, None]
            hits &= positions >= 0
            ranks[start + rows.start : start + rows.stop] = hits.argmax(axis=1) + 1
    return ranks


def _counted_ranks(
    queries: Embeddings, gallery: Embeddings, distance: Distance
) -> Int64[np.ndarray, " q"]:
    """By the value of the nearest own item, and how many items have a nearer one."""
    asked = Asked.of(queries, distance)
    held = Held.of(gallery, distance)
    return 1 + count_nearer(asked, held, *nearest_own(asked, held))


@dataclass(frozen=True)
class Asked:
    """Queries whose first hits are looked for."""

    vectors: Float32[np.ndarray, "q D"]
    """As `Distance.prepare` leaves them."""
    labels: Int64[np.ndarray, " q"]
    ids: Int64[np.ndarray, " q"]
    distance: Distance

    @staticmethod
    def of(queries: Embeddings, distance: Distance) -> Asked:
        """Of embeddings, as they come."""
        prepared = distance.prepare(queries.vectors)
        return Asked(prepared, queries.labels, queries.ids, distance)


@dataclass(frozen=True)
class Held:
    """A gallery, or a worker's part of one."""

    vectors: Float32[np.ndarray, "g D"]
    """As `Distance.prepare` leaves them."""
    items: Embeddings
    lengths: Float64[Tensor, " g"]
    """Squared."""

    @staticmethod
    def of(gallery: Embeddings, distance: Distance) -> Held:
        """Of embeddings, as they come."""
        prepared = distance.prepare(gallery.vectors)
        return Held(prepared, gallery, _squared_lengths(prepared))


def nearest_own(
    asked: Asked, held: Held
) -> tuple[Float64[np.ndarray, " q"], Int64[np.ndarray, " q"]]:
    """How far the nearest item of each query's class is, and its id: the smallest of equal ones.

    Small is near, so inner products have their sign turned. Infinity where there is none.
    """
    distance, gallery = asked.distance, held.items
    sign = -1.0 if distance.larger_is_nearer else 1.0
    nearest = np.full(len(asked.ids), np.inf)
    smallest_id = np.full(len(asked.ids), NO_ID)
    for rows, columns in class_pairs(asked, gallery):
        far = sign * pair_values(asked.vectors, held.vectors, rows, columns, distance)
        # All pairs of a query come together: its first row in order of distance, then id, is it.
        order = np.lexsort((gallery.ids[columns], far, rows))
        query, first = np.unique(rows[order], return_index=True)
        nearest[query] = far[order][first]
        smallest_id[query] = gallery.ids[columns][order][first]
    return nearest, smallest_id


def count_nearer(
    asked: Asked,
    held: Held,
    nearest: Float64[np.ndarray, " q"],
    smallest_id: Int64[np.ndarray, " q"],
) -> Int64[np.ndarray, " q"]:
    """Items of other classes before each query's nearest own item, by distance and then id.

    Args:
        asked: the queries.
        held: the items that are counted.
        nearest: of the whole gallery, as the next, by `nearest_own`.
        smallest_id: see there.
    """
    distance, gallery, left = asked.distance, held.items, asked.vectors
    sign = -1.0 if distance.larger_is_nearer else 1.0
    own = own_positions(asked.ids, gallery.ids)
    assert own is not None  # Both have ids.
    lengths = _squared_lengths(left)
    counts = np.zeros(len(asked.ids), dtype=np.int64)
    for start in range(0, len(asked.ids), _TILE_ROWS):
        rows = slice(start, min(start + _TILE_ROWS, len(asked.ids)))
        for first in range(0, len(gallery), _TILE_COLUMNS):
            columns = slice(first, min(first + _TILE_COLUMNS, len(gallery)))
            tile = _Tile(
                left=as_tensor(left[rows]),
                right=as_tensor(held.vectors[columns]),
                left_lengths=lengths[rows],
                right_lengths=held.lengths[columns],
                nearest=torch.from_numpy(nearest[rows]),
                own=torch.from_numpy(own[rows] - first),
                cosine=distance.larger_is_nearer,
            )
            certain, row, column = tile.nearer_and_unsure()
            counts[rows] += certain
            # Items of the query's class are never nearer, and those as near do not count.
            item = first + column
            other = gallery.labels[item] != asked.labels[start + row]
            row, item = row[other], item[other]
            far = sign * pair_values(left, held.vectors, start + row, item, distance)
            limit = nearest[start + row]
            slack = tile.rounding * (lengths[start + row] + held.lengths[item]).numpy()
            smaller = gallery.ids[item] < smallest_id[start + row]
            ahead = (far < limit - slack) | ((far <= limit + slack) & smaller)
            counts[rows] += np.bincount(row[ahead], minlength=rows.stop - start)
    return counts


@dataclass(frozen=True)
class _Tile:
    """Some queries and some gallery items: which are nearer than each query's nearest own item."""

    left: Float32[Tensor, "b D"]
    right: Float32[Tensor, "c D"]
    left_lengths: Float64[Tensor, " b"]
    """Squared, as the next."""
    right_lengths: Float64[Tensor, " c"]
    nearest: Float64[Tensor, " b"]
    own: Int64[Tensor, " b"]
    """Column of the query itself; outside the tile where it is not in it."""
    cosine: bool

    @property
    def rounding(self) -> float:
        """Of a value in float64, beside the sum of the squared lengths."""
        return (self.left.shape[1] + 8) * 2.0**-51

    def nearer_and_unsure(
        self,
    ) -> tuple[Int64[np.ndarray, " b"], Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """How many items are nearer for certain, and the (query, item) that are not certain.

        In float32, whose error is bounded; in float64 if that leaves too many unsure.
        """
        certain, unsure = self._compared(self.left, self.right, 2.0**-23)
        largest = float(self.left_lengths.max() + self.right_lengths.max())
        if largest > _LARGEST or int(unsure.sum()) > _MOST_UNSURE * unsure.numel():
            certain, unsure = self._compared(self.left.double(), self.right.double(), 2.0**-51)
        row, column = unsure.nonzero().unbind(1)
        return certain.sum(dim=1).numpy(), row.numpy(), column.numpy()

    def _compared(self, left: Tensor, right: Tensor, unit: float) -> tuple[Tensor, Tensor]:
        far = left @ right.T
        if self.cosine:
            far.neg_()
        else:
            both = self.left_lengths[:, None] + self.right_lengths[None]
            far = far.mul_(-2).add_(both)
        inside = torch.nonzero((self.own >= 0) & (self.own < far.shape[1]))[:, 0]
        far[inside, self.own[inside]] = torch.inf
        # At most D + 8 roundings, each of a number up to the sum of the two squared lengths.
        lengths = self.left_lengths + self.right_lengths.max()
        slack = (left.shape[1] + 8) * unit * lengths
        least, most = ((self.nearest + way * slack).to(far.dtype)[:, None] for way in (-1, 1))
        certain = far < least
        return certain, (far <= most) & ~certain


def _squared_lengths(vectors: np.ndarray) -> Float64[Tensor, " n"]:
    return torch.from_numpy(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
