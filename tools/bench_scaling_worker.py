"""Workers of `bench_scaling`: processes that meet over gloo and do a step at every word.

While they wait they sleep, so that crews of different sizes can take turns. They end with their
standard input.

Dimensions: W workers, C classes, D features, R rows of the whole batch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_head_variants import draw_weights_
from bench_scaling_links import CountedLinks, socket_bytes
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from dist_dml.config import Config
from dist_dml.config_loading import resolve
from dist_dml.data.batch_making import Batch
from dist_dml.engine import Engine, build_engine
from dist_dml.errors import RunError
from dist_dml.models.embedder import build_embedder
from dist_dml.parallel.class_partition import ClassPartition, part_bounds
from dist_dml.parallel.classifier import ClassParallelClassifier
from dist_dml.parallel.world import Ranks, World
from dist_dml.train import train_step
from dist_dml.training_diagnosis import TrainingDiagnosis

TIMEOUT_SECONDS = 120.0
_STOP_SECONDS = 10.0
_TURN_SECONDS, _TURN_STEPS = 0.15, 20
# Steps over which the sockets are read, as they also carry what ends a step.
_COUNTED_STEPS = 4


@dataclass(frozen=True)
class Size:
    """The work of one point, over all workers.

    Attributes:
        num_workers: W.
        num_classes: C.
        rows: R.
        dim: D.
        threads: of a worker.
        image: pixels of a side.
    """

    num_workers: int
    num_classes: int
    rows: int
    dim: int
    threads: int
    image: int

    @property
    def row_counts(self) -> tuple[int, ...]:
        """Rows of every worker."""
        bounds = [
            part_bounds(rank, self.num_workers, self.rows) for rank in range(self.num_workers)
        ]
        return tuple(stop - start for start, stop in bounds)


def config_of(size: Size) -> Config:
    """The configuration whose step is timed: cross-entropy, SGD with momentum, small network."""
    image = f"{{size: {size.image}, channels: 1, resize: 0, mean: [0.5], std: [0.25]}}"
    overrides = [
        f"data.num_classes={size.num_classes}",
        f"data.batch_size={size.rows}",
        f"data.image={image}",
        f"model.embedding_dim={size.dim}",
        "model.norm=batch",
        "loss.bias=false",
        "loss.tile_mebibytes=32",
        "optimizer.name=sgd",
        "optimizer.learning_rate=1e-3",
        "engine.device=cpu",
        f"engine.threads={size.threads}",
    ]
    return resolve(None, overrides).config


class Crew:
    """The workers of one point.

    A context: the processes live inside it, and are ended with it.

    Args:
        size: of the point.
    """

    def __init__(self, size: Size) -> None:
        self.size = size
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Crew:
        self._folder = tempfile.TemporaryDirectory()
        try:
            for rank in range(self.size.num_workers):
                self._processes.append(self._start(rank))
            self.links = self._answers()
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

    def turn(self) -> dict[str, float]:
        """Seconds of a step of the slowest worker: `head` alone and `whole`, and the processor time
        of both, which waiting and other programs are no part of: `head_cpu`, `whole_cpu`."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("turn\n")
            process.stdin.flush()
        answers = self._answers()
        return {name: max(answer[name] for answer in answers) for name in answers[0]}

    def _start(self, rank: int) -> subprocess.Popen[str]:
        request = asdict(self.size) | {"rank": rank, "store": f"{self._folder.name}/store"}
        environment = os.environ | {"OMP_NUM_THREADS": str(self.size.threads)}
        if sys.platform == "linux":
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        tool = str(Path(__file__).with_name("bench_scaling.py"))
        return subprocess.Popen(
            [sys.executable, tool, "--child", json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def _answers(self) -> list[dict[str, Any]]:
        found = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RunError(f"a worker ended with status {process.wait()}; see above")
            found.append(json.loads(line))
        return found


class Worker:
    """One worker: its rows, its classes, its copy of the embedder.

    Args:
        size: of the point.
        rank: of the worker.
        group: the workers; None for one.
    """

    def __init__(self, size: Size, rank: int, group: dist.ProcessGroup | None) -> None:
        self.size, self.num_workers = size, size.num_workers
        config = config_of(size)
        ranks = Ranks(rank, size.num_workers, rank, size.num_workers)
        world = World(ranks, torch.device("cpu"), group, None)
        embedder = build_embedder(config.model, config.data.image, 0, group)
        self.engine: Engine = build_engine(config, embedder, world)
        self.engine.embedder.train()
        partition = ClassPartition.of_worker(rank, size.num_workers, size.num_classes, group)
        blank = config.loss.model_copy(update={"init_std": 0.0})
        self.head = ClassParallelClassifier(
            size.dim, partition, blank, config.optimizer, 0, size.rows, classes=config.classes
        )
        draw_weights_(self.head.weight.detach())
        self._diagnosis = TrainingDiagnosis(self.head, world, -100, enabled=False)
        self._batch = draw_batch(size, rank)
        generator = torch.Generator().manual_seed(rank)
        self._rows = torch.randn(len(self._batch.labels), size.dim, generator=generator)

    def whole(self) -> None:
        """One training step, the loop's own."""
        train_step(
            self._batch, self.engine, self.head, self.size.rows, 1.0, True, 0, self._diagnosis
        )

    def head_alone(self) -> None:
        """The same without the embedder."""
        rows: Tensor = self._rows.detach().requires_grad_()
        counts = self._batch.row_counts
        output = self.head(rows, self._batch.labels, counts, self.size.rows, factor=1.0, last=True)
        output.loss.backward()
        self.head.step_done()

    def together(self) -> None:
        """Wait for the others."""
        if self.num_workers > 1:
            dist.barrier()

    def links(self, step: Callable[[], None]) -> dict[str, Any]:
        """Bytes that a step brings to this worker, by both counts."""
        if self.num_workers == 1:
            return {"received": {}, "socket": 0.0}
        with CountedLinks(self.num_workers) as counter:
            step()
        self.together()
        before = socket_bytes()
        for _ in range(_COUNTED_STEPS):
            step()
        after = socket_bytes()  # Before the barrier: its messages are no step's.
        self.together()
        arrived = None if before is None or after is None else (after - before) / _COUNTED_STEPS
        return {"received": counter.received, "socket": arrived}

    def seconds(self, step: Callable[[], None], count: int) -> tuple[float, float]:
        """Mean of some steps that all workers begin together: on the wall, of the processor."""
        self.together()
        started, began = time.perf_counter(), time.process_time()
        for _ in range(count):
            step()
        used = (time.process_time() - began) / count
        return (time.perf_counter() - started) / count, used


def draw_batch(size: Size, rank: int) -> Batch:
    """This worker's rows: random images and labels."""
    counts = size.row_counts
    rows, first = counts[rank], sum(counts[:rank])
    generator = torch.Generator().manual_seed(2**20 + rank)
    shape = (rows, 1, size.image, size.image)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    positions = torch.arange(first, first + rows)
    return Batch(
        images.contiguous(memory_format=torch.channels_last),
        torch.zeros(rows, dtype=torch.bool),
        torch.randint(0, size.num_classes, (rows,), generator=generator),
        positions,
        positions,
        torch.ones(rows, dtype=torch.bool),
        counts,
        0,
        0,
    )


def work(request: dict[str, Any]) -> int:
    """A worker's life: meet, warm up, count, then a turn for every line of standard input."""
    rank, store = request.pop("rank"), request.pop("store")
    size = Size(**request)
    torch.set_num_threads(size.threads)
    group = None
    if size.num_workers > 1:
        meeting = FileStore(store, size.num_workers)
        patience = timedelta(seconds=TIMEOUT_SECONDS)
        dist.init_process_group(
            "gloo", store=meeting, rank=rank, world_size=size.num_workers, timeout=patience
        )
        group = dist.group.WORLD
    worker = Worker(size, rank, group)
    for _ in range(2):
        worker.whole()
        worker.head_alone()
    counted = {"head": worker.links(worker.head_alone), "whole": worker.links(worker.whole)}
    first, _ = worker.seconds(worker.whole, 2)
    count = max(1, min(_TURN_STEPS, int(_TURN_SECONDS / first)))
    if group is not None:  # All do as many steps as the one that does most.
        agreed = torch.tensor([count])
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        count = int(agreed)
    print(json.dumps(counted), flush=True)
    while sys.stdin.readline():
        head, head_cpu = worker.seconds(worker.head_alone, count)
        whole, whole_cpu = worker.seconds(worker.whole, count)
        answer = {"head": head, "whole": whole, "head_cpu": head_cpu, "whole_cpu": whole_cpu}
        print(json.dumps(answer), flush=True)
    if group is not None:
        dist.destroy_process_group()
    return 0
