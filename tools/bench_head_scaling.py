"""How a step of `bench_head` grows: with the number of classes, and with the number of workers.

Dimensions: R rows, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from bench_head_compare import shared_heads
from bench_head_crew import Crew
from bench_head_measure import (
    Spread,
    Times,
    extra_bytes_in_own_process,
    paired,
    report_progress,
    step_of,
    take_turns,
    timed,
)
from bench_head_variants import DEFAULTS, Size, batch

# Small sizes do several steps in a turn, so that every turn has at least so many classes.
TURN_CLASSES = 400_000


@dataclass(frozen=True)
class Scaling:
    """One default variant over several C.

    Attributes:
        sizes: ascending.
        times: seconds of a step and class, by size and repetition.
        extra: bytes of a step beyond weights and state.
    """

    name: str
    sizes: tuple[Size, ...]
    times: tuple[list[float], ...]
    extra: tuple[int | None, ...]

    def per_class(self) -> list[Spread]:
        """Seconds of a step and class at each size."""
        return [Spread.of(values) for values in self.times]

    def unevenness(self) -> Spread:
        """Time per class where it is largest over where it is smallest, by the medians."""
        medians = [spread.median for spread in self.per_class()]
        slowest, fastest = medians.index(max(medians)), medians.index(min(medians))
        return paired(self.times[slowest], self.times[fastest])


def measure_scaling(
    sizes: Sequence[Size], device: torch.device, repeats: int, together: bool
) -> list[Scaling]:
    """Both defaults at every size, in turns; memory in one process each, or `together`."""
    measures: dict[str, Callable[[], float]] = {}
    names = [variant.name for variant in DEFAULTS.values()]
    for size in sizes:
        heads, _, _ = shared_heads(names, size, device)
        rows, labels = batch(size, device)
        steps = max(1, TURN_CLASSES // size.num_classes)
        for name, head in heads.items():
            step = step_of(head, rows, labels)
            step()
            many = timed(_repeated(step, steps), device)
            measures[f"{name} {size}"] = _scaled(many, 1 / (steps * size.num_classes))
    times = take_turns(measures, repeats, "classes")
    extras: dict[str, list[int | None]] = {}
    for group in [names] if together else [[name] for name in names]:
        extras |= extra_bytes_in_own_process(group, sizes) if device.type == "cpu" else {}
    found = []
    for name in names:
        found.append(
            Scaling(
                name,
                tuple(sizes),
                tuple(_measured(times, f"{name} {size}") for size in sizes),
                tuple(extras.get(name, [None] * len(sizes))),
            )
        )
    return found


def _repeated(step: Callable[[], object], count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            step()

    return run


def _scaled(seconds: Callable[[], float], factor: float) -> Callable[[], float]:
    return lambda: seconds() * factor


def _measured(times: Times, name: str) -> list[float]:
    return [value for value in times[name] if value is not None]


@dataclass(frozen=True)
class Workers:
    """One default variant on one worker with all threads, and on as many workers as threads.

    Attributes:
        one: seconds of a step by repetition, on one worker.
        many: on `num_workers` workers of one thread.
    """

    name: str
    size: Size
    num_workers: int
    one: list[float]
    many: list[float]

    def ratio(self) -> Spread:
        """How many times as long the many take as the one."""
        return paired(self.many, self.one)


def measure_workers(size: Size, num_workers: int, repeats: int) -> list[Workers]:
    """Both defaults on `num_workers` workers x 1 thread and 1 worker x `num_workers` threads."""
    found = []
    for variant in DEFAULTS.values():
        with ExitStack() as stack:
            one = stack.enter_context(Crew(1, num_workers, variant.name, size))
            many = stack.enter_context(Crew(num_workers, 1, variant.name, size))
            measures = {"one": one.step, "many": many.step}
            times = take_turns(measures, repeats, f"{num_workers} workers, {variant.name}")
        measured = (_measured(times, "one"), _measured(times, "many"))
        found.append(Workers(variant.name, size, num_workers, *measured))
        report_progress(f"  {num_workers} workers: {found[-1].ratio().median:.2f} of one's time")
    return found


def scaling_sizes(size: Size, counts: Sequence[int]) -> list[Size]:
    """`size` with other numbers of classes."""
    return [replace(size, num_classes=count) for count in counts]
