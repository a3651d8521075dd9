"""The class weights nearest to a vector, among one worker's classes: exactly, or from an index.

Two ways with the same methods (`advance`, `search`, `close`). `ExactClassIndex` multiplies with the
weights as they are now. `ClassIndex` looks into a compressed copy, rebuilt in the background every
n steps, that is up to 1.5 n steps old; it reads a few percent of the classes.

Dimensions: c classes of this worker, D features, q vectors, k neighbours.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.parallel.class_sweeps import SMALLEST_NORM
from dist_dml.retrieval.faiss_threads import faiss_with_worker_threads
from dist_dml.retrieval.neighbours import NO_NEIGHBOUR

# Up to here an exact search costs less than is worth approximating: 256 labels of 65,536 classes at
# D = 128 took 0.1 s against 0.03 s from an index (one thread, AVX-512, November 2026). On a GPU an
# index on the host would cost transfers and waits; where the crossing is there is *not measured*.
EXACT_CLASSES = {"cpu": 65_536, "cuda": 4_194_304}
# Scores of a tile of the exact search (16 MiB).
_TILE_SCORES = 2**22
# Numbers that are copied, assigned and added at a time (4 MiB in float32).
_CHUNK_NUMBERS = 2**20
# Training vectors of a list's centre; FAISS warns below 39.
_TRAINED_BY, _TRAINED_BY_AT_LEAST = 64, 39


class ExactClassIndex:
    """Exact search of the weights as they are: nothing is copied, rebuilt or stale.

    Args:
        weight: (c, D); kept, not copied.
        cosine: whether to rank by cosines; else by inner products (without biases, whose scale
            against inner products of *weights* means nothing).
    """

    waited_seconds = 0.0

    def __init__(self, weight: Float[Tensor, "c D"], cosine: bool) -> None:
        self._weight, self._cosine = weight, cosine

    def advance(self, step: int, weight: Float[Tensor, "c D"]) -> None:
        """Search `weight` from now on."""
        self._weight = weight

    def search(
        self, vectors: Float32[Tensor, "q D"], k: int
    ) -> tuple[Float32[Tensor, "q k"], Int64[Tensor, "q k"]]:
        """As `ClassIndex.search`, exact up to float32 rounding, on the weights' device.

        Costs 2*q*c*D operations and 32 MiB, or 8 numbers a vector and neighbour if that is more.
        """
        best = vectors.new_full((len(vectors), k), -math.inf)
        ids = torch.full((len(vectors), k), NO_NEIGHBOUR, device=vectors.device)
        vectors = _prepared(vectors, self._cosine)
        tile = max(k, _TILE_SCORES // max(len(vectors), 1))
        for start in range(0, len(self._weight), tile):
            weight = self._weight[start : start + tile].float()
            scores = vectors @ weight.T
            if self._cosine:
                norms = torch.linalg.vector_norm(weight, dim=1)
                scores /= norms.clamp_min_(SMALLEST_NORM)
            found, places = scores.topk(min(k, len(weight)), dim=1)
            best, order = torch.cat((best, found), dim=1).topk(k, dim=1)
            ids = torch.cat((ids, places + start), dim=1).gather(1, order)
        return best, ids

    def close(self) -> None:
        """Nothing runs."""


class ClassIndex:
    """Approximate search in a copy of the weights that is rebuilt in the background.

    FAISS's inverted lists with 8-bit scalar quantisation: about sqrt(c) lists of one byte a number,
    32 of which are searched. Of the 10 (100) nearest among 2*10^5 unit vectors in clusters of 50 it
    found 99.8% (78%), of 10^6 97.6% (66%), for 256 vectors in 0.06 and 0.18 s, where an exact
    search took 0.4 and 1.6 s (D = 128, one thread, AVX-512, November 2026).

    **Repeatable.** At each multiple of `rebuild_steps` the weights are copied and a build is
    ordered; `lag` = ceil(rebuild_steps / 2) steps later, on all workers alike, its index is taken
    over, and waited for if it is not ready (`waited_seconds`). Until then the old one serves. Which
    index answers is thus a function of the step, never of how fast a thread was, and a build is one
    of its weights: one thread, fixed seed. What answers is between `lag` and rebuild_steps + lag
    steps old.

    **Resume.** Nothing is stored. An index is built of the weights at the start, and the schedule
    goes on by step numbers. Steps after a resume hence differ from those of a run that was not
    interrupted: until the next hand-over other, fresher neighbours are found.

    **Memory** on the host: (D + 8) c bytes; while rebuilding, twice that and a copy of the weights
    in bfloat16, together (4 D + 16) c, and about four copies of the training vectors, 64 sqrt(c) D
    floats each. Measured at 10^6 classes of D = 128: 0.17 GB, at most 0.67 GB (528 + 4 x 33 MB).

    **Time** (10^6 classes, D = 128, one thread, AVX-512, November 2026): 0.5 to 1 s for the copy,
    in which training waits; 4 to 5 s for the build beside it. The build grows with c^1.5: estimated
    at 150 s for 10^7 classes; `rebuild_steps` should give it that time.

    Args:
        weight: (c, D) at `step`; read, not kept.
        cosine: as in `ExactClassIndex`.
        rebuild_steps: steps between two orders.
        step: number of the step that comes first.
        num_threads: of a build. FAISS takes no more, nor does it hold Python's lock.
        num_probes: lists searched for a vector.
    """

    def __init__(
        self,
        weight: Float[Tensor, "c D"],
        cosine: bool,
        rebuild_steps: int,
        step: int = 0,
        num_threads: int = 1,
        num_probes: int = 32,
    ) -> None:
        if rebuild_steps < 1:
            raise UsageError(f"classes.rebuild_steps={rebuild_steps} must be at least 1")
        self.waited_seconds = 0.0
        self._cosine, self._rebuild_steps = cosine, rebuild_steps
        self._num_threads, self._num_probes = num_threads, num_probes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="class-index")
        self._serving: Any = None
        self._pending: Future[Any] | None = None
        self._due = self._next_order = 0
        self._order(step, weight)
        self._take_over()
        self.waited_seconds = 0.0

    def advance(self, step: int, weight: Float[Tensor, "c D"]) -> None:
        """Before the search of each step: takes an index over, orders one, or does nothing.

        An order copies the weights here and now, one pass over them; they may change afterwards.

        Raises:
            RuntimeError: FAISS's, at the hand-over, if the build failed (weights not finite).
        """
        if self._pending is not None and step >= self._due:
            self._take_over()
        if step >= self._next_order:
            self._order(step, weight)

    def search(
        self, vectors: Float32[Tensor, "q D"], k: int
    ) -> tuple[Float32[Tensor, "q k"], Int64[Tensor, "q k"]]:
        """The k best (score, local id) of each vector, best first; -inf and -1 where there are
        fewer.

        Scores are cosines or inner products with the copy. On the vectors' device; FAISS runs on
        the host, with as many threads as torch has.
        """
        faiss_with_worker_threads()
        queries = _prepared(vectors, self._cosine).cpu().contiguous().numpy()
        scores, ids = self._serving.search(queries, k)
        scores[ids == NO_NEIGHBOUR] = -np.inf
        return (
            torch.from_numpy(scores).to(vectors.device),
            torch.from_numpy(ids).to(vectors.device),
        )

    def close(self) -> None:
        """End the thread, after the build that it may be in."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _order(self, step: int, weight: Tensor) -> None:
        if self._pending is not None:  # Steps were left out: what was due before comes first.
            self._take_over()
        copy, sample = _snapshot(weight.detach(), self._cosine)
        self._pending = self._thread.submit(
            _built, copy, sample, self._num_threads, self._num_probes
        )
        self._due = step + -(-self._rebuild_steps // 2)
        self._next_order = (step // self._rebuild_steps + 1) * self._rebuild_steps

    def _take_over(self) -> None:
        assert self._pending is not None
        start = time.perf_counter()
        self._serving = self._pending.result()
        self.waited_seconds += time.perf_counter() - start
        self._pending = None


def build_class_index(
    weight: Float[Tensor, "c D"], cosine: bool, rebuild_steps: int, step: int
) -> ExactClassIndex | ClassIndex:
    """The search that suits so many classes on this device; see `EXACT_CLASSES`."""
    if len(weight) <= EXACT_CLASSES.get(weight.device.type, 0):
        return ExactClassIndex(weight, cosine)
    return ClassIndex(weight, cosine, rebuild_steps, step)


def _prepared(vectors: Tensor, cosine: bool) -> Tensor:
    return F.normalize(vectors, dim=1, eps=SMALLEST_NORM) if cosine else vectors


def _snapshot(weight: Tensor, cosine: bool) -> tuple[np.ndarray, np.ndarray]:
    """The weights as bfloat16 bits, and evenly spaced ones in float32 for training.

    bfloat16 rounds by 2^-9 of a number, the index by 2^-9 of a feature's range.
    """
    copy = torch.empty(weight.shape, dtype=torch.bfloat16)
    for start, stop in _chunks(*weight.shape):
        copy[start:stop] = _prepared(weight[start:stop].float(), cosine)
    count = min(len(weight), _TRAINED_BY * _num_lists(len(weight)))
    places = torch.arange(count, device=weight.device) * len(weight) // count
    sample = _prepared(weight[places].float(), cosine).cpu().numpy()
    return copy.view(torch.int16).numpy().view(np.uint16), sample


def _chunks(num_classes: int, width: int) -> list[tuple[int, int]]:
    """Start and stop of the rows that are copied, assigned and added at a time."""
    rows = max(1, _CHUNK_NUMBERS // width)
    return [(start, min(start + rows, num_classes)) for start in range(0, num_classes, rows)]


def _num_lists(num_classes: int) -> int:
    return max(1, min(math.isqrt(num_classes), num_classes // _TRAINED_BY_AT_LEAST))


def _built(copy: np.ndarray, sample: np.ndarray, num_threads: int, num_probes: int) -> Any:
    """A FAISS index of the copy. Runs in the background.

    Costs about 2 c^1.5 D operations (each class finds its list) and k-means of 64 sqrt(c) vectors.
    """
    import faiss

    faiss.omp_set_num_threads(num_threads)  # Of this thread alone: OpenMP counts by caller.
    num_classes, width = copy.shape
    lists = _num_lists(num_classes)
    centres = faiss.IndexFlatIP(width)
    metric, quantiser = faiss.METRIC_INNER_PRODUCT, faiss.ScalarQuantizer.QT_8bit
    index: Any = faiss.IndexIVFScalarQuantizer(centres, width, lists, quantiser, metric, False)
    index.train(sample)
    index.nprobe = min(num_probes, lists)
    # Lists that grow by doubling would hold up to twice their size: they are counted first.
    place = np.empty(num_classes, dtype=np.int64)
    for start, stop in _chunks(num_classes, width):
        _, nearest = centres.search(_decoded(copy[start:stop]), 1)
        place[start:stop] = nearest[:, 0]
    for number, size in enumerate(np.bincount(place, minlength=lists).tolist()):
        index.invlists.resize(number, size)
        index.invlists.resize(number, 0)
    pointer = faiss.swig_ptr
    for start, stop in _chunks(num_classes, width):
        chunk, ids = _decoded(copy[start:stop]), np.arange(start, stop)
        index.add_core(stop - start, pointer(chunk), pointer(ids), pointer(place[start:stop]))
    index.ntotal = num_classes
    return index


def _decoded(bits: np.ndarray) -> np.ndarray:
    """float32 of bfloat16 bits. By NumPy, which stays in this thread."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
