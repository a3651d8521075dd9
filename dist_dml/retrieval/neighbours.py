"""Exact nearest neighbours by cosine or Euclidean distance, block by block of queries.

Dimensions: `q` queries, `g` gallery items, embeddings of width `D`, `k` neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, Int64

from dist_dml.errors import UsageError
from dist_dml.retrieval.distances import Distance
from dist_dml.retrieval.gallery_search import DEFAULT, SearchSettings, open_gallery

NO_NEIGHBOUR = -1
_MOST_ROWS = 8192


def block_rows(k: int, memory_bytes: int = DEFAULT.memory_bytes) -> int:
    """Queries that are answered at a time: up to 8192, fewer for many neighbours."""
    # Positions, values and ids, sorted: about 80 bytes for each neighbour.
    return max(64, min(_MOST_ROWS, memory_bytes // 4 // (80 * k)))


def exact_neighbours(
    queries: Float32[np.ndarray, "q D"],
    gallery: Float32[np.ndarray, "g D"],
    k: int,
    distance: Distance,
    query_ids: Int64[np.ndarray, " q"] | None = None,
    gallery_ids: Int64[np.ndarray, " g"] | None = None,
    settings: SearchSettings = DEFAULT,
) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
    """The `k` gallery items nearest to each query, nearest first.

    Equal to sorting each row of the dense (q, g) matrix of float64 values (`exact_values.py`) of
    the prepared float32 vectors; equal values are in the order of the ids, or of the gallery where
    none are given. The same bits for every backend, device, memory and number of threads. Costs
    2*q*g*D operations of low precision, and little more.

    Args:
        queries: embeddings as the model made them; `distance` prepares them.
        gallery: likewise.
        k: neighbours a query.
        distance: what to rank by.
        query_ids: with `gallery_ids`, no query finds the gallery item of its own id. Dropping the
            first neighbour instead would drop a duplicate of the query, or keep the query itself.
        gallery_ids: no id twice.
        settings: who searches, in how much memory.

    Returns:
        Gallery positions, and values rounded to float32 (cosine, or squared l2). Where fewer than
        `k` items remain, -1 and the farthest value.

    Raises:
        UsageError: if shapes do not fit, only one kind of ids is given, gallery ids repeat, the
            distance is not one of embeddings, or the backend cannot be had.
    """
    indices = np.full((len(queries), k), NO_NEIGHBOUR, dtype=np.int64)
    distances = np.full((len(queries), k), distance.farthest, dtype=np.float32)
    blocks = neighbour_blocks(queries, gallery, k, distance, query_ids, gallery_ids, settings)
    for rows, *found in blocks:
        indices[rows], distances[rows] = found
    return indices, distances


def neighbour_blocks(
    queries: Float32[np.ndarray, "q D"],
    gallery: Float32[np.ndarray, "g D"],
    k: int,
    distance: Distance,
    query_ids: Int64[np.ndarray, " q"] | None = None,
    gallery_ids: Int64[np.ndarray, " g"] | None = None,
    settings: SearchSettings = DEFAULT,
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """`exact_neighbours` block by block: (rows of `queries`, positions (b, k), values (b, k)).

    Never holds more than `block_rows` rows of neighbours; arguments and errors are the same.
    """
    check_search(queries, gallery, k, query_ids, gallery_ids)
    if not distance.faiss_metric:
        raise UsageError(f"{distance.name} is not one of embeddings; use ranking.nearest")
    squares = not distance.larger_is_nearer
    ids = np.arange(len(gallery)) if gallery_ids is None else gallery_ids
    prepared = np.ascontiguousarray(distance.prepare(gallery))
    search = open_gallery(prepared, ids, squares, settings)
    step = block_rows(k, settings.memory_bytes)
    for start in range(0, len(queries), step):
        rows = slice(start, min(start + step, len(queries)))
        own = None if query_ids is None else query_ids[rows]
        positions, values = search.nearest(distance.prepare(queries[rows]), own, k)
        yield rows, positions, values.astype(np.float32)


def check_search(
    queries: np.ndarray,
    gallery: np.ndarray,
    k: int,
    query_ids: np.ndarray | None,
    gallery_ids: np.ndarray | None,
) -> None:
    """Refuses arguments that no search can answer.

    Raises:
        UsageError: as `exact_neighbours`.
    """
    if k < 1 or len(gallery) == 0:
        raise UsageError(
            f"cannot find k={k} neighbours among {len(gallery)} items; k and the gallery must be "
            "at least 1"
        )
    if queries.shape[1] != gallery.shape[1]:
        raise UsageError(
            f"queries are {queries.shape[1]} wide and the gallery {gallery.shape[1]}; "
            "embed both with the same model"
        )
    if (query_ids is None) != (gallery_ids is None):
        raise UsageError(
            "the self match is excluded by id: give query_ids and gallery_ids, or neither"
        )
    if gallery_ids is not None:
        ids, counts = np.unique(gallery_ids, return_counts=True)
        if len(ids) < len(gallery_ids):
            raise UsageError(
                f"gallery id {ids[counts.argmax()]} stands for {counts.max()} items; ids must be "
                "unique (is a sample embedded by two workers?)"
            )
