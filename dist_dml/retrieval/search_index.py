"""An index of a gallery that is kept and searched: exact, HNSW or IVF-PQ, all by FAISS.

Reported scores never come from here, see `ranking`. An approximate index misses neighbours; how
many is measured against exact ones when it is built (`measure`).

Dimensions: `q` queries, `n` items of the gallery, embeddings of width `D`, `k` neighbours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float32, Float64, Int64

from dist_dml.errors import UsageError
from dist_dml.retrieval.distances import Distance
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.faiss_threads import faiss_with_worker_threads
from dist_dml.retrieval.neighbours import NO_NEIGHBOUR
from dist_dml.retrieval.ranking import nearest

Kind = Literal["flat", "hnsw", "ivf_pq"]
KINDS: tuple[Kind, ...] = get_args(Kind)
RECALL_AT = (1, 10)
_FAISS_TYPES = {
    "flat": ("IndexFlat", "IndexFlatIP", "IndexFlatL2"),
    "hnsw": ("IndexHNSWFlat",),
    "ivf_pq": ("IndexIVFPQ",),
}
# FAISS warns below so many training vectors for each centre of a k-means.
_TRAINED_BY_AT_LEAST, _TRAINED_BY = 39, 128
_LEAST_CODE_BITS, _CODE_BITS = 4, 8
# float32 rounds a sum of D products by less than this share of the lengths; see `measure`.
_ROUNDING = 2e-6
_TIMED_QUERIES = 50


@dataclass(frozen=True)
class IndexOptions:
    """How an index is made and searched; 0 where the size of the gallery decides (`fitted`)."""

    kind: Kind = "flat"
    """`flat` compares with every item; `hnsw` walks a graph and holds the vectors besides; `ivf_pq`
    compares codes of a few bytes in some of many lists."""
    links: int = 32
    """Of `hnsw`: neighbours that each item is linked to (twice as many in the lowest layer)."""
    build_effort: int = 200
    """Of `hnsw`: candidates that are looked at to link an item."""
    search_effort: int = 128
    """Of `hnsw`: candidates of a search; never fewer than `k`."""
    lists: int = 0
    """Of `ivf_pq`: 2 sqrt(n), and at least 39 items a list."""
    probes: int = 0
    """Of `ivf_pq`: lists that are searched, an eighth of all and at least 8."""
    code_parts: int = 0
    """Of `ivf_pq`: parts that a vector is cut into, each coded by 8 bits (fewer where the gallery
    is small); the smallest divisor of D from D / 4 on."""
    seed: int = 0
    """Of the k-means of `ivf_pq`."""


def fitted(options: IndexOptions, count: int, width: int) -> IndexOptions:
    """The options with every 0 replaced, for a gallery of `count` vectors of `width`.

    Raises:
        UsageError: a kind that is none, numbers below 1, parts that do not divide the width, or a
            gallery too small to train on.
    """
    if options.kind not in KINDS:
        raise UsageError(f"--kind={options.kind!r} is none of {', '.join(KINDS)}")
    for name in ("links", "build_effort", "search_effort"):
        if getattr(options, name) < 2:
            option = f"--{name.replace('_', '-')}={getattr(options, name)}"
            raise UsageError(f"{option} must be at least 2")
    if options.kind != "ivf_pq":
        return options
    least = _TRAINED_BY_AT_LEAST * 2**_LEAST_CODE_BITS
    if count < least:
        raise UsageError(
            f"--kind=ivf_pq needs at least {least} vectors to train its codes and the gallery has "
            f"{count}; use --kind=flat, which searches so few in no time"
        )
    by_size = max(1, min(2 * math.isqrt(count), count // _TRAINED_BY_AT_LEAST))
    lists = options.lists or by_size
    parts = options.code_parts or next(
        part for part in range(1, width + 1) if width % part == 0 and 4 * part >= width
    )
    if parts < 1 or width % parts:
        raise UsageError(f"--code-parts={parts} does not divide the width {width} of the vectors")
    if not 1 <= lists <= count // _TRAINED_BY_AT_LEAST:
        raise UsageError(
            f"--lists={lists} is outside 1..{count // _TRAINED_BY_AT_LEAST}: a list needs "
            f"{_TRAINED_BY_AT_LEAST} of the {count} vectors to be trained by"
        )
    probes = options.probes or max(8, lists // 8)
    if probes < 1:
        raise UsageError(f"--probes={probes} must be at least 1")
    return replace(options, lists=lists, probes=min(probes, lists), code_parts=parts)


@dataclass(frozen=True, eq=False)
class SearchIndex:
    """A gallery that can be searched.

    Attributes:
        faiss_index: FAISS's own object, whose vectors are those that `distance.prepare` makes.
        distance: `cosine` or `l2`.
        options: from `fitted`.
    """

    faiss_index: Any
    distance: Distance
    options: IndexOptions

    @property
    def count(self) -> int:
        """`n`."""
        return int(self.faiss_index.ntotal)

    @property
    def width(self) -> int:
        """`D`."""
        return int(self.faiss_index.d)

    def search(
        self, vectors: Float32[np.ndarray, "q D"], k: int
    ) -> tuple[Int64[np.ndarray, "q m"], Float32[np.ndarray, "q m"]]:
        """The `k` nearest items, nearest first; all of them where the gallery has fewer.

        Equal values are in the order of the gallery, except where they stand at both sides of the
        k-th place. An approximate index may find fewer than it could: -1 stands at the end.

        Args:
            vectors: embeddings as the model made them.
            k: neighbours a query.

        Returns:
            Positions and values, m = min(k, n): the cosine itself, or the squared Euclidean
            distance; of `ivf_pq` those of the codes, which are not quite the vectors.

        Raises:
            UsageError: k is below 1, or the width is another, or a vector is not finite.
        """
        if k < 1:
            raise UsageError(f"k={k} neighbours cannot be searched; ask for 1 or more")
        if vectors.shape[1] != self.width:
            raise UsageError(
                f"queries are {vectors.shape[1]} wide and the index {self.width}; embed both with "
                "the same model"
            )
        if not np.isfinite(vectors).all():
            raise UsageError("a query is not finite; leave out samples that a model fails on")
        faiss_with_worker_threads()
        k = min(k, self.count)
        if self.options.kind == "hnsw":
            self.faiss_index.hnsw.efSearch = max(self.options.search_effort, k)
        elif self.options.kind == "ivf_pq":
            self.faiss_index.nprobe = self.options.probes
        prepared = np.ascontiguousarray(self.distance.prepare(vectors))
        values, positions = self.faiss_index.search(prepared, k)
        values[positions == NO_NEIGHBOUR] = self.distance.farthest
        keys = -values if self.distance.larger_is_nearer else values
        order = np.lexsort((positions, keys), axis=1)
        return np.take_along_axis(positions, order, 1), np.take_along_axis(values, order, 1)


def build_index(
    vectors: Float32[np.ndarray, "n D"],
    distance: Distance,
    options: IndexOptions,
    advance: Callable[[int], None] = lambda count: None,
) -> SearchIndex:
    """An index of all vectors.

    Costs, beyond `vectors` and a prepared block of them: `flat` 4 n D bytes; `hnsw` as many and
    about 8 n links, and some milliseconds an item and core; `ivf_pq` about n (parts + 8) bytes,
    k-means of the lists and of 256 centres a part on at most 128 vectors a list.

    Args:
        vectors: embeddings as the model made them, finite.
        distance: `cosine` or `l2`.
        options: see `IndexOptions`.
        advance: told how many more items are in.

    Raises:
        UsageError: FAISS does not search by this distance, no vectors, or `fitted` refuses.
    """
    if distance.space != "embedding" or not distance.faiss_metric:
        raise UsageError(f"--distance={distance.name}: an index searches by cosine or l2")
    count, width = vectors.shape
    if not count:
        raise UsageError("the gallery is empty; an index needs at least one vector")
    options = fitted(options, count, width)
    faiss = faiss_with_worker_threads()
    metric = getattr(faiss, distance.faiss_metric)
    if options.kind == "flat":
        index: Any = faiss.IndexFlat(width, metric)
    elif options.kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, options.links, metric)
        index.hnsw.efConstruction = options.build_effort
    else:
        index = _trained_ivf_pq(vectors, distance, options)
    # Blocks keep the prepared copy small; a graph is slow enough to want progress more often.
    step = max(1, min(2**24 // width, -(-count // 50) if options.kind == "hnsw" else count))
    for start in range(0, count, step):
        block = np.ascontiguousarray(distance.prepare(vectors[start : start + step]))
        index.add(block)
        advance(len(block))
    return SearchIndex(index, distance, options)


def _trained_ivf_pq(vectors: np.ndarray, distance: Distance, options: IndexOptions) -> Any:
    faiss = faiss_with_worker_threads()
    count, width = vectors.shape
    bits = min(_CODE_BITS, int(math.log2(count / _TRAINED_BY_AT_LEAST)))
    metric = getattr(faiss, distance.faiss_metric)
    centres = faiss.IndexFlat(width, metric)
    lists, parts = options.lists, options.code_parts
    index: Any = faiss.IndexIVFPQ(centres, width, lists, parts, bits, metric)
    index.cp.seed = index.pq.cp.seed = options.seed
    most = max(_TRAINED_BY * options.lists, 256 * 2**bits)
    rows = np.random.default_rng(options.seed).permutation(count)[:most]
    index.train(np.ascontiguousarray(distance.prepare(vectors[np.sort(rows)])))
    return index


def check_faiss_index(index: Any, options: IndexOptions, count: int, width: int) -> None:
    """Refuse an index that is not what its description says.

    Raises:
        ValueError: says what is other.
    """
    kind = type(index).__name__
    if kind not in _FAISS_TYPES[options.kind]:
        raise ValueError(f"it holds a {kind}, expected {options.kind}")
    if (index.ntotal, index.d) != (count, width):
        raise ValueError(f"it holds {index.ntotal} x {index.d} numbers, expected {count} x {width}")


@dataclass(frozen=True)
class Measured:
    """An index against exact neighbours of the same queries."""

    num_queries: int
    recall: dict[int, float]
    """By K: the share of the first K neighbours that are as near as the exact ones; empty where no
    query has a neighbour."""
    milliseconds: float
    """A search of one query for 10 neighbours, median."""
    exact_milliseconds: float
    """An exact search of all queries at once, divided by their number."""


def measure(index: SearchIndex, queries: Embeddings, gallery: Embeddings) -> Measured:
    """Recall and time of an index, measured.

    Nothing finds itself: the gallery item of a query's own id does not count. A neighbour that is
    found counts if it is no farther than the exact K-th one, up to float32's rounding: of items at
    the same distance any will do.

    Args:
        index: of `gallery`, item i being its row i.
        queries: rows of the gallery, or others.
        gallery: all of it.
    """
    k = max(RECALL_AT)
    start = time.perf_counter()
    exact, _ = nearest(queries, gallery, min(k, len(gallery)), index.distance)
    exact_seconds = (time.perf_counter() - start) / max(1, len(queries))
    positions, _ = index.search(queries.vectors, k + 1)
    own = gallery.ids[np.maximum(positions, 0)] == queries.ids[:, None]
    positions = np.where(own, NO_NEIGHBOUR, positions)
    order = np.argsort(positions == NO_NEIGHBOUR, axis=1, kind="stable")
    found = np.take_along_axis(positions, order, axis=1)[:, :k]
    recall = {at: _recall(index.distance, queries, gallery, exact, found, at) for at in RECALL_AT}
    times = []
    for row in range(min(_TIMED_QUERIES, len(queries))):
        start = time.perf_counter()
        index.search(queries.vectors[row : row + 1], k)
        times.append(time.perf_counter() - start)
    return Measured(
        len(queries),
        {at: value for at, value in recall.items() if value is not None},
        1000 * float(np.median(times)) if times else 0.0,
        1000 * exact_seconds,
    )


def _recall(
    distance: Distance,
    queries: Embeddings,
    gallery: Embeddings,
    exact: np.ndarray,
    found: np.ndarray,
    at: int,
) -> float | None:
    """Mean share of the first `at` that are as near as the exact ones; None without any."""
    wanted = (exact[:, :at] != NO_NEIGHBOUR).sum(axis=1)
    if not wanted.any():
        return None
    rows = np.flatnonzero(wanted)
    near, scale = _nearness(distance, queries.vectors[rows], gallery.vectors, exact[rows, :at])
    least = near.min(axis=1)  # Those that are no neighbour are at infinity, the nearest.
    got, _ = _nearness(distance, queries.vectors[rows], gallery.vectors, found[rows, :at])
    got[found[rows, :at] == NO_NEIGHBOUR] = -np.inf
    right = (got >= (least - _ROUNDING * scale)[:, None]).sum(axis=1)
    return float(np.mean(np.minimum(right, wanted[rows]) / wanted[rows]))


def _nearness(
    distance: Distance, queries: np.ndarray, gallery: np.ndarray, positions: np.ndarray
) -> tuple[Float64[np.ndarray, "q k"], Float64[np.ndarray, " q"]]:
    """Of pairs in float64: larger is nearer; and what rounding is a share of, a query."""
    a = distance.prepare(queries).astype(np.float64)
    k = positions.shape[1]
    b = distance.prepare(np.ascontiguousarray(gallery[np.maximum(positions, 0).ravel()]))
    b = b.astype(np.float64).reshape(len(a), k, -1)
    if distance.larger_is_nearer:
        values = np.einsum("qd,qkd->qk", a, b)
        scale = np.ones(len(a))
    else:
        values = -np.square(a[:, None] - b).sum(axis=2)
        scale = np.square(a).sum(axis=1) + np.square(b).sum(axis=2).max(axis=1)
    values[positions == NO_NEIGHBOUR] = np.inf
    return values, scale
