"""Exact neighbours on CPUs by C++ kernels: bfloat16 products choose candidates, float64 ranks them.

`native/neighbours.hpp` says why the answer is exact. Where a query has too many candidates (many
items nearly as near as the k-th), it is searched again with float32 products, and then, if need be,
by all values in float64: slower, the same answer.

Dimensions: `q` queries, `g` gallery items, embeddings of width `D`, `k` neighbours.
"""

from __future__ import annotations

import ctypes
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from dist_dml.errors import RunError
from dist_dml.parallel.machine import cpu_flags
from dist_dml.parallel.native_build import load_library
from dist_dml.parallel.native_calls import (
    NativeStructure,
    native_address,
    native_call,
    native_fields,
)
from dist_dml.retrieval.exact_values import as_tensor, merge_nearest
from dist_dml.retrieval.score_bounds import Move

_BLOCK = 128
"""Queries of one product, as in C++."""
_MOST_JOB = 1024
_FEW = 4
"""So few queries are compared with all items at once, before a gallery is packed for them."""
_OPERAND_BYTES = {"bfloat16": 2, "float32": 4}


class _Gallery(NativeStructure):
    _fields_: ClassVar = native_fields(
        "*rows *ids *mean num_items num_features squares operand .scale *packed *bias *norms "
        "*far num_far num_threads"
    )


class _Queries(NativeStructure):
    _fields_: ClassVar = native_fields(
        "*rows *ids num_queries k most_candidates job_queries *positions *values *crowded"
    )


def native_library() -> ctypes.CDLL | str:
    """The compiled search, or in words why there is none."""
    library = load_library("neighbours")
    if isinstance(library, str):
        return library
    for name in ("dist_dml_packed_bytes", "dist_dml_bias_count"):
        getattr(library, name).restype = ctypes.c_int64
    return library


def fast_operand() -> str:
    """The operands of the first products: bfloat16 where the processor multiplies them faster."""
    return "bfloat16" if cpu_flags() & {"amx_bf16", "avx512_bf16"} else "float32"


class NativeSearch:
    """A gallery that is searched block by block of queries.

    Args:
        library: of `native_library`.
        gallery: rows as they are compared.
        ids: one each; equal values are ordered by them.
        squares: by squared distances; else by inner products.
        memory_bytes: what the search may hold beyond gallery and results: a packed copy of the
            gallery, or of a part of it at a time, and candidates.
        operand: `bfloat16` or `float32`.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        gallery: Float32[np.ndarray, "g D"],
        ids: Int64[np.ndarray, " g"],
        squares: bool,
        memory_bytes: int,
        operand: str = "",
    ) -> None:
        self._library = library
        self._rows = as_tensor(gallery)
        self._ids = as_tensor(ids)
        self._squares = squares
        self._memory_bytes = memory_bytes
        self._move = Move.of(gallery)
        self._operand = operand or fast_operand()
        item = _OPERAND_BYTES[self._operand] * (-(-gallery.shape[1] // 32) * 32)
        self.part_items = max(256, memory_bytes // 2 // item)
        self._kept: dict[tuple[int, str], _Packed] = {}

    @property
    def in_parts(self) -> bool:
        """Whether the gallery is packed anew, part by part, for every block of queries."""
        return len(self._rows) > self.part_items

    def nearest(
        self,
        queries: Float32[np.ndarray, "q D"],
        ids: Int64[np.ndarray, " q"] | None,
        k: int,
    ) -> tuple[Int64[np.ndarray, "q k"], Float64[np.ndarray, "q k"]]:
        """Positions and values of the `k` nearest, nearest first; see `GallerySearch`."""
        rows = as_tensor(queries)
        numbers = None if ids is None else as_tensor(ids)
        found = []
        for first in range(0, len(self._rows), self.part_items):
            positions, values = self._search_part(first, rows, numbers, k)
            shifted = np.where(positions >= 0, positions + first, -1)
            found.append((values, self._ids.numpy()[shifted], shifted))
        if len(found) == 1:
            return found[0][2], found[0][0]
        parts = [list(column) for column in zip(*found, strict=True)]
        values, _, positions = merge_nearest(parts[0], parts[1], parts[2], k, self._squares)
        return positions, values

    def _search_part(
        self, first: int, rows: torch.Tensor, ids: torch.Tensor | None, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        positions = torch.empty((len(rows), k), dtype=torch.int64)
        values = torch.empty((len(rows), k), dtype=torch.float64)
        left = torch.arange(len(rows))
        passes = [self._operand] + ["float32"] * (self._operand != "float32") + ["all"]
        for kind in passes:
            if len(left) == 0:
                break
            if kind != "all" and kind != self._operand and len(left) <= _FEW:
                continue
            asked = rows if len(left) == len(rows) else rows[left]
            numbers = ids if ids is None or len(left) == len(rows) else ids[left]
            part = self._packed(first, kind)
            place, value, crowded = part.search(asked, numbers, k, self._memory_bytes // 4)
            done = crowded == 0
            positions[left[done]], values[left[done]] = place[done], value[done]
            left = left[~done]
        return positions.numpy(), values.numpy()

    def _packed(self, first: int, kind: str) -> _Packed:
        # Of a gallery in parts, one part at a time; of a whole one, both kinds if both are needed.
        if (first, kind) not in self._kept:
            if self.in_parts:
                self._kept.clear()
            part = slice(first, first + self.part_items)
            self._kept[first, kind] = _Packed(
                self._library,
                self._rows[part],
                self._ids[part],
                self._move,
                first,
                self._squares,
                kind,
            )
        return self._kept[first, kind]


class _Packed:
    """A part of a gallery in the layout of products; for `all` nothing is packed."""

    def __init__(
        self,
        library: ctypes.CDLL,
        rows: torch.Tensor,
        ids: torch.Tensor,
        move: Move,
        first: int,
        squares: bool,
        kind: str,
    ) -> None:
        self._library, self._kind = library, kind
        here = move.far[(move.far >= first) & (move.far < first + len(rows))] - first
        mean, far = torch.from_numpy(move.mean), torch.from_numpy(here)
        self._alive = [rows, ids, mean, far]
        self._gallery = _Gallery(
            rows=native_address(rows),
            ids=native_address(ids),
            mean=native_address(mean),
            num_items=len(rows),
            num_features=rows.shape[1],
            squares=squares,
            operand=kind == "bfloat16",
            scale=move.scale,
            far=native_address(far),
            num_far=len(far),
            num_threads=torch.get_num_threads(),
        )
        if kind == "all":
            return
        gallery_at = ctypes.byref(self._gallery)
        packed = torch.empty(library.dist_dml_packed_bytes(gallery_at), dtype=torch.uint8)
        bias = torch.empty(library.dist_dml_bias_count(gallery_at))
        norms = torch.empty(4, dtype=torch.float64)
        self._alive += [packed, bias, norms]
        self._gallery.packed, self._gallery.bias, self._gallery.norms = (
            native_address(one) for one in (packed, bias, norms)
        )
        self._call("dist_dml_pack_gallery")

    def search(
        self, rows: torch.Tensor, ids: torch.Tensor | None, k: int, memory_bytes: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Positions, values, and 1 for each query that has too many candidates."""
        positions = torch.empty((len(rows), k), dtype=torch.int64)
        values = torch.empty((len(rows), k), dtype=torch.float64)
        crowded = torch.ones(len(rows), dtype=torch.int64)
        searched = min(k + 1, int(self._gallery.num_items))
        most = 2 * searched + 512
        threads = int(self._gallery.num_threads)
        share = -(-len(rows) // threads)
        fitting = memory_bytes // (threads * (8 * most + 4 * rows.shape[1]))
        job = max(1, min(fitting, _MOST_JOB, share))
        job = job // _BLOCK * _BLOCK if job > _BLOCK else job
        task = _Queries(
            rows=native_address(rows),
            ids=native_address(ids),
            num_queries=len(rows),
            k=k,
            most_candidates=most,
            job_queries=job,
            positions=native_address(positions),
            values=native_address(values),
            crowded=native_address(crowded),
        )
        self._call("dist_dml_search_all" if self._kind == "all" else "dist_dml_search", task)
        return positions, values, crowded

    def _call(self, name: str, *arguments: NativeStructure) -> None:
        if trouble := native_call(self._library, name, self._gallery, *arguments):
            raise RunError(f"the search failed in {name}: {trouble}")
