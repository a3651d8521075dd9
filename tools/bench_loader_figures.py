"""Figures of `bench_loader` that are not times of readers: memory, and a run's waiting for data."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
from bench_loader_readers import PREFETCH, SIZE, our_stream

from dist_dml.data.index import Index


@dataclass(frozen=True)
class Memory:
    """Of one loader process, bytes."""

    samples: int
    private: int
    resident: int
    batch: int


def loader_memory(index: Index, samples: int, batch_size: int) -> Memory:
    """Memory of a loader process under an index of `samples` rows, at rest with its queue full.

    Private is what it shares with no other process (unique set size). Batches that wait in shared
    memory count as private where the trainer has not mapped them yet.
    """
    columns = ("split", "class_id", "shard", "offset", "size", "extension", "checksum")
    long = {name: np.resize(getattr(index, name), samples) for name in columns}
    stream = our_stream(replace(index, **long), batch_size, 1)
    own = psutil.Process()
    direct = {child.pid for child in own.children()}
    before = {child.pid for child in own.children(recursive=True)}
    for _ in range(PREFETCH + 2):
        next(stream)
    time.sleep(1.0)
    children = [*own.children(recursive=True)]
    direct |= {child.pid for child in own.children()}
    loaders = [child for child in children if child.pid not in before | direct]
    assert len(loaders) == 1, "one loader process was asked for"
    found = loaders[0].memory_full_info()
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    return Memory(samples, found.uss, found.rss, batch_size * 3 * SIZE * SIZE)


def waiting_share(folder: Path) -> tuple[float, float]:
    """Share of a run's training time that it waited for data: of all, and after the first record.

    The first interval holds the start of the loader processes. NaN where there is one record only.

    Raises:
        ValueError: if the run recorded none.
    """
    from dist_dml.tracking.recorder import read_metrics

    curve = read_metrics(folder).get("train/data_wait_share")
    if curve is None:
        raise ValueError(
            f"--run={folder} has no train/data_wait_share in its metrics.jsonl; name the folder of "
            "a run of dist-dml train"
        )
    intervals = np.diff(curve.seconds, prepend=0.0)
    waits = curve.value * intervals
    later = intervals[1:].sum()
    return (
        float(waits.sum() / max(intervals.sum(), 1e-9)),
        float(waits[1:].sum() / later) if later > 0 else float("nan"),
    )
