"""Candidates by FAISS, on CPU or GPU.

FAISS multiplies `[q~, 1]` with `[g~, b]`: the score is one inner product more wide.

Dimensions: `q` queries, `g` gallery items, embeddings of width `D`, `m` candidates.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.retrieval.faiss_threads import faiss_with_worker_threads
from dist_dml.retrieval.score_bounds import ScoreProblem

GPU_LARGEST_K = 2048
"""Neighbours that `faiss.knn_gpu` finds at most (faiss issues 1384 and 4008)."""


class FaissScores:
    """See `CandidateSource`. Of a search for more than `largest_k`, each of several parts of the
    gallery gives `largest_k`; parts are halved until none could have given more that count.

    Args:
        problem: the gallery, with float32 products.
        largest_k: of one call of FAISS; 0 is no limit.
        on_gpu: by `faiss.knn_gpu`, on the problem's device.
    """

    def __init__(self, problem: ScoreProblem, largest_k: int = 0, on_gpu: bool = False) -> None:
        wide = torch.cat([problem.moved, problem.bias[:, None]], dim=1)
        self._gallery = np.ascontiguousarray(wide.cpu().numpy())
        self._largest_k = largest_k
        self._device = problem.gallery.device
        self._resources = _gpu_resources() if on_gpu else None

    def largest(
        self, queries: Tensor, m: int
    ) -> tuple[Float32[Tensor, "q m"], Int64[Tensor, "q m"]]:
        """See `CandidateSource`."""
        ones = torch.ones(len(queries), 1, device=queries.device)
        rows = np.ascontiguousarray(torch.cat([queries, ones], dim=1).cpu().numpy())
        scores, positions = self._search(rows, m)
        found = torch.from_numpy(scores), torch.from_numpy(positions)
        return found[0].to(self._device), found[1].to(self._device)

    def _search(self, rows: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
        if not self._largest_k or m <= self._largest_k:
            return self._knn(rows, self._gallery, m)
        scores = np.empty((len(rows), m), np.float32)
        positions = np.empty((len(rows), m), np.int64)
        left = np.arange(len(rows))
        # Twice as many parts as needed: the nearest items are spread unevenly.
        num_parts = -(-2 * m // self._largest_k)
        while len(left):
            # Items of a class often stand together: every n-th item makes a part, not every run.
            parts = [np.arange(i, len(self._gallery), num_parts) for i in range(num_parts)]
            found = [
                self._knn(rows[left], self._gallery[part], min(self._largest_k, len(part)))
                for part in parts
            ]
            every = np.concatenate([one[0] for one in found], axis=1)
            place = np.concatenate(
                [part[one[1]] for part, one in zip(parts, found, strict=True)], axis=1
            )
            order = np.argsort(-every, axis=1, kind="stable")[:, :m]
            best = np.take_along_axis(every, order, axis=1)
            sure = np.ones(len(left), dtype=bool)
            for part, one in zip(parts, found, strict=True):
                # What a part held back is at most its last score.
                sure &= (len(part) <= self._largest_k) | (one[0][:, -1] < best[:, -1])
            done = left[sure]
            scores[done] = best[sure]
            positions[done] = np.take_along_axis(place, order, axis=1)[sure]
            left, num_parts = left[~sure], 2 * num_parts
        return scores, positions

    def _knn(self, rows: np.ndarray, gallery: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
        faiss = faiss_with_worker_threads()
        metric = faiss.METRIC_INNER_PRODUCT
        if self._resources is None:
            return faiss.knn(rows, gallery, m, metric)
        device = self._device.index or 0
        return faiss.knn_gpu(self._resources, rows, gallery, m, metric=metric, device=device)


def _gpu_resources() -> object:
    faiss = faiss_with_worker_threads()
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        raise UsageError(
            "evaluation.search_backend=faiss_gpu needs the package faiss-gpu (instead of faiss-cpu)"
            " and a GPU, and one of them is missing here; use auto"
        )
    return faiss.StandardGpuResources()
