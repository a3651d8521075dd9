"""What every packer shares: shards written once, in parallel, resumable, and indexed at the end."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dist_dml.data.index import Index
from dist_dml.data.index_command import build_index
from dist_dml.data.progress import ProgressLine
from dist_dml.data.shards import write_shard
from dist_dml.errors import RunError, UsageError
from dist_dml.process_pool import process_pool
from dist_dml.usable import usable_cores
from dist_dml.whole_files import write_json

PACK_FILE = "pack.json"
_TAR_BYTES_PER_SAMPLE = 3072
"""Headers and padding of three members."""
_INDEX_BYTES_PER_SAMPLE = 50
"""Row of the index, and of the catalogue if each class has one sample."""

Sample = Mapping[str, str | bytes]
"""`__key__` and the bytes of each member by extension."""
Render = Callable[[Any], Sample]
"""Makes the members of one sample from its description; a pure function that can be pickled."""


@dataclass(frozen=True)
class ShardPlan:
    """One tar to be: its name and the descriptions of its samples, in order.

    Descriptions of millions of samples are rows of an array: an object for each would take more
    memory, and more time to send to the writing processes, than their pixels.
    """

    name: str
    samples: Sequence[Any] | np.ndarray


RenderShard = Callable[[ShardPlan], Iterable[Sample]]
"""Makes all samples of a shard, in order; a pure function that can be pickled."""


def plan_shards(
    split: str, samples: Sequence[Any] | np.ndarray, shard_samples: int
) -> list[ShardPlan]:
    """Cut the samples of a split into tars `SPLIT-%06d.tar` of `shard_samples` each."""
    return [
        ShardPlan(f"{split}-{number:06d}.tar", samples[start : start + shard_samples])
        for number, start in enumerate(range(0, len(samples), shard_samples))
    ]


def write_pack(
    out: Path,
    shards: Sequence[ShardPlan],
    render: Render,
    source: Mapping[str, Any],
    made_with: Mapping[str, str],
    expected_bytes: int,
    processes: int = 0,
) -> Index:
    """`write_shards` for samples that are made one by one.

    Args:
        out: data set folder; made if missing.
        shards: all shards of the data set.
        render: see `Render`.
        source: what the data depend on.
        made_with: versions of the programs that draw or encode.
        expected_bytes: size of all members, without the tars' headers and padding.
        processes: writing processes; 0 takes one per core.
    """
    tars = expected_bytes + _TAR_BYTES_PER_SAMPLE * sum(len(shard.samples) for shard in shards)
    fill = partial(_one_by_one, render)
    return write_shards(out, shards, fill, source, made_with, tars, processes)


def _one_by_one(render: Render, shard: ShardPlan) -> Iterator[Sample]:
    return map(render, shard.samples)


def write_shards(
    out: Path,
    shards: Sequence[ShardPlan],
    render_shard: RenderShard,
    source: Mapping[str, Any],
    made_with: Mapping[str, str],
    expected_bytes: int,
    processes: int = 0,
) -> Index:
    """Write the shards that `out` does not hold yet, then the index.

    `pack.json` records `source` and `made_with`; it is written first, so that a pack which was
    interrupted goes on, and one with other parameters is refused instead of being mixed in. The
    bytes of a shard do not depend on `processes`.

    Args:
        out: data set folder; made if missing.
        shards: all shards of the data set.
        render_shard: see `RenderShard`.
        source: what the data depend on; goes to `dataset.json` and into the fingerprint.
        made_with: versions of the programs that draw or encode; a pack is not resumed with others.
        expected_bytes: size of all tars, for the check of the disk.
        processes: writing and indexing processes; 0 takes one per core.

    Raises:
        UsageError: `out` holds something else, or the disk is too small.
        RunError: the disk fills up meanwhile.
    """
    _claim(out, source, made_with, shards)
    missing = [shard for shard in shards if not (out / shard.name).exists()]
    total = sum(len(shard.samples) for shard in shards)
    share = sum(len(shard.samples) for shard in missing) / max(total, 1)
    _check_space(out, int(share * expected_bytes) + total * _INDEX_BYTES_PER_SAMPLE)
    if len(missing) < len(shards):
        print(f"{out}: {len(shards) - len(missing)} of {len(shards)} shards are there already")
    progress = ProgressLine("pack", float(sum(len(s.samples) for s in missing)), "images")
    try:
        for count in _written(partial(_write_one, out, render_shard), missing, processes):
            progress.advance(float(count))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(
            f"{out}: the disk is full; free some space and run the same command again, "
            "it goes on with the next shard"
        ) from None
    progress.finish()
    return build_index(out, source=source, processes=processes or usable_cores())


def _write_one(out: Path, render_shard: RenderShard, shard: ShardPlan) -> int:
    samples = render_shard(shard)
    try:
        return write_shard(out / shard.name, samples)
    finally:
        if isinstance(samples, Generator):
            samples.close()  # With the connections of one that was not read to its end.


def _written(
    write: Callable[[ShardPlan], int], shards: Sequence[ShardPlan], processes: int
) -> Iterator[int]:
    """Write the shards, the given number at a time; yields the samples of each."""
    processes = min(processes or usable_cores(), len(shards))
    if processes <= 1:
        yield from map(write, shards)
        return
    with process_pool(processes) as pool:
        yield from pool.map(write, shards)


def _claim(
    out: Path,
    source: Mapping[str, Any],
    made_with: Mapping[str, str],
    shards: Sequence[ShardPlan],
) -> None:
    """Make `out` the folder of this pack, or refuse.

    Raises:
        UsageError: it belongs to another pack, or holds tars that no packer made.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; give the folder of a new data set")
    out.mkdir(parents=True, exist_ok=True)
    content = {"source": dict(source), "made_with": dict(made_with)}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path = out / PACK_FILE
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            same = found["hash"] == digest
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{path} is damaged; delete {out} or choose another folder") from None
        if not same:
            raise UsageError(
                f"{out}: holds a pack made with other parameters ({_differences(found, content)}); "
                "delete it, choose another folder or repeat its parameters"
            )
    else:
        foreign = sorted(tar.name for tar in out.glob("*.tar"))
        if foreign:
            raise UsageError(
                f"{out}: holds shards that are not of this pack ({foreign[0]}); choose another "
                f"folder, or index them with `dist-dml index {out}`"
            )
        write_json(path, {**content, "hash": digest})
    extra = {tar.name for tar in out.glob("*.tar")} - {shard.name for shard in shards}
    if extra:
        raise UsageError(f"{out}: {min(extra)} is not of this pack; move it elsewhere")


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The parameters that differ, as `name=there (now here)`, three at most."""
    lines = []
    for part in ("source", "made_with"):
        old, new = found.get(part, {}), wanted[part]
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                lines.append(f"{name}={old.get(name)!s:.40} (now {new.get(name)!s:.40})")
    return ", ".join(lines[:3]) or "the record differs"


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if free < needed:
        raise UsageError(
            f"{out}: the pack needs about {needed / 2**20:,.0f} MiB and the disk has "
            f"{free / 2**20:,.0f} MiB free; free some space or choose another folder"
        )
