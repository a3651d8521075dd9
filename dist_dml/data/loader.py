"""The plan's micro-batches as tensors, decoded ahead by processes that cannot change the order."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from queue import Full, Queue
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Int
from torch.utils.data import DataLoader

from dist_dml.data.batch_making import Batch, BatchMaker, Made, Request
from dist_dml.data.damage import Damage
from dist_dml.data.index import Index
from dist_dml.data.plan import Plan, row_counts, worker_slice
from dist_dml.data.prefetch import Prefetcher
from dist_dml.data.reader import open_reader, storage_error
from dist_dml.data_config import DataConfig
from dist_dml.errors import RunError
from dist_dml.process_pool import take_environment

_CLOSE_SECONDS = 10.0


def training_batches(
    index: Index,
    plan: Plan,
    config: DataConfig,
    seed: int,
    rank: int,
    num_workers: int,
    start_step: int,
    end_step: int,
    damage: Damage | None = None,
) -> Iterator[Batch]:
    """This worker's rows of every micro-batch of steps `start_step` .. `end_step` - 1, in order.

    Epochs follow each other without a pause: loader processes work ahead across their ends. The
    batches do not depend on the number of loader processes, and all workers together get the same
    rows, with the same pixels, whatever their number.

    Args:
        index: the data set.
        plan: the order of its samples.
        config: image, augmentation, loader processes and prefetch.
        seed: of the augmentation, together with step and position.
        rank: this worker.
        num_workers: all workers.
        start_step: first step; where a resumed run goes on.
        end_step: one after the last step.
        damage: replaces and counts damaged images; a new one, if None.

    Raises:
        UsageError: before the first batch, if a micro-batch has fewer rows than workers.
        RunError: too many images are damaged, the storage failed, or a loader process died.
    """
    plan.check_rows(num_workers)
    reader = open_reader(index, config.image.channels, config.storage)
    maker = BatchMaker(reader, config, seed, torch.cuda.is_available())
    damage = damage or Damage(index, plan.sample_ids, config, seed, ignored=-100)
    ahead = Prefetcher.of_reader(reader, config.storage)

    def requests() -> Iterator[Request]:
        for step in range(start_step, end_step):
            if ahead is not None:
                ahead.follow(plan.shards_ahead(step, config.storage.ahead_shards))
            for micro, (positions, ids) in enumerate(plan.micro_batches(step)):
                mine = worker_slice(len(ids), rank, num_workers)
                counts = row_counts(len(ids), num_workers)
                yield _request(index, ids[mine], positions[mine], counts, step, micro)

    def mended() -> Iterator[Batch]:
        try:
            for made in _made(maker, config, requests):
                yield damage.mend(made, maker)
        finally:
            if ahead is not None:
                ahead.close()

    if config.loader_processes == 0:
        return _made_ahead(mended(), config.prefetch)
    return mended()


def evaluation_batches(
    index: Index, split: str, config: DataConfig, batch_size: int, rank: int, num_workers: int
) -> Iterator[Batch]:
    """This worker's contiguous slice of a split in id order, whole: nothing is dropped or padded.

    Nothing replaces a damaged image: its row is black and not `readable`, for the caller to leave
    out and count.

    Workers may get different numbers of batches (slices differ by a row), and none at all where
    there are more workers than samples: do not call a collective per batch.

    Args:
        index: the data set.
        split: its split.
        config: image, loader processes and prefetch; no augmentation.
        batch_size: images of this worker at a time.
        rank: this worker.
        num_workers: all workers.

    Raises:
        UsageError: before the first batch, if the split is empty or unknown.
        RunError: the storage failed, or a loader process died.
    """
    return image_batches(index, index.select(split), config, batch_size, rank, num_workers)


def image_batches(
    index: Index,
    ids: Int[np.ndarray, " n"],
    config: DataConfig,
    batch_size: int,
    rank: int = 0,
    num_workers: int = 1,
) -> Iterator[Batch]:
    """As `evaluation_batches`, of these samples in their order.

    Raises:
        RunError: the storage failed, or a loader process died.
    """
    mine = worker_slice(len(ids), rank, num_workers)
    sizes = row_counts(len(ids), num_workers)

    def requests() -> Iterator[Request]:
        for step, start in enumerate(range(mine.start, mine.stop, batch_size)):
            positions = np.arange(start, min(start + batch_size, mine.stop))
            done = step * batch_size
            counts = tuple(min(max(size - done, 0), batch_size) for size in sizes)
            yield _request(index, ids[positions], positions, counts, step, 0)

    reader = open_reader(index, config.image.channels, config.storage)
    made = _made(BatchMaker(reader, config, None, False), config, requests)
    return _without_faults(index, made)


def part_batches(
    index: Index, parts: Sequence[Int[np.ndarray, " _"]], config: DataConfig, batch_size: int
) -> Iterator[Batch]:
    """As `image_batches`, of several lists of samples, one after the other; no batch spans two.

    A list is cut into the same batches wherever it stands, so that what a network makes of it does
    not depend on who else works. Loader processes work ahead across the lists' ends. A batch's
    `step` is the position of its list in `parts`, and `micro` counts the batches in it.

    Raises:
        RunError: the storage failed, or a loader process died.
    """

    def requests() -> Iterator[Request]:
        for step, ids in enumerate(parts):
            for micro, start in enumerate(range(0, len(ids), batch_size)):
                positions = np.arange(start, min(start + batch_size, len(ids)))
                counts = (len(positions),)
                yield _request(index, ids[positions], positions, counts, step, micro)

    reader = open_reader(index, config.image.channels, config.storage)
    made = _made(BatchMaker(reader, config, None, False), config, requests)
    return _without_faults(index, made)


def _request(
    index: Index,
    ids: np.ndarray,
    positions: np.ndarray,
    counts: tuple[int, ...],
    step: int,
    micro: int,
) -> Request:
    columns = (index.shard, index.offset, index.size, index.checksum)
    places = np.stack([column[ids].astype(np.int64) for column in columns], axis=1)
    labels = index.class_id[ids].astype(np.int64)
    return Request(
        ids.astype(np.int64), positions.astype(np.int64), labels, places, counts, step, micro
    )


def _made(
    maker: BatchMaker, config: DataConfig, requests: Callable[[], Iterable[Request]]
) -> Iterator[Made]:
    """Make the batches of `requests`, here or in loader processes."""
    if config.loader_processes == 0:
        return map(maker.__getitem__, requests())
    return _made_elsewhere(maker, config, requests)


def _without_faults(index: Index, every: Iterable[Made]) -> Iterator[Batch]:
    for made in every:
        if made.fault:
            raise storage_error(index, made.fault_sample, made.fault)
        yield made.batch


def _made_ahead(batches: Iterator[Batch], count: int) -> Iterator[Batch]:
    """The same batches, made by a thread of this process up to `count` of them ahead.

    Reading, checksums and decoding leave the interpreter to others, and so do the steps' own
    operations; what a worker waits for others is filled with decoding.
    """
    made: Queue[Batch | BaseException | None] = Queue(count)
    stop = threading.Event()

    def put(thing: Batch | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return made.put(thing, timeout=0.1)
            except Full:
                continue

    def work() -> None:
        try:
            for batch in batches:
                put(batch)
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)
        finally:
            cast(
                Generator, batches
            ).close()  # Here: a generator belongs to the thread that runs it.

    thread = threading.Thread(target=work, name="decode", daemon=True)
    thread.start()
    try:
        while (found := made.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        stop.set()
        thread.join(_CLOSE_SECONDS)  # It may be in the pauses of a store that does not answer.


def _made_elsewhere(
    maker: BatchMaker, config: DataConfig, requests: Callable[[], Iterable[Request]]
) -> Iterator[Made]:
    """A DataLoader whose sampler yields whole requests: one process makes one batch.

    It hands results back in the order of the requests, whichever process is first.
    """
    loader = DataLoader(
        maker,
        batch_size=None,
        sampler=Requests(requests),
        num_workers=config.loader_processes,
        prefetch_factor=config.prefetch,
        collate_fn=_as_is,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context=_forkserver(),
        worker_init_fn=partial(_start_loader, dict(os.environ)),
        # Torch draws a seed for its workers: not from the generator that the training uses.
        generator=torch.Generator(),
    )
    remedy = (
        "if memory ran out, lower "
        f"data.loader_processes={config.loader_processes} or data.prefetch={config.prefetch}"
    )
    try:
        yield from loader
    except (ConnectionError, EOFError) as error:
        # The tensor was announced, but its process is not there any more to hand it over.
        raise RunError(f"a loader process died ({error}); {remedy}") from None
    except RuntimeError as error:
        # Torch's words for a process that is gone. Other errors are bugs: keep their traceback.
        if "DataLoader worker" not in str(error) or "exited unexpectedly" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise RunError(f"a loader process died ({reason}); {remedy}") from None


class Requests:
    """The requests as something that a DataLoader iterates over."""

    def __init__(self, requests: Callable[[], Iterable[Request]]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests())


def _as_is(batch: Any) -> Any:
    return batch


def _forkserver() -> BaseContext:
    """Loader processes come from a forkserver that has imported this module.

    A plain fork hangs once its parent has run a parallel torch operation; spawn imports torch anew
    in every process. The preload has no effect where a forkserver already runs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dist_dml.data.loader"])
    return context


def _start_loader(variables: Mapping[str, str], _: int) -> None:
    take_environment(variables)
    _end_with_parent()


def _end_with_parent() -> None:
    """Leave as soon as the training process is gone, also when it was killed.

    Torch's own watchdog watches the parent process, which is the forkserver here: that one lives as
    long as any of its children, so nobody would ever leave.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()
