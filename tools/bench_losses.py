"""Time, memory and error of every class-parallel loss, as ratios to cross-entropy in one run.

One worker, float32 (and bfloat16 tiles), forward, backward and SGD step at one size. All losses
share one set of class weights and are measured in turns; losses with K centres see C / K classes of
K centres, which is the same number of weights and logits. Memory is measured in a process of its
own, error against float64 on a few rows.

    python tools/bench_losses.py                     C = 10^6, D = 128, 128 rows; about 10 minutes
    python tools/bench_losses.py --quick             C = 50,000
    python tools/bench_losses.py --only cross l1     names that contain one of these
    python tools/bench_losses.py --json losses.json
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from bench_head_measure import status_bytes
from bench_head_report import machine, machine_line
from torch import Tensor, nn

from dist_dml.class_config import ClassesConfig
from dist_dml.config import OptimizerConfig
from dist_dml.loss_config import LossConfig
from dist_dml.losses.objectives import build_objective
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.classifier import ClassParallelClassifier

OPTIMIZER = OptimizerConfig(name="sgd", learning_rate=1e-6, weight_decay=0.0)
BASE = "cross-entropy"
VARIANTS: dict[str, dict[str, Any]] = {
    BASE: {},
    "cross-entropy, smoothed": {"label_smoothing": 0.1},
    "cross-entropy, bf16 tiles": {"tile_dtype": "bfloat16"},
    "L1, power sums": {"name": "l1", "sums": "powers"},
    "L1, second sweep": {"name": "l1", "sums": "sweep"},
    "L1, bf16 tiles": {"name": "l1", "tile_dtype": "bfloat16"},
    "L2 p=0.99, power sums": {"name": "l2", "p": 0.99, "sums": "powers"},
    "L2 p=0.99, second sweep": {"name": "l2", "p": 0.99, "sums": "sweep"},
    "L2 p=0.5, second sweep": {"name": "l2", "p": 0.5, "sums": "sweep"},
    "L2 p=0.5, bf16 tiles": {"name": "l2", "p": 0.5, "tile_dtype": "bfloat16"},
    "binary cross-entropy": {"name": "binary_cross_entropy"},
    "balanced softmax": {"name": "balanced_softmax"},
    "normalised softmax": {"name": "normalised_softmax", "scale": 16.0},
    "CosFace": {"name": "cosface"},
    "ArcFace": {"name": "arcface"},
    "dynamic ArcFace": {"name": "dynamic_arcface"},
    "AdaFace": {"name": "adaface"},
    "sub-centre ArcFace, K=2": {"name": "sub_centre_arcface", "centres": 2},
    "ProxyNCA++": {"name": "proxy_nca"},
    "Proxy-Anchor": {"name": "proxy_anchor"},
    "SoftTriple, K=2": {"name": "soft_triple", "centres": 2},
}
_ERROR_ROWS = 8


def config_of(variant: str, tile_mebibytes: float) -> LossConfig:
    """The loss section of a variant."""
    return LossConfig(tile_mebibytes=tile_mebibytes, init_std=0.2, **VARIANTS[variant])


def shared_head(
    arguments: argparse.Namespace, dtype: torch.dtype = torch.float32
) -> ClassParallelClassifier:
    """Cross-entropy's classifier, whose weights all others use."""
    partition = ClassPartition.of_worker(0, 1, arguments.classes)
    config = config_of(BASE, arguments.tile_mebibytes)
    return ClassParallelClassifier(
        arguments.dim,
        partition,
        config,
        OPTIMIZER,
        0,
        arguments.rows,
        arguments.device,
        dtype,
        classes=ClassesConfig(backend="torch"),  # Like with like: kernels know some losses only.
    )


def with_loss(
    head: ClassParallelClassifier, variant: str, arguments: argparse.Namespace
) -> ClassParallelClassifier:
    """Another loss over the same weights, gradient and momentum."""
    config = config_of(variant, arguments.tile_mebibytes)
    num_classes = arguments.classes // config.num_centres
    counts = 1 + torch.arange(num_classes, device=arguments.device) % 50
    other = copy.copy(head)
    other._parameters, other._buffers = dict(head._parameters), {}
    other.config = config
    other.partition = ClassPartition.of_worker(0, 1, num_classes)
    other.objective = build_objective(
        config, num_classes, slice(0, num_classes), counts, head.weight.dtype
    )
    other.tile_dtype = {"float32": None, "bfloat16": torch.bfloat16}[config.tile_dtype]
    if other.objective.bias is None:
        other.bias = None
    if config.num_centres > 1:
        shape = (num_classes, config.num_centres, arguments.dim)
        assert head.weight.grad is not None
        weight = nn.Parameter(head.weight.detach().view(shape))
        weight.grad = head.weight.grad.view(shape)
        other.weight = weight
    if other.objective.adaptive:
        other.norm_mean = head.weight.new_tensor(20.0)
        other.norm_deviation = head.weight.new_tensor(100.0)
    return other


def batch(arguments: argparse.Namespace, num_classes: int) -> tuple[Tensor, Tensor]:
    """Random rows and labels."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(arguments.rows, arguments.dim, generator=generator)
    labels = torch.randint(0, num_classes, (arguments.rows,), generator=generator)
    return rows.to(arguments.device), labels.to(arguments.device)


def step(head: ClassParallelClassifier, owner: ClassParallelClassifier, data: Any) -> None:
    """Forward, backward, update of the shared weights."""
    rows, labels = data
    output = head(rows.detach().requires_grad_(), labels, (len(rows),), len(rows))
    output.loss.backward()
    head._gradient_is_stale = True
    owner.step(1.0)


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that its work is timed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(head: Any, owner: Any, data: Any, device: torch.device) -> float:
    """Time of one step."""
    synchronise(device)
    started = time.perf_counter()
    step(head, owner, data)
    synchronise(device)
    return time.perf_counter() - started


def extra_bytes(arguments: argparse.Namespace, variant: str) -> int:
    """Peak of a step beyond weights, gradient and state, in this process."""
    owner = shared_head(arguments)
    step(owner, owner, tuple(part[:1] for part in batch(arguments, arguments.classes)))
    head = with_loss(owner, variant, arguments)
    data = batch(arguments, head.partition.num_classes)
    if arguments.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(arguments.device)
        before = torch.cuda.memory_allocated(arguments.device)
        step(head, owner, data)
        return torch.cuda.max_memory_allocated(arguments.device) - before
    Path("/proc/self/clear_refs").write_text("5")  # The high-water mark starts anew.
    before = status_bytes("VmRSS")
    step(head, owner, data)
    return status_bytes("VmHWM") - before


def memory_in_own_process(arguments: argparse.Namespace, variant: str) -> int | None:
    """`extra_bytes` of a process that has done nothing else."""
    if arguments.device.type != "cuda" and not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, __file__, "--memory-of", variant]
    for key in ("classes", "dim", "rows", "tile_mebibytes", "device"):
        command += [f"--{key.replace('_', '-')}", str(getattr(arguments, key))]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def errors(arguments: argparse.Namespace, variants: Sequence[str]) -> dict[str, float]:
    """Largest relative error of loss and gradients on a few rows, against float64."""
    single, exact = shared_head(arguments), shared_head(arguments, torch.float64)
    with torch.no_grad():
        exact.weight.copy_(single.weight)
    found = {}
    for variant in variants:
        results = []
        for owner in (single, exact):
            plain = copy.copy(owner)
            if plain.weight.grad is None:
                owner.weight.grad = torch.empty_like(owner.weight)
            head = with_loss(owner, variant, arguments)
            rows, labels = batch(arguments, head.partition.num_classes)
            rows, labels = rows[:_ERROR_ROWS].to(owner.weight.dtype), labels[:_ERROR_ROWS]
            if owner is exact:
                head.tile_dtype = None
            leaf = rows.requires_grad_()
            head._gradient_is_stale = True
            loss = head(leaf, labels, (len(rows),), len(rows)).loss
            loss.backward()
            assert leaf.grad is not None
            assert head.weight.grad is not None
            results.append((loss.detach(), leaf.grad, head.weight.grad))
        worst = 0.0
        for got, want in zip(*results, strict=True):
            difference = (got.double() - want).abs().max() / want.abs().max()
            worst = max(worst, difference.item())
        found[variant] = worst
    return found


def compare(arguments: argparse.Namespace, variants: Sequence[str]) -> list[dict[str, Any]]:
    """One row a variant, all measured in turns."""
    memory = {name: memory_in_own_process(arguments, name) for name in variants}
    error = errors(arguments, variants)
    owner = shared_head(arguments)
    data = batch(arguments, arguments.classes)
    step(owner, owner, data)
    heads = {name: with_loss(owner, name, arguments) for name in variants}
    rows, labels = data
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repetition in range(arguments.repeats + 1):
        first = repetition % len(variants)
        for name in (*variants[first:], *variants[:first]):
            own = (rows, labels % heads[name].partition.num_classes)
            seconds = seconds_of(heads[name], owner, own, arguments.device)
            if repetition:  # The first round warms up.
                times[name].append(seconds)
        print(f"round {repetition} of {arguments.repeats}", file=sys.stderr, flush=True)
    found = []
    for name in variants:
        quarters = statistics.quantiles(times[name], n=4)
        ratios = [a / b for a, b in zip(times[name], times[BASE], strict=True)]
        found.append(
            {
                "name": "losses",
                "variant": name,
                "config": {
                    "num_classes": arguments.classes,
                    "embedding_dim": arguments.dim,
                    "rows": arguments.rows,
                    "tile_mebibytes": arguments.tile_mebibytes,
                    "torch": torch.__version__,
                    "repeats": arguments.repeats,
                },
                "seconds_median": statistics.median(times[name]),
                "seconds_spread": quarters[2] - quarters[0],
                "seconds_ratio": statistics.median(ratios),
                "extra_bytes": memory[name],
                "error": error[name],
                "machine": machine_line(machine(arguments.device)),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """The comparison as a Markdown table."""
    config = found[0]["config"]
    lines = [
        f"C={config['num_classes']:,} D={config['embedding_dim']} R={config['rows']}, tiles of "
        f"{config['tile_mebibytes']:g} MiB, {config['repeats']} repetitions, {found[0]['machine']}",
        "",
        "| loss | ms a step (spread) | time ratio | extra MiB | memory ratio | error |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    base = found[0]["extra_bytes"]
    for row in found:
        extra, share = "-", "-"
        if row["extra_bytes"] is not None:
            extra, share = f"{row['extra_bytes'] / 2**20:.0f}", f"{row['extra_bytes'] / base:.2f}"
        lines.append(
            f"| {row['variant']} | {row['seconds_median'] * 1e3:.0f} "
            f"({row['seconds_spread'] * 1e3:.0f}) | {row['seconds_ratio']:.2f} | {extra} | {share} "
            f"| {row['error']:.1e} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=1_000_000, help="C (default 10^6)")
    parser.add_argument("--dim", type=int, default=128, help="D (default 128)")
    parser.add_argument("--rows", type=int, default=128, help="R (default 128)")
    parser.add_argument("--tile-mebibytes", type=float, default=32.0, help="default 32")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="variants containing these")
    parser.add_argument("--quick", action="store_true", help="C = 50,000")
    parser.add_argument("--device", type=torch.device, default=None, help="cuda where there is one")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the rows as JSON")
    parser.add_argument("--memory-of", metavar="VARIANT", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.repeats < 2:
        parser.error(f"--repeats={arguments.repeats}: a spread needs 2 or more")
    if arguments.quick:
        arguments.classes = 50_000
    if arguments.device is None:
        arguments.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.memory_of:
        print(json.dumps(extra_bytes(arguments, arguments.memory_of)))
        return 0
    wanted = arguments.only or [""]
    chosen = [name for name in VARIANTS if any(text.lower() in name.lower() for text in wanted)]
    variants = [BASE, *(name for name in chosen if name != BASE)]
    found = compare(arguments, variants)
    print(table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
