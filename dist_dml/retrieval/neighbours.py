"""Exact nearest neighbours by FAISS, in blocks of queries of one fixed shape.

Dimensions: `q` queries, `g` gallery items, embeddings of width `D`, `k` neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import numpy as np
import torch
from jaxtyping import Float32, Int64

from dist_dml.errors import UsageError
from dist_dml.retrieval.distances import Distance

NO_NEIGHBOUR = -1


def faiss_with_worker_threads() -> ModuleType:
    """FAISS, limited to the CPU threads that this worker was given.

    FAISS has an OpenMP pool of its own that takes every core unless told otherwise; with several
    workers on a machine they would crowd each other out. The worker's share is what torch was told.
    """
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def block_rows(width: int) -> int:
    """Queries in one FAISS call: 512 to 4096, a function of the embedding width `D` alone.

    FAISS multiplies a block with 1024 gallery rows at a time. Below about 1.2e8 multiplications a
    product, the OpenBLAS of faiss-cpu 1.15.1 takes a path 7 times slower (14 against 100 GFLOP/s at
    D = 128, one thread of an AVX-512 machine, November 2026); this stays a factor of two above.
    """
    return min(4096, max(512, 2**18 // width))


def exact_neighbours(
    queries: Float32[np.ndarray, "q D"],
    gallery: Float32[np.ndarray, "g D"],
    k: int,
    distance: Distance,
    query_ids: Int64[np.ndarray, " q"] | None = None,
    gallery_ids: Int64[np.ndarray, " g"] | None = None,
) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
    """The `k` gallery items nearest to each query, nearest first.

    Equal to sorting each row of the dense (q, g) matrix of distances, up to float32 rounding: items
    whose distances differ by less than that (exact ties among them) come in any order, but always
    in the same one. Costs 2*q*g*D operations.

    Args:
        queries: embeddings as the model made them; `distance` prepares them.
        gallery: likewise.
        k: neighbours a query.
        distance: what to rank by.
        query_ids: with `gallery_ids`, no query finds the gallery item of its own id. Dropping the
            first neighbour instead would drop a duplicate of the query, or keep the query itself.
        gallery_ids: no id twice.

    Returns:
        Gallery positions, and distances as FAISS gives them (cosine, or squared l2). Where fewer
        than `k` items remain, -1 and the farthest distance.

    Raises:
        UsageError: if shapes do not fit, only one kind of ids is given, or gallery ids repeat, or
            FAISS does not search by this distance.
    """
    indices = np.full((len(queries), k), NO_NEIGHBOUR, dtype=np.int64)
    distances = np.full((len(queries), k), distance.farthest, dtype=np.float32)
    for rows, *found in neighbour_blocks(queries, gallery, k, distance, query_ids, gallery_ids):
        indices[rows], distances[rows] = found
    return indices, distances


def neighbour_blocks(
    queries: Float32[np.ndarray, "q D"],
    gallery: Float32[np.ndarray, "g D"],
    k: int,
    distance: Distance,
    query_ids: Int64[np.ndarray, " q"] | None = None,
    gallery_ids: Int64[np.ndarray, " g"] | None = None,
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """`exact_neighbours` block by block: (rows of `queries`, positions (b, k), distances (b, k)).

    Never holds more than `block_rows(D)` rows of neighbours; arguments and errors are the same.
    """
    check_search(queries, gallery, k, query_ids, gallery_ids)
    if not distance.faiss_metric:
        raise UsageError(f"{distance.name} is not searched by FAISS; use ranking.nearest")
    faiss = faiss_with_worker_threads()
    metric = getattr(faiss, distance.faiss_metric)
    prepared = np.ascontiguousarray(distance.prepare(gallery))
    # One more neighbour, in case one is the query itself. This depends on whether ids are given and
    # not on whether any coincide: FAISS orders ties differently for different k.
    searched = min(k + (query_ids is not None), len(gallery))
    shape = (block_rows(queries.shape[1]), queries.shape[1])
    for start in range(0, len(queries), shape[0]):
        rows = slice(start, min(start + shape[0], len(queries)))
        # The last block is filled up with zeros, because BLAS picks its kernel by the shape of the
        # product and kernels round differently. With one shape for all, a query's neighbours are
        # bitwise the same wherever it stands, hence for any number of workers that share the work.
        block = np.zeros(shape, dtype=np.float32)
        block[: rows.stop - start] = distance.prepare(queries[rows])
        distances, indices = faiss.knn(block, prepared, searched, metric)
        distances, indices = distances[: rows.stop - start], indices[: rows.stop - start]
        if query_ids is not None and gallery_ids is not None:
            indices[gallery_ids[indices] == query_ids[rows, None]] = NO_NEIGHBOUR
        yield rows, *_compacted(indices, distances, k, distance.farthest)


def _compacted(
    indices: np.ndarray, distances: np.ndarray, k: int, farthest: float
) -> tuple[np.ndarray, np.ndarray]:
    """Moves what is no neighbour to the end of its row, and makes the rows `k` long."""
    order = np.argsort(indices == NO_NEIGHBOUR, axis=1, kind="stable")[:, :k]
    indices = np.take_along_axis(indices, order, axis=1)
    distances = np.take_along_axis(distances, order, axis=1)
    distances[indices == NO_NEIGHBOUR] = farthest
    if indices.shape[1] == k:
        return indices, distances
    missing = ((0, 0), (0, k - indices.shape[1]))
    return (
        np.pad(indices, missing, constant_values=NO_NEIGHBOUR),
        np.pad(distances, missing, constant_values=farthest),
    )


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
