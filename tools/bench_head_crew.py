"""Workers of `bench_head` that wait for the word and do a step together.

Each is a process of its own with its own number of threads; they meet over gloo on the loopback.
While they wait they sleep, so that one crew and another can take turns. They end when their
standard input does, which is also when this process dies in whatever way.

Dimensions: R rows, C classes, D features.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_head_variants import (
    Size,
    batch,
    build_classifier,
    draw_weights_,
    every_variant,
    project_step,
)
from torch._C._distributed_c10d import FileStore

from dist_dml.errors import RunError
from dist_dml.parallel.class_partition import ClassPartition, part_bounds

# Of a collective and of the meeting: a worker whose partner is gone ends after this.
TIMEOUT_SECONDS = 120.0
_STOP_SECONDS = 10.0


class Crew:
    """`num_workers` processes of `threads` threads, each with its share of the classes and rows.

    A context: the processes live inside it, and are ended with it.
    """

    def __init__(self, num_workers: int, threads: int, name: str, size: Size) -> None:
        self.num_workers, self.threads = num_workers, threads
        self._request = {"task": "worker", "name": name, "size": asdict(size), "threads": threads}
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Crew:
        self._folder = tempfile.TemporaryDirectory()
        try:
            for rank in range(self.num_workers):
                self._processes.append(self._start(rank))
            for process in self._processes:
                _answer(process)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
        self._folder.cleanup()

    def step(self) -> float:
        """Seconds of a step of all workers, the slowest one's."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("step\n")
            process.stdin.flush()
        return max(float(_answer(process)) for process in self._processes)

    def _start(self, rank: int) -> subprocess.Popen[str]:
        store = str(Path(self._folder.name) / "store")
        request = self._request | {"rank": rank, "workers": self.num_workers, "store": store}
        tool = Path(__file__).with_name("bench_head.py")
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        if sys.platform == "linux":
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        return subprocess.Popen(
            [sys.executable, str(tool), "--child", json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )


def _answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RunError(f"a worker of bench_head ended with status {process.wait()}; see above")
    return line


def work(request: dict[str, Any]) -> None:
    """A worker's life: meet, warm up, then a step for every line of standard input."""
    rank, num_workers = request["rank"], request["workers"]
    torch.set_num_threads(request["threads"])
    group = None
    if num_workers > 1:
        store = FileStore(request["store"], num_workers)
        timeout = timedelta(seconds=TIMEOUT_SECONDS)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=num_workers, timeout=timeout
        )
        group = dist.group.WORLD
    size, device = Size(**request["size"]), torch.device("cpu")
    partition = ClassPartition.of_worker(rank, num_workers, size.num_classes, group)
    classifier = build_classifier(every_variant()[request["name"]], size, partition, device)
    draw_weights_(classifier.weight.detach())
    bounds = [part_bounds(other, num_workers, size.rows) for other in range(num_workers)]
    counts = tuple(stop - start for start, stop in bounds)
    rows, labels = (whole[slice(*bounds[rank])] for whole in batch(size, device))

    def step() -> float:
        if num_workers > 1:
            dist.barrier()
        started = time.perf_counter()
        project_step(classifier, rows.detach().requires_grad_(), labels, counts)
        return time.perf_counter() - started

    for _ in range(2):
        step()
    print("ready", flush=True)
    while sys.stdin.readline():
        print(step(), flush=True)
    if num_workers > 1:
        dist.destroy_process_group()
