"""The rates of this machine, measured in a few seconds. A training never does this; see
`parallel.machine`.

Every rate is the median over repetitions that take turns, so that a busy machine slows all alike.
Dimensions: R rows, t classes of a tile, D features.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle

import torch
from torch import Tensor

from dist_dml.parallel.machine import Level, Machine, core_cache_bytes, known_machine

Clock = Callable[[], float]
# (R, t, D) of the products: tiles of a usual head, on a CPU and on a GPU.
_CPU_TILE = (256, 2048, 128)
_GPU_TILE = (1024, 8192, 512)
_TURN_SECONDS = 0.01
_TILES = 16
# The C library gives such large pieces back to the system, and gets new pages the next time.
_FRESH_BYTES = 64 * 2**20
# Beyond every cache of a core; what shares a processor's L3 with strangers hardly keeps it.
_FAR_BYTES = 256 * 2**20


def measure_machine(
    device: torch.device,
    threads: int,
    repeats: int = 7,
    tile: tuple[int, int, int] | None = None,
    clock: Clock = time.perf_counter,
) -> Machine:
    """This machine, with measured rates; sizes and links are those of `known_machine`.

    Matrix products: the three of a tile (logits, row gradient, weight gradient) in turn, by
    `torch.mm`, as 6 R t D operations over their time. Exponentials: a pass
    of `exp` in the cache. Streams: a sum (reads) and a multiplication in place (reads and writes),
    in the cache, in the next level and beyond.

    Args:
        device: what to measure.
        threads: CPU threads, set while measuring and put back afterwards.
        repeats: turns of every measurement.
        tile: (R, t, D) of the products; None takes usual ones.
        clock: `time.process_time` measures one thread of a machine that others use as well.
    """
    known = known_machine(device, threads)
    sizes = tile or (_CPU_TILE if device.type == "cpu" else _GPU_TILE)
    with _threads(threads), torch.no_grad():
        products = {
            name: _products(dtype, device, sizes)
            for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        }
        near = known.cache_bytes * known.cores // 2
        far = _FAR_BYTES if device.type == "cpu" else 4 * 2**30
        spans = [near, min(16 * near, far // 4), far] if device.type == "cpu" else [near, far]
        passes: dict[object, Callable[[], object]]
        passes = {(span, kind): run for span in spans for kind, run in _passes(span, device)}
        small = torch.ones(16, device=device)
        passes["fresh"] = lambda: torch.empty(_FRESH_BYTES // 4, device=device).fill_(0.0)
        work: dict[object, Callable[[], object]] = {**products, **passes}
        work["launch"] = lambda: [small.mul_(1.0) for _ in range(100)]
        seconds = _medians(work, repeats, device, clock)
    rows, classes, width = sizes
    rates = {name: 6.0 * rows * classes * width / seconds[name] for name in products}
    return replace(
        known,
        name="measured",
        gemm=rates,
        exponentials=near / 8 / seconds[near, "exponential"],
        # A tile and its rounded copy together seldom fit the cache.
        roundings=2 * spans[1] / 8 / seconds[spans[1], "rounding"],
        levels=_levels(known, spans, seconds),
        launch_seconds=seconds["launch"] / 100,
        fresh=_FRESH_BYTES / seconds["fresh"],
        share=1.0,
        source=f"measured here, {threads} threads, sizes {rows} x {classes} x {width}",
    )


def _levels(known: Machine, spans: list[int], seconds: Mapping[object, float]) -> tuple[Level, ...]:
    """Bandwidths of the spans; the middle one ends where the share of the L3 that is sure to be
    this worker's ends."""
    capacities = [float(known.cache_bytes * known.cores), float("inf")]
    if len(spans) == 3:
        shared = core_cache_bytes(3)
        capacities.insert(1, float(max(min(shared, _FAR_BYTES // 2), capacities[0])))
    return tuple(
        Level(capacity, span / seconds[span, "read"], 2 * span / seconds[span, "update"])
        for capacity, span in zip(capacities, spans, strict=True)
    )


def _products(
    dtype: torch.dtype, device: torch.device, sizes: tuple[int, int, int]
) -> Callable[[], None]:
    """The three products of a tile, into buffers that exist.

    As in a sweep, the weights of the next tile are not in the cache yet.
    """
    rows, classes, width = sizes

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    z, g = drawn(rows, width), drawn(rows, classes)
    tiles = cycle([drawn(classes, width) for _ in range(_TILES)])
    logits, of_rows = torch.empty_like(g), torch.empty_like(z)
    of_classes = torch.empty_like(next(tiles))

    def run() -> None:
        w = next(tiles)
        torch.mm(z, w.T, out=logits)
        torch.mm(g, w, out=of_rows)
        torch.mm(g.T, z, out=of_classes)

    return run


def _passes(span: int, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Reading `span` bytes; reading and writing them; the same with an exponential a number."""
    values = torch.full((span // 4,), -1.0, device=device)
    half, out = values[: span // 8], torch.empty(span // 8, device=device)
    small = half.bfloat16()
    yield "read", lambda: values.sum()
    yield "update", lambda: values.mul_(1.0)
    yield "exponential", lambda: torch.exp(half, out=out)
    yield "rounding", lambda: out.copy_(small.copy_(half))


def _medians(
    work: Mapping[object, Callable[[], object]], repeats: int, device: torch.device, clock: Clock
) -> dict[object, float]:
    """Seconds of each piece of work, in turns.

    The turn of another leaves the caches cold, so a turn repeats short work for `_TURN_SECONDS`,
    after one run that is not counted.
    """
    times: dict[object, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, run in work.items():
            inner = max(
                1, min(1000, int(_TURN_SECONDS / max(_seconds(run, 1, device, clock), 1e-9)))
            )
            times[name].append(_seconds(run, inner, device, clock))
    return {name: statistics.median(values) for name, values in times.items()}


def _seconds(run: Callable[[], object], count: int, device: torch.device, clock: Clock) -> float:
    _wait(device)
    started = clock()
    for _ in range(count):
        run()
    _wait(device)
    return (clock() - started) / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
