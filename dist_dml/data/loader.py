"""The plan's micro-batches as tensors, decoded ahead by processes that cannot change the order."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dist_dml.config import DataConfig
from dist_dml.data.augment import evaluation_transform, train_transform
from dist_dml.data.index import Index
from dist_dml.data.plan import Plan, row_counts, worker_slice
from dist_dml.data.reader import BadSample, Reader, bad_sample_error, open_reader
from dist_dml.errors import RunError
from dist_dml.keyed_random import key_of


@dataclass(frozen=True, eq=False)
class Batch:
    """This worker's rows of one micro-batch. Dimensions: r rows, C channels, H = W pixels.

    Attributes:
        images: pixels 0..255; the device divides and normalises.
        labels: class ids.
        sample_ids: row numbers of the index.
        positions: of the rows in the global batch (training) or in the split (evaluation).
        row_counts: rows of every worker in this micro-batch, by rank.
        step: optimizer step (training) or number of the batch (evaluation).
        micro: number of the micro-batch in its step.
    """

    images: UInt8[Tensor, "r C H W"]
    labels: Int64[Tensor, " r"]
    sample_ids: Int64[Tensor, " r"]
    positions: Int64[Tensor, " r"]
    row_counts: tuple[int, ...]
    step: int
    micro: int

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; the DataLoader calls this by name."""
        names = ("images", "labels", "sample_ids", "positions")
        return replace(self, **{name: getattr(self, name).pin_memory() for name in names})


@dataclass(frozen=True, eq=False)
class _Request:
    """What a loader process needs to make one batch: it holds no index of its own."""

    sample_ids: Int[np.ndarray, " r"]
    positions: Int[np.ndarray, " r"]
    labels: Int[np.ndarray, " r"]
    places: Int64[np.ndarray, "r 4"]
    """Shard, offset, size and checksum of each row's image."""
    row_counts: tuple[int, ...]
    step: int
    micro: int


@dataclass(frozen=True)
class _Failure:
    """An unreadable sample, as a value: an exception would come back with a long traceback."""

    sample_id: int
    reason: str


class _BatchMaker(Dataset):
    """Turns a request into a batch. `seed` None transforms for evaluation."""

    def __init__(self, reader: Reader, config: DataConfig, seed: int | None) -> None:
        self._reader, self._config, self._seed = reader, config, seed

    def __getitem__(self, request: _Request) -> Batch | _Failure:
        config = self._config.image
        rows = len(request.sample_ids)
        images = np.empty((rows, config.channels, config.size, config.size), np.uint8)
        for row, place in enumerate(request.places.tolist()):
            try:
                image = self._reader.image(*place)
            except BadSample as error:
                return _Failure(int(request.sample_ids[row]), str(error))
            images[row] = self._transform(image, request, row).transpose(2, 0, 1)
        return Batch(
            images=torch.from_numpy(images),
            labels=torch.from_numpy(request.labels),
            sample_ids=torch.from_numpy(request.sample_ids),
            positions=torch.from_numpy(request.positions),
            row_counts=request.row_counts,
            step=request.step,
            micro=request.micro,
        )

    def _transform(self, image: np.ndarray, request: _Request, row: int) -> np.ndarray:
        if self._seed is None:
            return evaluation_transform(image, self._config.image)
        key = key_of(self._seed, "augment", request.step, int(request.positions[row]))
        return train_transform(image, self._config.image, self._config.augment, key)


def training_batches(
    index: Index,
    plan: Plan,
    config: DataConfig,
    seed: int,
    rank: int,
    num_workers: int,
    start_step: int,
    end_step: int,
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

    Raises:
        UsageError: before the first batch, if a micro-batch has fewer rows than workers.
        RunError: a sample cannot be read, or a loader process died.
    """
    plan.check_rows(num_workers)

    def requests() -> Iterator[_Request]:
        for step in range(start_step, end_step):
            for micro, (positions, ids) in enumerate(plan.micro_batches(step)):
                mine = worker_slice(len(ids), rank, num_workers)
                counts = row_counts(len(ids), num_workers)
                yield _request(index, ids[mine], positions[mine], counts, step, micro)

    return _batches(index, config, seed, requests)


def evaluation_batches(
    index: Index, split: str, config: DataConfig, batch_size: int, rank: int, num_workers: int
) -> Iterator[Batch]:
    """This worker's contiguous slice of a split in id order, whole: nothing is dropped or padded.

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
        RunError: a sample cannot be read, or a loader process died.
    """
    ids = index.select(split)
    mine = worker_slice(len(ids), rank, num_workers)
    sizes = row_counts(len(ids), num_workers)

    def requests() -> Iterator[_Request]:
        for step, start in enumerate(range(mine.start, mine.stop, batch_size)):
            positions = np.arange(start, min(start + batch_size, mine.stop))
            done = step * batch_size
            counts = tuple(min(max(size - done, 0), batch_size) for size in sizes)
            yield _request(index, ids[positions], positions, counts, step, 0)

    return _batches(index, config, None, requests)


def _request(
    index: Index,
    ids: np.ndarray,
    positions: np.ndarray,
    counts: tuple[int, ...],
    step: int,
    micro: int,
) -> _Request:
    columns = (index.shard, index.offset, index.size, index.checksum)
    places = np.stack([column[ids].astype(np.int64) for column in columns], axis=1)
    labels = index.class_id[ids].astype(np.int64)
    return _Request(
        ids.astype(np.int64), positions.astype(np.int64), labels, places, counts, step, micro
    )


def _batches(
    index: Index, config: DataConfig, seed: int | None, requests: Callable[[], Iterable[_Request]]
) -> Iterator[Batch]:
    """Make the batches of `requests`, here or in loader processes, and raise what went wrong."""
    maker = _BatchMaker(open_reader(index, config.image.channels), config, seed)
    if config.loader_processes == 0:
        made = map(maker.__getitem__, requests())
    else:
        made = _made_elsewhere(maker, config, requests)
    return _unwrapped(index, made)


def _unwrapped(index: Index, made: Iterable[Batch | _Failure]) -> Iterator[Batch]:
    for result in made:
        if isinstance(result, _Failure):
            raise bad_sample_error(index, result.sample_id, result.reason)
        yield result


def _made_elsewhere(
    maker: _BatchMaker, config: DataConfig, requests: Callable[[], Iterable[_Request]]
) -> Iterator[Batch | _Failure]:
    """A DataLoader whose sampler yields whole requests: one process makes one batch.

    It hands results back in the order of the requests, whichever process is first.
    """
    loader = DataLoader(
        maker,
        batch_size=None,
        sampler=_Requests(requests),
        num_workers=config.loader_processes,
        prefetch_factor=config.prefetch,
        collate_fn=_as_is,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context=_forkserver(),
        worker_init_fn=_end_with_parent,
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


class _Requests:
    """The requests as something that a DataLoader iterates over."""

    def __init__(self, requests: Callable[[], Iterable[_Request]]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[_Request]:
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


def _end_with_parent(_: int) -> None:
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
