"""Exact neighbours and their scores: time and memory against the library of the field.

Part `scores`: embeddings of the size of Stanford Online Products' test set (60,502 x 512, 11,316
classes), precision@1, R-precision and MAP@R, each image against all others. Ours by every backend,
and pytorch-metric-learning's AccuracyCalculator; each in a process of its own, in turns. Memory is
the most that the process grows beyond vectors and labels. All of ours must give the same scores to
the bit; theirs are compared to 1e-4 (they rank by float32 distances).
Part `identical`: neighbours by bfloat16 candidates against those by float32 ones and by torch's.
Part `sharded`: 20,000 queries in a gallery of 1,000,000 x 128 that two workers share.

    python tools/bench_search.py                     all; about 6 minutes on 2 cores
    python tools/bench_search.py --quick             small sizes, to see that it works
    python tools/bench_search.py --parts sharded
    python tools/bench_search.py --json search.json

Dimensions: n embeddings of width D, W workers.
"""

from __future__ import annotations

import argparse
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

import numpy as np
import torch
import torch.distributed as dist
from bench_head_measure import report_progress, status_bytes
from bench_head_report import machine, machine_line
from torch._C._distributed_c10d import FileStore

from dist_dml.retrieval.distances import DISTANCES
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.gallery_search import SearchSettings
from dist_dml.retrieval.metrics import summarise
from dist_dml.retrieval.native_neighbours import NativeSearch, fast_operand, native_library
from dist_dml.retrieval.protocol import score_slice
from dist_dml.retrieval.ranking import nearest
from dist_dml.retrieval.sharded_gallery import sharded_blocks

COSINE = DISTANCES["cosine"]
METHODS = ("ours", "ours, torch", "ours, FAISS", "AccuracyCalculator", "bfloat16 product alone")
NAMES = {
    "precision_at_1": "precision_at_1",
    "r_precision": "r_precision",
    "map_at_r": "mean_average_precision_at_r",
}
GOAL_BYTES = 1.5 * 2**30
GOAL_SPEED = 4.0
_WAIT = timedelta(minutes=30)


def embeddings(size: int, width: int, classes: int, seed: int = 0) -> Embeddings:
    """Unit vectors around class centres, as loosely as a fair network's: P@1 of about 0.8."""
    draw = np.random.default_rng(seed)
    labels = np.sort(draw.integers(0, classes, size)).astype(np.int64)
    vectors = draw.standard_normal((size, width), dtype=np.float32)
    centres = draw.standard_normal((classes, width), dtype=np.float32)
    vectors += 0.55 * centres[labels]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Embeddings(vectors, labels, np.arange(size, dtype=np.int64))


def score(request: dict[str, Any]) -> dict[str, Any]:
    """One method, in this process."""
    torch.set_num_threads(request["threads"])
    samples = embeddings(request["size"], request["width"], request["classes"])
    method = request["method"]
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    calculator = AccuracyCalculator(include=tuple(NAMES.values()), k="max_bin_count")
    native_library()  # Compiled once a machine; not a part of any search.
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # Threads are there from now on.
    Path("/proc/self/clear_refs").write_text("5")  # The high-water mark starts anew.
    before, started = status_bytes("VmRSS"), time.perf_counter()
    scores: dict[str, float] = {}
    if method == "AccuracyCalculator":
        vectors, labels = torch.from_numpy(samples.vectors), torch.from_numpy(samples.labels)
        found = calculator.get_accuracy(vectors, labels)
        scores = {name: float(found[theirs]) for name, theirs in NAMES.items()}
    elif method == "bfloat16 product alone":
        half = torch.from_numpy(samples.vectors).bfloat16()
        for block in half.split(2048):
            torch.mm(block, half.T)
    else:
        backend = {"ours, torch": "torch", "ours, FAISS": "faiss"}.get(method, "auto")
        settings = SearchSettings(backend)
        every = score_slice(samples, None, slice(0, len(samples)), COSINE, (1,), settings)
        summary = summarise(every)
        scores = {name: summary[name] for name in NAMES}
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "bytes": status_bytes("VmHWM") - before, "scores": scores}


def identical(request: dict[str, Any]) -> dict[str, Any]:
    """Whether candidates of bfloat16, of float32 and of torch lead to the same neighbours."""
    torch.set_num_threads(request["threads"])
    samples = embeddings(request["size"], request["width"], request["classes"])
    vectors, ids, k = COSINE.prepare(samples.vectors), samples.ids, 16
    library = native_library()
    if isinstance(library, str):
        sys.exit(f"bench_search: {library}")
    answers = {}
    for operand in dict.fromkeys((fast_operand(), "float32")):
        search = NativeSearch(library, vectors, ids, False, 2**29, operand)
        answers[operand] = search.nearest(vectors, ids, k)
    answers["torch"] = nearest(samples, samples, k, COSINE, SearchSettings("torch"))
    first, *others = answers.values()
    same = all(np.array_equal(first[0], other[0]) for other in others)
    return {"same": same, "by": list(answers), "neighbours": int(first[0].size)}


def sharded(request: dict[str, Any]) -> dict[str, Any]:
    """A worker's life: its part of the gallery, its part of the queries."""
    rank, workers = request["rank"], request["workers"]
    torch.set_num_threads(request["threads"])
    store = FileStore(request["store"], workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=workers, timeout=_WAIT)
    own = request["gallery"] // workers
    gallery = embeddings(own, request["gallery_width"], own // 20, seed=rank)
    gallery = Embeddings(gallery.vectors, gallery.labels, gallery.ids + rank * own)
    draw = np.random.default_rng(100 + rank)
    asked = draw.integers(0, own, request["queries"] // workers)
    noise = draw.standard_normal((len(asked), request["gallery_width"]), dtype=np.float32)
    vectors = gallery.vectors[asked] + 0.02 * noise
    queries = Embeddings(vectors, gallery.labels[asked], np.arange(len(asked)) + 10**9)
    native_library()
    settings = SearchSettings(memory_bytes=request["memory"])
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")
    before, started = status_bytes("VmRSS"), time.perf_counter()
    right = 0
    for block in sharded_blocks(queries, gallery, 10, COSINE, dist.group.WORLD, settings):
        right += int((block.ids[:, 0] == gallery.ids[asked[block.rows]]).sum())
    seconds = time.perf_counter() - started
    extra = status_bytes("VmHWM") - before
    dist.barrier()
    dist.destroy_process_group()
    return {"seconds": seconds, "bytes": extra, "right": right, "queries": len(queries)}


def run_child(request: dict[str, Any], count: int = 1) -> list[dict[str, Any]]:
    """`count` processes of one kind, by rank; what each printed last."""
    environment = os.environ | {"OMP_NUM_THREADS": str(request["threads"])}
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(count):
            own = json.dumps(request | {"rank": rank, "store": f"{folder}/store"})
            command = [sys.executable, __file__, "--child", own]
            processes.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
            )
        try:
            printed = [process.communicate()[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for process in processes:
            if process.returncode:
                sys.exit(f"bench_search: a process ended with status {process.returncode}")
    return [json.loads(text.splitlines()[-1]) for text in printed]


def measure_scores(request: dict[str, Any], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """All methods in turns."""
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    started, total = time.monotonic(), repeats * len(METHODS)
    for done in range(total):
        method = METHODS[done % len(METHODS)]
        found[method] += run_child(request | {"kind": "score", "method": method})
        left = (time.monotonic() - started) / (done + 1) * (total - done - 1)
        report_progress(f"{done + 1}/{total} {method}, {left:.0f} s left")
    return found


def report_scores(found: dict[str, list[dict[str, Any]]], request: dict[str, Any]) -> list[str]:
    """The table in Markdown, and the verdicts."""
    lines = [
        f"n={request['size']:,} D={request['width']}, {request['classes']:,} classes, "
        f"{request['threads']} thread(s), cosine; P@1, R-precision, MAP@R",
        "",
        "| | s (smallest to largest) | ours is faster by | MiB beyond the inputs | MAP@R |",
        "|---|---:|---:|---:|---:|",
    ]
    ours = [one["seconds"] for one in found["ours"]]
    for method, runs in found.items():
        seconds = [run["seconds"] for run in runs]
        ratios = [theirs / mine for theirs, mine in zip(seconds, ours, strict=True)]
        extra = max(run["bytes"] for run in runs)
        value = runs[0]["scores"].get("map_at_r")
        lines.append(
            f"| {method} | {statistics.median(seconds):.2f} ({min(seconds):.2f} to "
            f"{max(seconds):.2f}) | {statistics.median(ratios):.2f} | {extra / 2**20:,.0f} | "
            f"{'' if value is None else f'{value:.6f}'} |"
        )
    theirs = found["AccuracyCalculator"]
    ratio = statistics.median(run["seconds"] / mine for run, mine in zip(theirs, ours, strict=True))
    extra = max(run["bytes"] for run in found["ours"])
    own = [run["scores"] for name in METHODS if name.startswith("ours") for run in found[name]]
    gap = max(abs(own[0][name] - theirs[0]["scores"][name]) for name in NAMES)
    verdict = {True: "yes", False: "NO "}
    return [
        *lines,
        "",
        f"{verdict[ratio >= GOAL_SPEED]} {ratio:.2f}x of AccuracyCalculator's speed, asked >= 4x",
        f"{verdict[extra < GOAL_BYTES]} {extra / 2**30:.2f} GiB beyond the inputs, asked < 1.5 GiB",
        f"{verdict[all(one == own[0] for one in own)]} all of ours give the same scores to the bit",
        f"{verdict[gap < 1e-4]} largest difference to AccuracyCalculator's scores: {gap:.1e}",
    ]


def report_sharded(answers: list[dict[str, Any]], request: dict[str, Any]) -> list[str]:
    """What the workers measured."""
    seconds = max(answer["seconds"] for answer in answers)
    extra = max(answer["bytes"] for answer in answers)
    right = sum(answer["right"] for answer in answers)
    queries = sum(answer["queries"] for answer in answers)
    verdict = "yes" if extra <= request["memory"] + 4 * request["vectors"] else "NO "
    return [
        "",
        f"{queries:,} queries, gallery {request['gallery']:,} x {request['gallery_width']}, "
        f"{request['workers']} workers, 10 neighbours: {seconds:.1f} s; {right / queries:.4f} of "
        "them find the image that they were made from first",
        f"{verdict} a worker grows by {extra / 2**20:,.0f} MiB at most: memory_bytes is "
        f"{request['memory'] / 2**20:,.0f} MiB, its unit vectors are another "
        f"{4 * request['vectors'] / 2**20:,.0f} MiB",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("scores", "identical", "sharded")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--quick", action="store_true", help="a fiftieth of the sizes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="also write everything as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        request = json.loads(arguments.child)
        work = {"score": score, "identical": identical, "sharded": sharded}[request["kind"]]
        print(json.dumps(work(request)))
        return 0
    if not Path("/proc/self/clear_refs").exists():
        parser.error("memory is read from Linux's /proc/self")
    small = 50 if arguments.quick else 1
    cores = len(os.sched_getaffinity(0))
    request = {
        "size": 60_502 // small,
        "width": 512,
        "classes": 11_316 // small,
        "threads": cores,
    }
    facts = machine(torch.device("cpu"))
    lines, everything = [machine_line(facts)], {"machine": facts, "request": request}
    if "scores" in arguments.parts:
        everything["scores"] = measure_scores(request, arguments.repeats)
        lines += report_scores(everything["scores"], request)
    if "identical" in arguments.parts:
        found = run_child(request | {"kind": "identical"})[0]
        everything["identical"] = found
        verdict = "yes" if found["same"] else "NO "
        lines += ["", f"{verdict} {found['neighbours']:,} neighbours by {found['by']} are the same"]
    if "sharded" in arguments.parts:
        many = {
            "kind": "sharded",
            "workers": 2,
            "threads": max(1, cores // 2),
            "gallery": 1_000_000 // small,
            "gallery_width": 128,
            "queries": 20_000 // small,
            "memory": 128 * 2**20,
            "vectors": 1_000_000 // small // 2 * 128,
        }
        everything["sharded"] = run_child(many, 2)
        lines += report_sharded(everything["sharded"], many)
    print("\n".join(lines))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(everything, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
