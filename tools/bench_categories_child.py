"""A process of `bench_categories`: one objective at one number of classes, fresh memory.

It answers once when its head stands, and once a turn. While it waits it sleeps, so that others can
take turns. It ends when its connection does, which is also when the benchmark dies.

Dimensions: C classes, D features, R rows of a batch.
"""

from __future__ import annotations

import ctypes
import platform
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from bench_categories_objectives import SAMPLES_PER_CLASS, step_config
from bench_head_measure import status_bytes
from bench_head_variants import draw_weights_
from torch import Tensor

from dist_dml.config import Config
from dist_dml.data.batch_making import Batch
from dist_dml.engine import Engine, build_engine
from dist_dml.losses.ccp_states import PoolDrawn
from dist_dml.models.embedder import build_embedder
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.classifier import ClassParallelClassifier
from dist_dml.parallel.heads import Head
from dist_dml.parallel.pair_head import PairHead
from dist_dml.parallel.proxy_head import ProxyHead
from dist_dml.parallel.world import Ranks, World
from dist_dml.train import train_step
from dist_dml.training_diagnosis import TrainingDiagnosis

# Short steps are repeated within a turn until it takes so long, so that clocks and noise do not
# decide; at most so often.
_TURN_SECONDS, _TURN_STEPS = 0.15, 20
_LONG_STEP_SECONDS = 2.0
_HIGH_WATER = Path("/proc/self/clear_refs")
# glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD.
_TRIM, _MMAP = -1, -3


@dataclass(frozen=True)
class Request:
    """What one process measures."""

    objective: str
    num_classes: int
    rows: int
    dim: int
    threads: int


def draw_batch(config: Config, num_classes: int) -> Batch:
    """Random images with labels as the objective's batches have them, P x K or independent."""
    rows, image = config.data.batch_size, config.data.image
    generator = torch.Generator().manual_seed(2**20)
    shape = (rows, image.channels, image.size, image.size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, num_classes, (rows,), generator=generator)
    if config.data.order == "balanced":
        groups = rows // SAMPLES_PER_CLASS
        classes = torch.randperm(min(num_classes, 2**20), generator=generator)[:groups]
        # Of fewer classes than groups some come again.
        classes = classes.repeat(-(-groups // len(classes)))[:groups]
        labels = classes.repeat_interleave(SAMPLES_PER_CLASS)
    positions = torch.arange(rows)
    return Batch(
        images.contiguous(memory_format=torch.channels_last),
        torch.zeros(rows, dtype=torch.bool),
        labels,
        positions,
        positions,
        torch.ones(rows, dtype=torch.bool),
        (rows,),
        0,
        0,
    )


def build_head(config: Config, num_classes: int, dim: int, world: World) -> Head:
    """The objective's head, as it is in the middle of a training: its memory full, its proxies
    chosen."""
    partition = ClassPartition.of_worker(world.rank, world.size, num_classes, world.group)
    rows = config.data.batch_size
    if config.proxies.per_class:
        proxies = ProxyHead(config.proxies, config.loss, config.optimizer, dim, partition, rows)
        _begin_problem(proxies)
        return proxies
    if config.loss.of_pairs:
        pairs = PairHead(config.loss, dim, partition, rows)
        if pairs.memory is not None:
            size = config.loss.memory_size
            vectors = torch.nn.functional.normalize(torch.randn(size, dim), dim=1)
            pairs.memory.push(vectors, torch.randint(0, num_classes, (size,)))
        return pairs
    # The classifier's own draws, by class id, take longer than the steps; nothing depends on them.
    blank = config.loss.model_copy(update={"init_std": 0.0})
    classifier = ClassParallelClassifier(
        dim, partition, blank, config.optimizer, 0, rows, classes=config.classes
    )
    draw_weights_(classifier.weight.detach())
    return classifier


def _begin_problem(head: ProxyHead) -> None:
    """Fill the bank, and choose the first proxies from it."""
    assert head.bank is not None, "proxies.pool=bank is the default"
    head.bank.rows.normal_()
    for _ in range(head.phases.plan.draws_at(0)):
        head.phases.advance(PoolDrawn())
    filled = torch.ones(head.bank.rows.shape[:2], dtype=torch.bool)
    head.choose(head.bank.rows, filled)


class Measured:
    """An embedder with one head, ready to be timed."""

    def __init__(self, config: Config, engine: Engine, head: Head, batch: Batch) -> None:
        self._config, self._engine, self._head, self._batch = config, engine, head, batch
        world = World(Ranks(), head.device, None, None)
        self._diagnosis = TrainingDiagnosis(head, world, config.loss.ignore_index, enabled=False)
        with torch.no_grad():
            keys = torch.arange(len(batch.labels))
            self._embeddings = engine(batch.images, keys, last=True).detach()

    def whole(self) -> None:
        """One training step: the loop's own."""
        rows = len(self._batch.labels)
        train_step(self._batch, self._engine, self._head, rows, 1.0, True, 0, self._diagnosis)

    def head_alone(self) -> None:
        """The same without the embedder."""
        rows: Tensor = self._embeddings.detach().requires_grad_()
        counts = self._batch.row_counts
        output = self._head(rows, self._batch.labels, counts, counts[0], factor=1.0, last=True)
        output.loss.backward()
        self._head.step_done()


def steps_of_a_turn(first_seconds: float) -> int:
    """How often a step is repeated, from what the first one took."""
    return max(1, min(_TURN_STEPS, int(_TURN_SECONDS / max(first_seconds, 1e-9))))


def clock_of(threads: int) -> Callable[[], float]:
    """Processor time of one thread, which other programs of the machine disturb less; the clock on
    the wall where several work together."""
    return time.process_time if threads == 1 else time.perf_counter


def _mean_seconds(step: Callable[[], None], count: int, clock: Callable[[], float]) -> float:
    started = clock()
    for _ in range(count):
        step()
    return (clock() - started) / count


def return_freed_memory(at_once: bool) -> None:
    """Whether memory that is freed goes back to the system at once, so that it does not count as
    resident. New pages cost more than many a step: only while memory is measured."""
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    library.mallopt(_MMAP, 2**16 if at_once else 2**25)
    library.mallopt(_TRIM, 0 if at_once else 2**26)


def _reset_high_water() -> None:
    if _HIGH_WATER.exists():  # Linux.
        _HIGH_WATER.write_text("5")


def prepare(request: Request) -> tuple[Measured, dict[str, Any]]:
    """Build, warm up, and what building took.

    Returns:
        What is timed; `setup_seconds` until the head stands, `first_seconds` of a whole step,
        `extra_bytes` (peak beyond the start, weights included) and `step_extra_bytes` (peak of a
        step beyond what lies there between steps), None where the system does not say.
    """
    torch.manual_seed(0)
    torch.set_num_threads(request.threads)
    sizes = (request.rows, request.dim, request.threads)
    config = step_config(request.objective, request.num_classes, *sizes)
    world = World(Ranks(), torch.device("cpu"), None, None)
    embedder = build_embedder(config.model, config.data.image, 0, None)
    engine = build_engine(config, embedder, world)
    engine.embedder.train()
    # What libraries need once belongs to no objective: a small head of the same kind goes first.
    few = min(request.num_classes, 512)
    small = build_head(config, few, request.dim, world)
    Measured(config, engine, small, draw_batch(config, few)).whole()
    del small
    linux = _HIGH_WATER.exists()
    return_freed_memory(at_once=True)
    before = status_bytes("VmRSS") if linux else 0
    _reset_high_water()
    started = time.perf_counter()
    head = build_head(config, request.num_classes, request.dim, world)
    setup = time.perf_counter() - started
    found = Measured(config, engine, head, draw_batch(config, request.num_classes))
    found.whole()  # Makes the optimizer's state.
    found.head_alone()
    peak = status_bytes("VmHWM") if linux else 0
    lies = status_bytes("VmRSS") if linux else 0
    _reset_high_water()
    first = _mean_seconds(found.whole, 1, time.perf_counter)
    step_peak = status_bytes("VmHWM") if linux else 0
    return_freed_memory(at_once=False)
    if first < _LONG_STEP_SECONDS:  # New pages are no part of a long one.
        found.whole()
        first = _mean_seconds(found.whole, 1, time.perf_counter)
    return found, {
        "setup_seconds": setup,
        "first_seconds": first,
        # A few classes fit into pages that the small head left, some of which were given back.
        "extra_bytes": max(0, max(peak, step_peak) - before) if linux else None,
        "step_extra_bytes": max(0, step_peak - lies) if linux else None,
    }


def serve(connection: Connection, request: Request) -> None:
    """A process's life; see the module."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the benchmark's, which ends this one.
    try:
        connection.recv()
        found, facts = prepare(request)
        count = steps_of_a_turn(facts["first_seconds"])
        clock = clock_of(request.threads)
        connection.send(facts | {"steps_of_a_turn": count})
        while connection.recv():
            head = _mean_seconds(found.head_alone, count, clock)
            whole = _mean_seconds(found.whole, count, clock)
            connection.send({"head_seconds": head, "seconds": whole})
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # Nobody asks any more.
