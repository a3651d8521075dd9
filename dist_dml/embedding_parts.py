"""Embeddings of a data set as parts of a folder: dealt to workers, kept when they are whole.

A part is a fixed number of samples, cut into fixed batches. What is in it depends neither on the
number of workers nor on which of them made it, nor on how often the work was killed.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from dist_dml.config import Config
from dist_dml.data.index import EXTENSIONS, Index
from dist_dml.data.loader import part_batches
from dist_dml.data.locked_files import HolderStalled, locked_file
from dist_dml.data.parquet_files import open_parquet, stamp_of
from dist_dml.data.progress import ProgressLine
from dist_dml.errors import RunError, UsageError
from dist_dml.parallel.collectives import gather_objects
from dist_dml.parallel.world import World
from dist_dml.retrieval.embedding_columns import ColumnNames, read_columns, read_footer
from dist_dml.retrieval.embedding_files import write_embeddings
from dist_dml.retrieval.embedding_manifest import (
    JOB_FILE,
    MANIFEST_FILE,
    EmbeddingJob,
    EmbeddingManifest,
    EmbeddingPart,
    file_digest,
    part_name,
    read_job,
)
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.split_embedding import Embed
from dist_dml.whole_files import write_json

_LOCK_FILE = ".lock"
_LOCK_SECONDS = 10.0
_ROW_BYTES = 160
"""What the columns beside the embedding take in a file, roughly, and at most for plain keys."""

Samples = Int[np.ndarray, " n"]


@contextmanager
def claim_folder(folder: Path, job: EmbeddingJob, world: World) -> Iterator[None]:
    """Take a folder for a job: made, or found with the same job. By all workers together.

    Raises:
        UsageError: it holds something else, another job, or another process writes it.
        RunError: a worker sees other data, or another folder of that name.
    """
    jobs = gather_objects(job.model_dump(), world.background)
    for rank, other in enumerate(jobs):
        if other != jobs[0]:
            differences = "; ".join(EmbeddingJob(**jobs[0]).differences(EmbeddingJob(**other)))
            raise RunError(
                f"worker {rank} would embed something else than worker 0 ({differences:.300}); "
                "give all machines the same data and checkpoint"
            )
    if not world.is_first:
        gather_objects(None, world.background)
        if read_job(folder) != job:
            raise RunError(
                f"worker {world.rank} does not see in {folder} what worker 0 has written there; "
                "name a folder on a file system that all machines share"
            )
        yield
        return
    _check_folder(folder, job)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked_file(folder / _LOCK_FILE, _LOCK_SECONDS))
        except HolderStalled:
            raise UsageError(
                f"{folder} is being written by another `dist-dml embed`; wait for its end, or name "
                "another folder"
            ) from None
        _check_folder(folder, job)  # What another process has done until it let go.
        for left in folder.glob("*.tmp"):  # Of processes that were killed.
            left.unlink()
        if read_job(folder) is None:
            write_json(folder / JOB_FILE, job.model_dump())
        gather_objects(None, world.background)
        yield


def _check_folder(folder: Path, job: EmbeddingJob) -> None:
    """Only an empty folder, or one of the same job, is written into."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file; --out names a folder for the parts")
    found = read_job(folder)
    if found is None:
        strangers = [path.name for path in folder.iterdir() if path.name != _LOCK_FILE]
        if any(not name.startswith(f"{JOB_FILE}.") for name in strangers):
            raise UsageError(
                f"{folder} holds other files ({sorted(strangers)[0]!r:.80}) and no {JOB_FILE}; "
                "name an empty or a new folder"
            )
        return
    if found != job:
        differences = "; ".join(found.differences(job))
        raise UsageError(
            f"{folder} holds embeddings of another job ({differences:.400}); name another folder, "
            "or remove this one"
        )


def embed_parts(
    embed: Embed,
    index: Index,
    ids: Samples,
    job: EmbeddingJob,
    folder: Path,
    config: Config,
    world: World,
) -> EmbeddingManifest:
    """Make the parts that are missing, and the manifest last. By all workers together.

    Parts that are there are read once to compare their checksums. Costs one pass over the images of
    the others; a worker holds the embeddings of one part.

    Args:
        embed: uint8 images to embeddings.
        index: the data set.
        ids: the samples, in the order of the parts.
        job: what `folder` was claimed for.
        folder: from `claim_folder`.
        config: image, loader processes, batch size.
        world: the workers.

    Raises:
        UsageError: the disk is too small, or a number is beyond float16.
        RunError: no image can be read, embeddings are not finite, or the storage failed.
    """
    share = range(world.rank, job.num_parts, world.size)
    found = {k: part for k in share if (part := _kept_part(folder, job, k)) is not None}
    kept = {k: p for one in gather_objects(found, world.background) for k, p in one.items()}
    missing = [k for k in range(job.num_parts) if k not in kept]
    if world.is_first:
        if kept:
            print(f"embed: {len(kept)} of {job.num_parts} parts are there", file=sys.stderr)
        if missing:
            (folder / MANIFEST_FILE).unlink(missing_ok=True)
            _check_disk(folder, job, len(missing))
    mine = missing[world.rank :: world.size]
    made = dict(zip(mine, _make(embed, index, ids, job, folder, config, world, mine), strict=True))
    parts = kept | {k: p for one in gather_objects(made, world.background) for k, p in one.items()}
    manifest = EmbeddingManifest(
        job=job,
        rows=sum(part.rows for part in parts.values()),
        left_out=sum(part.left_out for part in parts.values()),
        parts=[parts[k] for k in range(job.num_parts)],
    )
    if manifest.rows == 0:
        raise RunError(
            f"none of the {len(ids)} images can be read; `dist-dml verify {index.folder}` tells why"
        )
    if world.is_first and (missing or not (folder / MANIFEST_FILE).exists()):
        write_json(folder / MANIFEST_FILE, manifest.model_dump())
    return manifest


def _samples_of(ids: Samples, job: EmbeddingJob, number: int) -> Int[np.ndarray, " rows"]:
    return ids[number * job.part_rows : (number + 1) * job.part_rows]


def _kept_part(folder: Path, job: EmbeddingJob, number: int) -> EmbeddingPart | None:
    """A part that an earlier start has finished, read to its end; None if it is to be made."""
    path = folder / part_name(number)
    if not path.is_file():
        return None
    start = number * job.part_rows
    expected = min(job.part_rows, job.num_samples - start)
    try:
        with open_parquet(path) as file:
            stamp = stamp_of(file)
        left_out = int(stamp.get("left_out", "-1"))
        names = ColumnNames(id="id")
        footer = read_footer(path, names)
        if stamp.get("job") != job.digest or stamp.get("part") != str(number):
            raise ValueError("it is of another job")
        if footer.rows + left_out != expected or footer.width not in (0, job.embedding_dim):
            raise ValueError(f"it has {footer.rows} rows of width {footer.width}")
        vectors = np.empty((footer.rows, job.embedding_dim), np.float32)
        read_columns(footer, names, footer.metadata, vectors)
    except ValueError as error:  # A UsageError is one.
        print(f"note: {path.name} is made anew: {error}", file=sys.stderr)
        return None
    return _described(path, footer.rows, left_out)


def _described(path: Path, rows: int, left_out: int) -> EmbeddingPart:
    return EmbeddingPart(
        name=path.name,
        rows=rows,
        left_out=left_out,
        bytes=path.stat().st_size,
        sha256=file_digest(path),
    )


def _check_disk(folder: Path, job: EmbeddingJob, num_parts: int) -> None:
    rows = min(num_parts * job.part_rows, job.num_samples)
    needed = rows * (job.embedding_dim * np.dtype(job.dtype).itemsize + _ROW_BYTES)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UsageError(
            f"{folder} will take about {needed / 2**30:.3g} GiB and {free / 2**30:.3g} GiB are "
            "free; free the disk, name another one, or halve it with --dtype float16"
        )


def _make(
    embed: Embed,
    index: Index,
    ids: Samples,
    job: EmbeddingJob,
    folder: Path,
    config: Config,
    world: World,
    numbers: Sequence[int],
) -> Iterator[EmbeddingPart]:
    """Embed and write these parts, one after the other."""
    samples = [_samples_of(ids, job, k) for k in numbers]
    if not samples:
        return
    of = f" (worker {world.rank} of {world.size})" if world.size > 1 else ""
    progress = ProgressLine(f"embed{of}", sum(map(len, samples)), "images")
    vectors: list[torch.Tensor] = []
    readable: list[torch.Tensor] = []
    done = 0
    for batch in part_batches(index, samples, config.data, config.evaluation.batch_size):
        vectors.append(embed(batch.images).float())
        readable.append(batch.readable)
        done += len(batch.images)
        progress.advance(len(batch.images))
        if done == len(samples[batch.step]):
            chosen = torch.cat(readable).numpy()
            rows = torch.cat(vectors).cpu().numpy()[chosen]
            path = folder / part_name(numbers[batch.step])
            kept = samples[batch.step][chosen].astype(np.int64)
            left_out = int((~chosen).sum())
            _write(path, index, Embeddings(rows, index.class_id[kept], kept), job, left_out)
            yield _described(path, len(kept), left_out)
            vectors, readable, done = [], [], 0
    progress.finish()


def _write(
    path: Path, index: Index, embeddings: Embeddings, job: EmbeddingJob, left_out: int
) -> None:
    facts = {
        **job.facts,
        "job": job.digest,
        "part": str(int(path.stem.removeprefix("part-"))),
        "left_out": str(left_out),
    }
    write_embeddings(
        path,
        embeddings.ids,
        embeddings.labels,
        embeddings.vectors,
        _metadata(index, embeddings.ids),
        job.dtype,
        facts,
    )


def _metadata(index: Index, ids: Samples) -> dict[str, Any]:
    """What the index knows of each sample, as columns."""
    import pyarrow

    def texts(values: list[str]) -> Any:
        return pyarrow.array(values, pyarrow.string())

    rows = ids.tolist()
    columns = {
        "class_name": texts([index.class_names[c] for c in index.class_id[ids].tolist()]),
        "split": texts([index.split_names[code] for code in index.split[ids].tolist()]),
        "key": texts([index.key(row) for row in rows]),
        "shard": texts([index.shards[code] for code in index.shard[ids].tolist()]),
        "extension": texts([EXTENSIONS[code] for code in index.extension[ids].tolist()]),
        "image_bytes": pyarrow.array(index.size[ids].astype(np.int64)),
    }
    if index.part is not None:
        columns["data_set"] = pyarrow.array(index.part[ids].astype(np.int64))
    return columns
