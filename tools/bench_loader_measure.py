"""How `bench_loader` measures: processor time of the trainer and its loader processes, in turns.

Streams are opened once and stay open, so that starting processes is not measured. They take turns
within every repetition, in an order that moves on by one; ratios are taken within a repetition.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import psutil
from bench_head_measure import clock, report_progress
from bench_loader_images import Images
from bench_loader_readers import PREFETCH, Stream, streams

from dist_dml.data.augment import (
    evaluation_transform,
    evaluation_view,
    train_transform,
    training_view,
)
from dist_dml.data.decode import decode
from dist_dml.data_config import AugmentConfig, ImageConfig


@dataclass
class Measured:
    """One variant: seconds an image, by repetition; None for what was not taken."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    process_bytes: int | None = None
    """Private memory of the largest loader process."""


def _cpu_seconds(pids: set[int]) -> float:
    """Processor seconds of this process and of some others."""
    seconds = time.process_time()
    for pid in pids:
        times = psutil.Process(pid).cpu_times()
        seconds += times.user + times.system
    return seconds


def _settle(pids: set[int]) -> None:
    """Wait until loader processes have filled their queues: others are measured next."""
    before = -1.0
    while pids and (now := sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)) > before:
        before = now
        time.sleep(0.1)


def _loader_processes() -> set[int]:
    """Children of this process's children: a forkserver stands between."""
    own = psutil.Process()
    direct = {child.pid for child in own.children()}
    return {child.pid for child in own.children(recursive=True)} - direct


def _private_bytes(pids: set[int]) -> int | None:
    """Most memory that one of the processes shares with no other (unique set size)."""
    sizes = []
    for pid in pids:
        try:
            sizes.append(psutil.Process(pid).memory_full_info().uss)
        except psutil.Error:
            continue
    return max(sizes, default=None)


@dataclass
class _Open:
    """A stream that waits for its turn."""

    stream: Stream
    pids: set[int]
    measured: Measured
    warm_batches: int


def compare_streams(
    images: Images, batch_size: int, batches: int, processes: Sequence[int], repeats: int
) -> dict[tuple[str, int], Measured]:
    """Every reader with every number of loader processes, by (name, processes).

    A turn first takes what was made ahead while others had theirs; then it is measured from a
    steady state to a steady state.

    Args:
        images: what is read.
        batch_size: images of a batch.
        batches: measured in a turn.
        processes: numbers of loader processes.
        repeats: repetitions.
    """
    opened: dict[tuple[str, int], _Open] = {}
    for count in processes:
        for name, open_stream in streams(images, batch_size, count).items():
            before = _loader_processes()
            stream = open_stream()
            next(stream)
            pids = _loader_processes() - before
            _settle(pids)
            warm = count * PREFETCH + 1
            opened[name, count] = _Open(stream, pids, Measured(), warm)
            report_progress(f"  {name}, {count} loader processes: ready")
    started = time.perf_counter()
    names = list(opened)
    for repetition in range(repeats):
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            _take_turn(opened[name], batches, batch_size)
        spent = time.perf_counter() - started
        left = spent / (repetition + 1) * (repeats - repetition - 1)
        report_progress(f"  {repetition + 1} of {repeats} repetitions, about {clock(left)} left")
    for entry in opened.values():
        entry.measured.process_bytes = _private_bytes(entry.pids)
        entry.stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    return {name: entry.measured for name, entry in opened.items()}


def _take_turn(entry: _Open, batches: int, batch_size: int) -> None:
    for _ in range(entry.warm_batches):
        next(entry.stream)
    cpu, wall = _cpu_seconds(entry.pids), time.perf_counter()
    rows = 0
    for _ in range(batches):
        rows += len(next(entry.stream))
    wall = time.perf_counter() - wall
    cpu = _cpu_seconds(entry.pids) - cpu
    _settle(entry.pids)
    assert rows >= batches * (batch_size // 2)
    entry.measured.wall.append(wall / rows)
    entry.measured.cpu.append(cpu / rows)


def compare_functions(
    functions: Mapping[str, Callable[[int], object]], images: int, repeats: int
) -> dict[str, Measured]:
    """Seconds a call of functions of an image's number, in this process, in turns."""
    found = {name: Measured() for name in functions}
    names = list(functions)
    for repetition in range(repeats):
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            function = functions[name]
            function(0)
            cpu, wall = time.process_time(), time.perf_counter()
            for number in range(images):
                function(number)
            found[name].wall.append((time.perf_counter() - wall) / images)
            found[name].cpu.append((time.process_time() - cpu) / images)
    return found


def large_image_functions(
    data: Sequence[bytes], image: ImageConfig, augment: AugmentConfig
) -> dict[str, Callable[[int], object]]:
    """Training and evaluation views of encoded images, decoded reduced and decoded whole."""

    def bytes_of(number: int) -> bytes:
        return data[number % len(data)]

    return {
        "training view": lambda i: training_view(bytes_of(i), image, augment, i),
        "training view, decoded whole": lambda i: train_transform(
            decode(bytes_of(i), image.channels), image, augment, i
        ),
        "evaluation view": lambda i: evaluation_view(bytes_of(i), image),
        "evaluation view, decoded whole": lambda i: evaluation_transform(
            decode(bytes_of(i), image.channels), image
        ),
    }
