"""The machine's own rates and the time that they allow a step, measured in turns with the rest.

Dimensions: R rows, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bench_head_measure import timed
from bench_head_variants import Size

# Logits of a tile and thread in the measurement of exponentials: 1 MiB in, 1 MiB out, within a
# core's caches.
EXPONENTIALS = 2**18
# So few that PyTorch does them on one thread: where other processes compete, short parallel pieces
# wait for their slowest thread (30 times slower was seen), and would make the bound too kind.
SERIAL_EXPONENTIALS = 2**14


def gemm_shapes(size: Size, device: torch.device) -> list[tuple[int, int, int]]:
    """(m, k, n) of the products that a tile needs, and of large ones."""
    tile = 65_536 if device.type == "cuda" else 4096
    large = 8192 if device.type == "cuda" else 2048
    rows, width = size.rows, size.embedding_dim
    tiles = [(rows, width, tile), (rows, tile, width), (tile, rows, width)]
    return [*tiles, (large, large, large), (large, large // 2, large)]


def _gemm(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Any:
    m, k, n = shape
    left = torch.randn(m, k, device=device, dtype=dtype)
    right, out = (
        torch.randn(k, n, device=device, dtype=dtype),
        torch.empty(m, n, device=device, dtype=dtype),
    )
    return lambda: torch.mm(left, right, out=out)


def rate_measures(
    size: Size, device: torch.device, seconds: float = 0.2
) -> tuple[dict[str, Callable[[], float]], dict[str, dict[str, Any]]]:
    """Functions that time a fixed amount of work of each kind, and what that work is.

    Returns:
        By kind (`float32`, `bfloat16`: matrix products in the fastest of several shapes;
        `exponentials`): a function that gives the seconds of one unit (a floating-point operation,
        or one exponential), and a description.
    """
    measures: dict[str, Callable[[], float]] = {}
    work: dict[str, dict[str, Any]] = {}
    for kind, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        per_unit = {}
        for shape in gemm_shapes(size, device):
            units = 2.0 * shape[0] * shape[1] * shape[2]
            per_unit[shape] = _repeated(_gemm(shape, dtype, device), units, device, seconds / 2)()
        best = min(per_unit, key=per_unit.__getitem__)
        units = 2.0 * best[0] * best[1] * best[2]
        measures[kind] = _repeated(_gemm(best, dtype, device), units, device, seconds)
        work[kind] = {
            "best_shape": best,
            "operations_per_second": {
                "x".join(map(str, shape)): 1 / value for shape, value in per_unit.items()
            },
        }
    count = EXPONENTIALS * (64 if device.type == "cuda" else torch.get_num_threads())
    together = _exponentials(count, device, seconds / 2)
    alone = _exponentials(SERIAL_EXPONENTIALS, device, seconds / 2)
    measures["exponentials"] = lambda: min(together(), alone())
    work["exponentials"] = {"logits_at_once": count}
    return measures, work


def _exponentials(count: int, device: torch.device, seconds: float) -> Callable[[], float]:
    """Seconds of one of `count` exponentials at once."""
    logits = torch.randn(count, device=device)
    out = torch.empty_like(logits)
    return _repeated(lambda: torch.exp(logits, out=out), float(count), device, seconds)


def _repeated(
    function: Callable[[], Any], units: float, device: torch.device, seconds: float
) -> Callable[[], float]:
    """Seconds of a unit, from as many calls as fill `seconds`."""
    once = timed(function, device)
    once()
    calls = max(1, int(seconds / max(once(), 1e-6)))

    def many() -> None:
        for _ in range(calls):
            function()

    return lambda: timed(many, device)() / (calls * units)


def bound_seconds(size: Size, per_operation: float, per_exponential: float) -> float:
    """The time that a recomputing step cannot beat at these rates: 8RCD and 2RC exponentials."""
    logits = size.rows * size.num_classes
    return 8.0 * logits * size.embedding_dim * per_operation + 2.0 * logits * per_exponential
