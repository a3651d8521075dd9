"""Exact neighbours from any source of candidates: torch products on CPU and GPU, or FAISS.

A source gives, for each query, the `m` items of largest score (`score_bounds.py`), a few more than
wanted. Where the last of these is certainly too far, all others are, and float64 ranks the
candidates. Where it is not (many items nearly as near as the k-th), the query's values are computed
for all items in float64. Nothing falls back in silence to another answer: only to more work.

Dimensions: `q` queries, `g` gallery items, embeddings of width `D`, `m` candidates, `k` neighbours.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from dist_dml.retrieval.exact_values import as_tensor, nearest_first, pair_values
from dist_dml.retrieval.score_bounds import ScoreProblem

_MORE = 64
"""Candidates beyond those wanted: a few rounding errors' worth of items."""
_COPIES = 6
"""Numbers of 8 bytes that one term of `pair_values` holds at a time."""


@runtime_checkable  # The tests execute all annotations.
class CandidateSource(Protocol):
    """Products of a moved gallery with moved queries, and the largest of each query."""

    def largest(
        self, queries: Tensor, m: int
    ) -> tuple[Float32[Tensor, "q m"], Int64[Tensor, "q m"]]:
        """Scores `q~.g~ + b` and positions of the `m` largest, largest first."""
        ...


class CandidateSearch:
    """A gallery that is searched block by block of queries; see `GallerySearch`.

    Args:
        problem: the gallery.
        source: who computes scores.
        memory_bytes: what exact values may hold at a time.
    """

    def __init__(self, problem: ScoreProblem, source: CandidateSource, memory_bytes: int) -> None:
        self._problem = problem
        self._source = source
        self._pairs = max(1, memory_bytes // (8 * _COPIES * problem.gallery.shape[1]))

    def nearest(
        self,
        queries: Float32[np.ndarray, "q D"],
        ids: Int64[np.ndarray, " q"] | None,
        k: int,
    ) -> tuple[Int64[np.ndarray, "q k"], Float64[np.ndarray, "q k"]]:
        """Positions and values of the `k` nearest, nearest first."""
        problem, device = self._problem, self._problem.gallery.device
        rows = as_tensor(queries).to(device)
        own = None if ids is None else as_tensor(ids).to(device)
        num_items = len(problem.gallery)
        searched = min(k + (own is not None), num_items)
        m = min(searched + _MORE, num_items)
        moved, twice_error = problem.move(rows)
        scores, positions = self._source.largest(moved, m)
        low = scores[:, searched - 1].double() - twice_error
        certain = (scores[:, -1].double() < low) | ((m == num_items) & torch.isfinite(low))
        candidate = (scores.double() >= low[:, None]) & ~torch.isin(positions, problem.far)
        positions = torch.where(candidate, positions, -1)
        positions = torch.cat([positions, problem.far.expand(len(rows), -1)], dim=1)
        found = torch.full((len(rows), k), -1, dtype=torch.int64, device=device)
        values = torch.full((len(rows), k), self.far, dtype=torch.float64, device=device)
        step = max(1, self._pairs // positions.shape[1])
        for chosen in torch.nonzero(certain).flatten().split(step):
            best = self._rank(rows[chosen], _of(own, chosen), positions[chosen], k)
            found[chosen], values[chosen] = best
        for row in torch.nonzero(~certain).flatten():
            chosen = row[None]
            found[chosen], values[chosen] = self._rank_all(rows[chosen], _of(own, chosen), k)
        return found.cpu().numpy(), values.cpu().numpy()

    @property
    def far(self) -> float:
        """The value of what is no neighbour."""
        return float("inf") if self._problem.squares else float("-inf")

    def _rank(
        self, queries: Tensor, own: Tensor | None, positions: Int64[Tensor, "q m"], k: int
    ) -> tuple[Tensor, Tensor]:
        """The `k` nearest of the candidates, -1 being none."""
        problem = self._problem
        rows, columns = torch.nonzero(positions >= 0, as_tuple=True)
        place = positions[rows, columns]
        value = pair_values(queries[rows], problem.gallery[place], problem.squares)
        keys = torch.full(positions.shape, torch.inf, dtype=torch.float64, device=queries.device)
        keys[rows, columns] = value if problem.squares else -value
        ids = problem.ids[positions.clamp_min(0)]
        if own is not None:
            itself = ids == own[:, None]
            keys, positions = keys.masked_fill(itself, torch.inf), positions.masked_fill(itself, -1)
        order = nearest_first(keys, ids)[:, :k]
        keys, positions = keys.gather(1, order), positions.gather(1, order)
        missing = (0, k - order.shape[1])
        positions = torch.nn.functional.pad(positions, missing, value=-1)
        keys = torch.nn.functional.pad(keys, missing, value=torch.inf)
        return positions, keys if problem.squares else -keys

    def _rank_all(self, query: Tensor, own: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        """The `k` nearest of all items to one query."""
        num_items, device = len(self._problem.gallery), query.device
        kept = torch.empty((1, 0), dtype=torch.int64, device=device)
        values = torch.empty((1, 0), dtype=torch.float64, device=device)
        for first in range(0, num_items, self._pairs):
            part = torch.arange(first, min(first + self._pairs, num_items), device=device)
            candidates = torch.cat([kept[0][kept[0] >= 0], part])[None]
            kept, values = self._rank(query, own, candidates, k)
        return kept, values


def _of(ids: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if ids is None else ids[rows]


class TorchScores:
    """Scores by matrix products of torch, a part of the gallery at a time, on any device.

    Args:
        problem: the gallery, on the device.
        memory_bytes: what a block of scores may take.
    """

    def __init__(self, problem: ScoreProblem, memory_bytes: int) -> None:
        self._problem = problem
        self._memory_bytes = memory_bytes

    def largest(
        self, queries: Tensor, m: int
    ) -> tuple[Float32[Tensor, "q m"], Int64[Tensor, "q m"]]:
        """See `CandidateSource`."""
        problem = self._problem
        kept = torch.empty((len(queries), 0), device=queries.device)
        positions = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)
        # The block, its largest with their places, and what they are merged with.
        step = max(m, self._memory_bytes // (3 * 4 * len(queries)), 256)
        for first in range(0, len(problem.moved), step):
            part = slice(first, first + step)
            scores = _product(queries, problem.moved[part]) + problem.bias[part]
            best, place = scores.topk(min(m, scores.shape[1]), dim=1)
            kept = torch.cat([kept, best], dim=1)
            positions = torch.cat([positions, place + first], dim=1)
            if kept.shape[1] > m:
                kept, place = kept.topk(m, dim=1)
                positions = positions.gather(1, place)
        kept, place = kept.sort(dim=1, descending=True)
        return kept, positions.gather(1, place)


def _product(queries: Tensor, items: Tensor) -> Float32[Tensor, "q g"]:
    """Sums in float32, whatever the operands are: TF32 would round float32 ones behind our back."""
    if queries.dtype == torch.float32:
        if queries.is_cuda:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                return queries @ items.T
            finally:
                torch.set_float32_matmul_precision(before)
        return queries @ items.T
    return torch.mm(queries, items.T, out_dtype=torch.float32)
