"""Time and memory of every loss of pairs over a large batch, shared by workers on the loopback.

Forward and backward of `PairHead` on rows that all workers hold a part of: seconds of the slowest
worker, and the most that a worker's resident set grows beyond its rows, labels and their gradient.
The goal of the project: 16,384 rows of 512 features on two workers within 2 GiB.

    python tools/bench_pairs.py                      16,384 x 512, 2 workers; about 6 minutes
    python tools/bench_pairs.py --quick              1,024 x 64
    python tools/bench_pairs.py --only c2 triplet    losses whose name contains one of these
    python tools/bench_pairs.py --json pairs.json

Dimensions: B rows of the batch, D features, W workers.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_head_measure import report_progress, status_bytes
from bench_head_report import machine, machine_line
from torch._C._distributed_c10d import FileStore

from dist_dml.loss_config import LossConfig
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.pair_head import PairHead

LOSSES: dict[str, dict[str, Any]] = {
    "contrastive": {"name": "contrastive"},
    "c1": {"name": "c1"},
    "c2": {"name": "c2"},
    "triplet, all": {"name": "triplet"},
    "triplet, semi-hard": {"name": "triplet", "mining": "semihard"},
    "triplet, batch hard": {"name": "triplet", "mining": "batch_hard"},
    "multi-similarity": {"name": "multi_similarity"},
    "multi-similarity, mined": {"name": "multi_similarity", "mining_epsilon": 0.1},
    "snca": {"name": "snca"},
    "fastap": {"name": "fastap"},
    "spce": {"name": "spce"},
    "center": {"name": "center"},
}
SAMPLES_PER_CLASS = 4
GOAL_BYTES = 2 * 2**30
_WAIT = timedelta(minutes=20)


def work(request: dict[str, Any]) -> None:
    """A worker's life: all losses in turns; prints a line of JSON for each step."""
    rank, workers, size, dim = (request[key] for key in ("rank", "workers", "rows", "dim"))
    torch.set_num_threads(request["threads"])
    group = None
    if workers > 1:
        store = FileStore(request["store"], workers)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=workers, timeout=_WAIT)
        group = dist.group.WORLD
    counts = tuple(size * (w + 1) // workers - size * w // workers for w in range(workers))
    partition = ClassPartition.of_worker(rank, workers, size // SAMPLES_PER_CLASS, group)
    generator = torch.Generator().manual_seed(rank)
    rows = torch.randn(counts[rank], dim, generator=generator).requires_grad_()
    rows.grad = torch.zeros_like(rows)
    labels = (torch.arange(counts[rank]) + sum(counts[:rank])) // SAMPLES_PER_CLASS
    for name in request["names"] * request["repeats"]:
        config = LossConfig(block_mebibytes=request["block"], **LOSSES[name])
        head = PairHead(config, dim, partition, size)
        if workers > 1:
            dist.barrier()
        _give_back()
        before = status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # The high-water mark starts anew.
        started = time.perf_counter()
        loss = head(rows, labels, counts, size, factor=1.0, last=True).loss
        loss.backward()
        seconds = time.perf_counter() - started
        extra = status_bytes("VmHWM") - before
        print(json.dumps({"name": name, "seconds": seconds, "bytes": extra}), flush=True)
    if workers > 1:
        dist.barrier()
        dist.destroy_process_group()


def _give_back() -> None:
    """What the C library keeps of earlier losses would hide what the next one needs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc has it.
        trim(0)


def run_workers(request: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Seconds and bytes of each repetition by loss: the slowest worker's, the largest worker's."""
    found: dict[str, dict[str, list[float]]] = {}
    environment = os.environ | {"OMP_NUM_THREADS": str(request["threads"])}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [
                    *(sys.executable, __file__, "--child"),
                    json.dumps(request | {"rank": rank, "store": f"{folder}/store"}),
                ],
                stdout=subprocess.PIPE,
                env=environment,
                text=True,
            )
            for rank in range(request["workers"])
        ]
        total, started = len(request["names"]) * request["repeats"], time.monotonic()
        try:
            for done in range(1, total + 1):
                answers = []
                for process in processes:
                    assert process.stdout is not None
                    line = process.stdout.readline()
                    if not line:
                        sys.exit(f"bench_pairs: a worker ended with status {process.wait()}")
                    answers.append(json.loads(line))
                numbers = found.setdefault(answers[0]["name"], {"seconds": [], "bytes": []})
                for key in numbers:
                    numbers[key].append(max(answer[key] for answer in answers))
                left = (time.monotonic() - started) / done * (total - done)
                report_progress(f"{done}/{total} {answers[0]['name']}, {left:.0f} s left")
        finally:
            for process in processes:
                process.kill() if process.poll() is None and sys.exc_info()[0] else None
                process.wait()
    return found


def report(found: dict[str, dict[str, list[float]]], request: dict[str, Any]) -> list[str]:
    """The table in Markdown, and the verdict on the memory."""
    lines = [
        f"B={request['rows']:,} D={request['dim']}, {request['workers']} workers of "
        f"{request['threads']} thread(s), float32, blocks of {request['block']:g} MiB",
        "",
        "| loss | s, forward and backward (smallest to largest) | MiB beyond rows and gradient |",
        "|---|---:|---:|",
    ]
    largest = 0.0
    for name, numbers in found.items():
        seconds, extra = numbers["seconds"], max(numbers["bytes"])
        largest = max(largest, extra)
        lines.append(
            f"| {name} | {statistics.median(seconds):.2f} ({min(seconds):.2f} to "
            f"{max(seconds):.2f}) | {extra / 2**20:,.0f} |"
        )
    verdict = "yes" if largest <= GOAL_BYTES else "NO "
    lines += ["", f"{verdict} {largest / 2**30:.2f} GiB at most, asked <= 2 GiB"]
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="1,024 rows of 64 features")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="losses containing these")
    parser.add_argument("--rows", type=int, default=16_384, help="B")
    parser.add_argument("--dim", type=int, default=512, help="D")
    parser.add_argument("--workers", type=int, default=2, help="W")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--block", type=float, default=256.0, help="loss.block_mebibytes")
    parser.add_argument("--json", metavar="FILE", help="also write everything as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        work(json.loads(arguments.child))
        return 0
    if not Path("/proc/self/clear_refs").exists():
        parser.error("memory is read from Linux's /proc/self")
    names = [n for n in LOSSES if not arguments.only or any(t in n for t in arguments.only)]
    if not names:
        parser.error(f"--only {' '.join(arguments.only)} matches none of {', '.join(LOSSES)}")
    small = arguments.quick
    request = {
        "rows": 1024 if small else arguments.rows,
        "dim": 64 if small else arguments.dim,
        "workers": arguments.workers,
        "threads": max(1, (os.cpu_count() or 1) // arguments.workers),
        "repeats": arguments.repeats,
        "block": arguments.block,
        "names": names,
    }
    facts = machine(torch.device("cpu"))
    found = run_workers(request)
    print("\n".join([machine_line(facts), *report(found, request)]))
    if arguments.json:
        text = json.dumps({"machine": facts, "request": request, "found": found}, indent=1)
        Path(arguments.json).write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
