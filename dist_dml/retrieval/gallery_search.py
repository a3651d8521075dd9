"""One interface to all exact searches by embeddings, and which of them is used.

Dimensions: `q` queries, `g` gallery items, embeddings of width `D`, `k` neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from dist_dml.errors import UsageError
from dist_dml.retrieval.candidate_search import CandidateSearch, TorchScores
from dist_dml.retrieval.exact_values import as_tensor
from dist_dml.retrieval.faiss_scores import GPU_LARGEST_K, FaissScores
from dist_dml.retrieval.native_neighbours import NativeSearch, native_library
from dist_dml.retrieval.score_bounds import ScoreProblem

Backend = Literal["auto", "native", "torch", "faiss", "faiss_gpu"]
BACKENDS: tuple[str, ...] = get_args(Backend)


@dataclass(frozen=True)
class SearchSettings:
    """How a search is done; its answer does not depend on it.

    Attributes:
        backend: `native` (C++ kernels, CPU), `torch` (any device), `faiss` (CPU), `faiss_gpu`, or
            `auto`: torch on a GPU, native on a CPU that has a compiler, else FAISS.
        memory_bytes: what a search may hold beyond vectors and results. `torch` and the FAISS ones
            hold a moved copy of the gallery besides.
        device: where torch multiplies; None is the CPU.
    """

    backend: str = "auto"
    memory_bytes: int = 512 * 2**20
    device: torch.device | None = None


DEFAULT = SearchSettings()


@runtime_checkable  # The tests execute all annotations.
class GallerySearch(Protocol):
    """A gallery that is searched block by block of queries. All give the same answer, to the bit:
    ranked by `exact_values.pair_values`, equal values by id."""

    def nearest(
        self,
        queries: Float32[np.ndarray, "q D"],
        ids: Int64[np.ndarray, " q"] | None,
        k: int,
    ) -> tuple[Int64[np.ndarray, "q k"], Float64[np.ndarray, "q k"]]:
        """Positions and values of the `k` nearest, nearest first.

        Args:
            queries: as they are compared, like the gallery.
            ids: no query finds the item of its own id; None finds all.
            k: neighbours wanted. Where fewer remain: -1, and the farthest value.
        """
        ...


def open_gallery(
    gallery: Float32[np.ndarray, "g D"],
    ids: Int64[np.ndarray, " g"],
    squares: bool,
    settings: SearchSettings = DEFAULT,
) -> GallerySearch:
    """A gallery, ready to be searched.

    Args:
        gallery: rows as they are compared.
        ids: one each, all different.
        squares: by squared Euclidean distances; else by inner products.
        settings: who searches, in how much memory.

    Raises:
        UsageError: the backend is unknown or cannot be had.
    """
    backend, memory_bytes = settings.backend, settings.memory_bytes
    if backend not in BACKENDS:
        raise UsageError(
            f"evaluation.search_backend={backend!r} is unknown; use {', '.join(BACKENDS)}"
        )
    place = settings.device or torch.device("cpu")
    if backend == "native" or (backend == "auto" and place.type == "cpu"):
        library = native_library()
        if not isinstance(library, str):
            return NativeSearch(library, gallery, ids, squares, memory_bytes)
        if backend == "native":
            raise UsageError(f"evaluation.search_backend=native cannot be had: {library}; use auto")
        backend = "faiss"
    # bfloat16 products that add up in float32 are there on GPUs alone.
    half = backend in ("auto", "torch") and place.type == "cuda"
    dtype = torch.bfloat16 if half else torch.float32
    rows = as_tensor(gallery).to(place)
    numbers = as_tensor(ids).to(place)
    problem = ScoreProblem.of(rows, numbers, squares, dtype)
    if backend == "faiss":
        return CandidateSearch(problem, FaissScores(problem), memory_bytes)
    if backend == "faiss_gpu":
        source = FaissScores(problem, GPU_LARGEST_K, on_gpu=True)
        return CandidateSearch(problem, source, memory_bytes)
    return CandidateSearch(problem, TorchScores(problem, memory_bytes // 2), memory_bytes // 2)
