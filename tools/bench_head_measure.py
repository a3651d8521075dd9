"""How `bench_head` measures: turns, memory of a step, errors.

Everything that is compared takes turns within every repetition, in an order that moves on by one,
so that a machine whose load changes slows all alike; ratios are taken within a repetition.

Dimensions: R rows, C classes, D features.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_head_peers import PEERS, PLAIN, PUBLISHED, cosface, peer_heads
from bench_head_variants import (
    LEARNING_RATE,
    Head,
    Size,
    Variant,
    batch,
    draw_weights_,
    every_variant,
    project_head,
)
from torch import Tensor, nn

from dist_dml.usable import usable_memory

Times = dict[str, list[float | None]]

# Seconds a repetition that a variant may take on average: a slower one sits out some repetitions.
PATIENCE_SECONDS = 6.0
# Classes of the problem on which errors are measured, small enough for float64.
ERROR_CLASSES = 40_000
# An update by the gradient times this is so large that the old weight's rounding is lost in it, so
# that (old - new) / rate is the gradient to float32, whoever updates and whether one exists or not.
ERROR_RATE = 1024.0


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        """Of one value, all three are that value."""
        values = list(values)
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)


def paired(numerator: Sequence[float | None], denominator: Sequence[float | None]) -> Spread:
    """Of the ratios within the repetitions in which both were measured."""
    pairs = zip(numerator, denominator, strict=True)
    return Spread.of(a / b for a, b in pairs if a is not None and b is not None)


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that its work is timed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(seconds: float) -> str:
    """m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def report_progress(text: str) -> None:
    """A line on stderr: stdout holds results only."""
    print(text, file=sys.stderr, flush=True)


def take_turns(measure: Mapping[str, Callable[[], float]], repeats: int, title: str) -> Times:
    """Seconds of each, by repetition; None where a slow one sat out. Warming up is the caller's.

    The first repetition measures all, and says which ones are slow.
    """
    times: Times = {name: [] for name in measure}
    names = list(measure)
    started = time.perf_counter()
    for repetition in range(repeats):
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            due = repetition == 0 or _is_due(times[name][0], repetition, repeats)
            times[name].append(measure[name]() if due else None)
        spent = time.perf_counter() - started
        left = spent / (repetition + 1) * (repeats - repetition - 1)
        report_progress(
            f"  {title}: {repetition + 1} of {repeats} repetitions after {clock(spent)}, "
            f"about {clock(left)} left"
        )
    return times


def _is_due(first: float | None, repetition: int, repeats: int) -> bool:
    """Whether one that took `first` seconds is measured again; those times are spread evenly."""
    assert first is not None
    allowed = max(1, min(repeats, int(PATIENCE_SECONDS * repeats / max(first, 1e-9))))
    again, rest = allowed - 1, repeats - 1
    return repetition * again // rest > (repetition - 1) * again // rest


def timed(function: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    """`function`, giving its seconds, the device's work included."""

    def seconds() -> float:
        synchronise(device)
        started = time.perf_counter()
        function()
        synchronise(device)
        return time.perf_counter() - started

    return seconds


def step_of(head: Head, rows: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """A step that makes the rows' gradient too."""
    return lambda: head.step(rows.detach().requires_grad_(), labels)


def build_head(name: str, size: Size, device: torch.device, rate: float = LEARNING_RATE) -> Head:
    """One variant or peer by name, on weights of its own."""
    if name not in PEERS:
        return project_head(every_variant()[name], size, device, rate)
    weight = nn.Parameter(torch.empty(size.num_classes, size.embedding_dim, device=device))
    draw_weights_(weight.detach())
    # Which of PyTorch's two updates is used changes neither memory nor errors.
    return peer_heads([name], weight, True, learning_rate=rate)[name]


def errors_of(name: str, size: Size, device: torch.device) -> dict[str, float]:
    """Largest error of loss, rows' gradient and weights' gradient, each over the largest entry.

    Against float64 autograd over the same weights, with `ERROR_CLASSES` classes. The gradient is
    read off the update, see `ERROR_RATE`, where that is SGD's in float32. For a sampled peer this
    is the error of sampling: it is compared with the loss over all classes.
    """
    small = replace(size, num_classes=min(size.num_classes, ERROR_CLASSES))
    variant: Variant | None = None if name in PEERS else every_variant()[name]
    rows, labels = batch(small, device)
    head = build_head(name, small, device, ERROR_RATE)
    exact_weight = head.weight.detach().double().requires_grad_()
    exact_rows = rows.double().requires_grad_()
    kind = PEERS[name].loss if variant is None else variant.loss
    exact = (
        cosface(exact_rows, exact_weight, labels)
        if kind == "cosface"
        else F.cross_entropy(F.linear(exact_rows, exact_weight), labels)
    )
    exact.backward()
    rows.requires_grad_()
    loss = head.step(rows, labels)
    assert rows.grad is not None
    assert exact_rows.grad is not None
    assert exact_weight.grad is not None
    found = {"loss": _error(loss, exact.detach()), "rows": _error(rows.grad, exact_rows.grad)}
    if variant is None or (variant.optimizer, variant.weight_dtype) == ("sgd", "float32"):
        gradient = (exact_weight.detach() - head.weight.detach()) / ERROR_RATE
        found["weights"] = _error(gradient, exact_weight.grad)
    return found


def _error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def extra_bytes(name: str, size: Size, device: torch.device) -> int | None:
    """Peak of a step beyond weights and optimizer state, in this process.

    A gradient of the size of the weights counts, and so do buffers that a head keeps between its
    steps. What libraries need once is not counted: a small head of the same kind goes first.
    """
    small = build_head(name, replace(size, num_classes=min(size.num_classes, 4096)), device)
    step_of(small, *batch(replace(size, num_classes=len(small.weight)), device))()
    del small
    if device.type == "cuda":
        torch.cuda.empty_cache()
        started = torch.cuda.memory_allocated(device)
    elif not Path("/proc/self/clear_refs").exists():
        return None
    else:
        started = status_bytes("VmRSS")
    rows, labels = batch(size, device)
    head = build_head(name, size, device)
    step_of(head, rows[:1], labels[:1])()  # Makes the state and touches all of its pages.
    resident = head.resident_bytes
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:  # Linux: start the high-water mark of the resident set anew.
        Path("/proc/self/clear_refs").write_text("5")
    step_of(head, rows, labels)()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - started - resident
    return status_bytes("VmHWM") - started - resident


def status_bytes(field: str) -> int:
    """A size from Linux's account of this process, for example `VmHWM`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def extra_bytes_in_own_process(
    names: Sequence[str], sizes: Sequence[Size]
) -> dict[str, list[int | None]]:
    """`extra_bytes` for each name and size on the CPU of a process that does nothing else."""
    request = json.dumps(
        {"task": "memory", "names": list(names), "sizes": [asdict(size) for size in sizes]}
    )
    tool = Path(__file__).with_name("bench_head.py")
    # Memory that is freed goes back at once, so that it does not count as resident before a step.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [sys.executable, str(tool), "--child", request],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def needed_bytes(size: Size, names: Sequence[str]) -> int:
    """A generous estimate of what a comparison holds at its peak.

    One set of weights and momentum, what the hungriest peer makes in a step, 64 MiB for every
    variant's buffers, and the logits that some variants keep.
    """
    weights = 4 * size.num_classes * size.embedding_dim
    logits = 4 * size.num_classes * size.rows
    transient = {PLAIN: 3 * logits + weights, PUBLISHED: 5 * logits + 3 * weights}
    largest = max(transient.get(name, 2 * logits + weights) for name in names)
    kept = sum(" keep," in name for name in names) * logits
    return 2 * weights + largest + kept + len(names) * 64 * 2**20


def available_bytes(device: torch.device) -> int:
    """Free memory of the machine or the GPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return usable_memory()
