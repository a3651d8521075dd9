"""Time, memory and error of the class-parallel head against PyTorch's own, side by side.

    python tools/bench_head.py [--quick] [--json OUT]

A step is the loss of R rows against C classes, its gradients, and SGD with momentum on the class
weights, in float32 on one worker. The variants take turns within every repetition, so that a busy
machine slows all of them alike, and ratios are medians of ratios within a repetition. The spread is
the interquartile range. Extra memory is the peak of a step beyond weights, their gradient and
optimizer state: on CPU the resident set of a fresh process, on GPU what PyTorch allocates. The
error is the largest one of loss, row gradients and weight gradients against float64 on a few rows,
relative to the largest entry.

Dimensions: R rows, C classes, D features.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Run by path: this folder is not a package.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_dml.config import LossConfig, OptimizerConfig
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.classifier import ClassParallelClassifier

OPTIMIZER = OptimizerConfig(name="sgd", learning_rate=1e-3, class_weight_decay=0.0)
# Logits of a standard deviation of about 3, as in training, not the flat ones of a start.
LOGIT_STD = 3.0
# Rows on which errors are measured; float64 rows of logits are twice the plain function's memory.
ERROR_ROWS = 16
# A variant that takes longer for its first step is not repeated (PyTorch's automatic chunks on CPU
# took half a minute at 512 x 200,000).
PATIENCE_SECONDS = 5.0


@dataclass(frozen=True)
class Size:
    """C, D and R of one comparison."""

    num_classes: int
    embedding_dim: int
    rows: int


QUICK = (Size(50_000, 128, 128),)
CPU = (Size(100_000, 128, 128), Size(200_000, 128, 512))
GPU = (Size(1_000_000, 128, 1024), Size(1_000_000, 512, 512))


@dataclass(frozen=True)
class Head:
    """Class weights with one way to compute their loss."""

    weight: nn.Parameter
    bias: nn.Parameter
    loss: Callable[[Tensor, Tensor], Tensor]
    update: Callable[[], Any]
    clear: Callable[[], Any]


def class_parallel(size: Size, device: torch.device, tile_mebibytes: float) -> Head:
    """This project's head; its gradient stays allocated and is overwritten."""
    config = LossConfig(init_std=LOGIT_STD / size.embedding_dim**0.5, tile_mebibytes=tile_mebibytes)
    partition = ClassPartition.of_worker(0, 1, size.num_classes)
    classifier = ClassParallelClassifier(
        size.embedding_dim, partition, config, OPTIMIZER, 0, size.rows, device
    )
    assert classifier.bias is not None

    def loss(rows: Tensor, labels: Tensor) -> Tensor:
        return classifier(rows, labels, (len(rows),), len(rows)).loss

    update = partial(classifier.step, 1.0)
    return Head(classifier.weight, classifier.bias, loss, update, lambda: None)


def pytorch(
    size: Size,
    device: torch.device,
    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> Head:
    """The same weights under autograd; gradients are dropped after a step, PyTorch's default."""
    start = class_parallel(size, device, 256.0)
    weight, bias = nn.Parameter(start.weight.detach()), nn.Parameter(start.bias.detach())
    optimizer = torch.optim.SGD(
        [weight, bias], OPTIMIZER.learning_rate, OPTIMIZER.momentum, fused=True
    )

    def loss(rows: Tensor, labels: Tensor) -> Tensor:
        return function(rows, weight, bias, labels)

    return Head(weight, bias, loss, optimizer.step, optimizer.zero_grad)


def plain(rows: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """`F.cross_entropy` over whole rows of logits."""
    return F.cross_entropy(F.linear(rows, weight, bias), labels)


def chunked(
    rows: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, batch_chunk_size: int | None
) -> Tensor:
    """PyTorch's own answer to large logits, which cuts the batch instead of the classes."""
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=batch_chunk_size)
    return F.linear_cross_entropy(rows, weight, labels, linear_bias=bias, options=options)


VARIANTS: dict[str, Callable[[Size, torch.device], Head]] = {
    "F.cross_entropy(F.linear)": partial(pytorch, function=plain),
    "class-parallel, 256 MiB": partial(class_parallel, tile_mebibytes=256.0),
    "class-parallel, 32 MiB": partial(class_parallel, tile_mebibytes=32.0),
}
if hasattr(F, "linear_cross_entropy"):  # since PyTorch 2.13
    VARIANTS |= {
        "F.linear_cross_entropy, auto": partial(
            pytorch, function=partial(chunked, batch_chunk_size=None)
        ),
        "F.linear_cross_entropy, 128": partial(
            pytorch, function=partial(chunked, batch_chunk_size=128)
        ),
    }
BASE = next(iter(VARIANTS))


def batch(size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random rows and labels."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(size.rows, size.embedding_dim, generator=generator)
    labels = torch.randint(0, size.num_classes, (size.rows,), generator=generator)
    return rows.to(device), labels.to(device)


def step(head: Head, rows: Tensor, labels: Tensor) -> None:
    """Loss, gradients, update."""
    head.loss(rows.detach().requires_grad_(), labels).backward()
    head.update()
    head.clear()


def seconds_of(head: Head, rows: Tensor, labels: Tensor) -> float:
    """Time of one step, the device's work included."""
    _synchronise(rows.device)
    started = time.perf_counter()
    step(head, rows, labels)
    _synchronise(rows.device)
    return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def extra_bytes(head: Head, rows: Tensor, labels: Tensor) -> int | None:
    """Peak of a step beyond weights, gradient and state; None where it cannot be measured."""
    step(head, rows[:1], labels[:1])  # Allocates state and, for ours, the gradient.
    resident = sum(p.numel() * p.element_size() for p in (head.weight, head.bias))
    gradient = resident if head.weight.grad is None else 0
    if rows.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(rows.device)
        before = torch.cuda.memory_allocated(rows.device)
        step(head, rows, labels)
        return torch.cuda.max_memory_allocated(rows.device) - before - gradient
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    clear.write_text("5")  # Linux: start the high-water mark of the resident set anew.
    before = _status_bytes("VmRSS")
    step(head, rows, labels)
    return _status_bytes("VmHWM") - before - gradient


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def extra_bytes_in_own_process(variant: str, size: Size) -> int | None:
    """`extra_bytes` on the CPU of a process that has done nothing else."""
    command = [sys.executable, __file__, "--memory-of", variant, json.dumps(asdict(size))]
    # Memory that is freed goes back at once, so that it does not count as resident before a step.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def error_of(head: Head, rows: Tensor, labels: Tensor) -> float:
    """Largest error of loss and gradients on the first rows, against float64."""
    rows, labels = rows[:ERROR_ROWS], labels[:ERROR_ROWS]
    own = (rows.detach().requires_grad_(), head.weight, head.bias)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in own)
    exact_loss, loss = plain(exact[0], exact[1], exact[2], labels), head.loss(own[0], labels)
    exact_loss.backward()
    loss.backward()
    pairs = [(loss, exact_loss)]
    pairs += [(_gradient(got), _gradient(want)) for got, want in zip(own, exact, strict=True)]
    errors = [((got - want).abs().max() / want.abs().max()).item() for got, want in pairs]
    head.update()  # Only so that the next backward starts a new gradient.
    head.clear()
    return max(errors)


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def compare(size: Size, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """One row a variant, all but the slowest measured in turns."""
    rows, labels = batch(size, device)
    heads = {name: build(size, device) for name, build in VARIANTS.items()}
    errors = {name: error_of(head, rows, labels) for name, head in heads.items()}
    first = {name: seconds_of(head, rows, labels) for name, head in heads.items()}
    memory = {
        name: extra_bytes(head, rows, labels)
        if device.type == "cuda"
        else extra_bytes_in_own_process(name, size)
        for name, head in heads.items()
    }
    order = [name for name in heads if name == BASE or first[name] < PATIENCE_SECONDS]
    times: dict[str, list[float]] = {name: [] for name in order}
    for repetition in range(repeats):
        for name in order[repetition % len(order) :] + order[: repetition % len(order)]:
            times[name].append(seconds_of(heads[name], rows, labels))
    base = times[BASE]
    config = asdict(size) | {
        "dtype": "float32",
        "device": device.type,
        "torch": torch.__version__,
    }
    found = []
    for name in heads:
        values = times.get(name, [first[name]])
        quarters = statistics.quantiles(values, n=4) if len(values) > 1 else None
        paired = base if len(values) > 1 else [statistics.median(base)]
        ratios = [value / other for value, other in zip(values, paired, strict=True)]
        found.append(
            {
                "name": "head",
                "variant": name,
                "config": config | {"repeats": len(values)},
                "seconds_median": statistics.median(values),
                "seconds_spread": quarters[2] - quarters[0] if quarters else None,
                "seconds_ratio": statistics.median(ratios),
                "extra_bytes": memory[name],
                "error": errors[name],
                "machine": machine(device),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
    return found


def fits(size: Size, device: torch.device) -> bool:
    """Whether weights, gradients and states of all variants and float64 copies of one fit a GPU."""
    if device.type != "cuda":
        return True
    weights = (3 * len(VARIANTS) + 4) * size.num_classes * size.embedding_dim
    logits = 4 * size.rows * size.num_classes
    return 4 * (weights + logits) < torch.cuda.mem_get_info(device)[0]


def machine(device: torch.device) -> str:
    """Processor and threads, and the GPU where one is used."""
    text = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        text += f", {torch.cuda.get_device_name(device)}"
    return text


def table(found: Sequence[dict[str, Any]]) -> str:
    """One comparison as a Markdown table."""
    config = found[0]["config"]
    lines = [
        f"C={config['num_classes']:,} D={config['embedding_dim']} R={config['rows']} "
        f"{config['device']}, {config['repeats']} repetitions, {found[0]['machine']}",
        "",
        "| variant | ms (spread) | time ratio | extra MiB | error |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in found:
        extra = "-" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:.0f}"
        spread = row["seconds_spread"]
        spread = "once" if spread is None else f"{spread * 1e3:.1f}"
        lines.append(
            f"| {row['variant']} | {row['seconds_median'] * 1e3:.1f} ({spread}) "
            f"| {row['seconds_ratio']:.2f} | {extra} | {row['error']:.1e} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the rows as JSON")
    parser.add_argument("--quick", action="store_true", help="one small size, under a minute")
    parser.add_argument("--repeats", type=int, default=7, help="repetitions (default 7)")
    parser.add_argument("--memory-of", nargs=2, metavar=("VARIANT", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.repeats < 2:
        parser.error(f"--repeats={arguments.repeats}: a spread needs 2 or more")
    if arguments.memory_of:
        variant, text = arguments.memory_of
        size, device = Size(**json.loads(text)), torch.device("cpu")
        print(json.dumps(extra_bytes(VARIANTS[variant](size, device), *batch(size, device))))
        return 0
    comparisons = [(size, torch.device("cpu")) for size in (QUICK if arguments.quick else CPU)]
    if torch.cuda.is_available():
        gpu = torch.device("cuda", 0)
        comparisons += [(size, gpu) for size in (QUICK if arguments.quick else GPU)]
    found: list[dict[str, Any]] = []
    for size, device in comparisons:
        if not fits(size, device):
            print(f"{size} left out: too little free memory on the GPU\n")
            continue
        found += (rows := compare(size, device, arguments.repeats))
        print(table(rows), end="\n\n", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
