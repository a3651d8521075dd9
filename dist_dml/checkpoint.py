"""Checkpoints: atomic, verified, without pickles, and loadable on another number of workers.

A checkpoint is a folder `checkpoints/step-%09d/`:

- `embedder.safetensors`: weights and buffers by parameter name;
- `optimizer.safetensors`: the embedder's optimizer state by `parameter|key`, the same for all
engines;
- `classes-%05d-of-%05d.safetensors`: one worker's class weights and their optimizer state;
- `shared.safetensors`: what the head holds alike on all workers, if it holds such: the cross-batch
memory;
- `config.yaml`, and `manifest.json`: where training stood, the class range and checksum of every
file.

It is written under a temporary name, the manifest last, and renamed when all workers have finished:
under its final name a checkpoint is complete. Several machines need a file system that they share.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_dml.checkpoint_manifest import MANIFEST, Manifest, Progress, manifest_checksum
from dist_dml.engine import Engine
from dist_dml.errors import RunError, UsageError
from dist_dml.parallel.collectives import gather_objects
from dist_dml.parallel.heads import Head
from dist_dml.parallel.world import World
from dist_dml.whole_files import sync_folder

_EMBEDDER, _OPTIMIZER = "embedder.safetensors", "optimizer.safetensors"
SHARED = "shared.safetensors"


@dataclass(frozen=True)
class Contents:
    """What goes into a checkpoint besides the tensors."""

    progress: Progress
    plan: dict[str, Any]
    config_yaml: str
    config_hash: str


@dataclass(frozen=True)
class Snapshot:
    """One worker's part of a checkpoint, in tensors that nobody changes while it is written.

    Attributes:
        files: tensors by name of the file and of the tensor.
        class_file: start and stop of this worker's classes, and the file that holds them.
        num_classes: of all workers.
    """

    files: Mapping[str, Mapping[str, Tensor]]
    class_file: tuple[int, int, str]
    num_classes: int

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(value.nbytes for values in self.files.values() for value in values.values())


def on_cpu(name: str, value: Tensor) -> Tensor:
    """A tensor as it can be written at once: no copy, where it lies in main memory already."""
    del name
    return value.detach().cpu().contiguous()


def take_snapshot(
    engine: Engine,
    head: Head,
    world: World,
    keep: Callable[[str, Tensor], Tensor] = on_cpu,
) -> Snapshot:
    """This worker's part of a checkpoint; by all workers together, as ZeRO gathers its state.

    Args:
        engine: the embedder and its optimizer.
        head: what stands behind it.
        world: all workers.
        keep: from a unique name and a tensor to one in main memory; a copy, if training goes on.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    optimizer_state = engine.optimizer_tensors()
    if world.is_first:
        tensors[_EMBEDDER] = dict(engine.embedder.state_dict())
        tensors[_OPTIMIZER] = optimizer_state
        if shared := head.shared_tensors():
            tensors[SHARED] = shared
    partition = head.partition
    class_file = f"classes-{world.rank:05d}-of-{world.size:05d}.safetensors"
    tensors[class_file] = head.shard_tensors()
    kept = {
        file: {key: keep(f"{file}/{key}", value) for key, value in values.items()}
        for file, values in tensors.items()
    }
    place = (partition.start, partition.stop, class_file)
    return Snapshot(kept, place, partition.num_classes)


def save_checkpoint(
    folder: Path,
    contents: Contents,
    engine: Engine,
    head: Head,
    world: World,
) -> Path:
    """Write a checkpoint and wait for it; by all workers together. Returns its folder.

    Raises:
        RunError: see `write_snapshot`.
    """
    snapshot = take_snapshot(engine, head, world)
    return write_snapshot(folder, contents, snapshot, world.rank, world.group)


def write_snapshot(
    folder: Path,
    contents: Contents,
    snapshot: Snapshot,
    rank: int,
    group: ProcessGroup | None,
) -> Path:
    """Write a checkpoint from all workers' snapshots. Returns its folder.

    Args:
        folder: of all checkpoints of the run.
        contents: what goes into the manifest.
        snapshot: this worker's part.
        rank: of this worker.
        group: all workers; nobody else sends messages in it meanwhile. None for one process.

    Raises:
        RunError: on every worker, if any of them could not write. Nothing under a final name has
            changed then, and the temporary folder is removed.
    """
    final = folder / f"step-{contents.progress.step:09d}"
    temporary = final.with_name(final.name + ".tmp")
    first = rank == 0
    needed = sum(gather_objects(snapshot.num_bytes, group))
    agree = partial(_agree, rank, group)
    try:
        agree(lambda: _start_folder(temporary, needed) if first else None)
        written = agree(lambda: _write_files(temporary, snapshot, contents, first))
        parts = gather_objects(snapshot.class_file, group)
        files = {name: entry for worker in written for name, entry in worker.items()}
        manifest = Manifest(
            contents.progress,
            contents.plan,
            snapshot.num_classes,
            contents.config_hash,
            parts,
            files,
        )
        agree(lambda: finish_checkpoint(temporary, final, manifest) if first else None)
    except RunError:
        # All have agreed to give up. Removed earlier, the folder would vanish under a worker that
        # still writes, whose own error would then hide the reason.
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _agree(rank: int, group: ProcessGroup | None, action: Callable[[], Any]) -> list[Any]:
    """Every worker's result, or the same RunError on all: nobody waits for one that gave up."""
    try:
        outcome, problem = action(), None
    except Exception as error:  # Whatever it is, the others must not wait for this worker.
        known = isinstance(error, (OSError, SafetensorError))
        outcome = None
        problem = f"worker {rank}: {error if known else f'{type(error).__name__}: {error}'}"
    outcomes = gather_objects((outcome, problem), group)
    for _, reason in outcomes:
        if reason is not None:
            raise RunError(
                f"the checkpoint was not written ({reason}); free space or mend the disk below "
                "run.root: earlier checkpoints are untouched, resume with --resume auto"
            )
    return [result for result, _ in outcomes]


def _start_folder(temporary: Path, needed: int) -> None:
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    # Found before the disk is filled to the last byte, which others need for their records.
    free = shutil.disk_usage(temporary).free
    if free < needed:
        reason = f"{needed / 2**20:.1f} MiB needed, {free / 2**20:.1f} MiB free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {reason}")


def remove_unfinished(folder: Path) -> None:
    """Remove what killed attempts were writing. By the process that owns the run folder alone."""
    for path in folder.glob("step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _write_files(
    temporary: Path, snapshot: Snapshot, contents: Contents, first: bool
) -> dict[str, dict[str, Any]]:
    entries = {}
    for name, values in snapshot.files.items():
        save_file(dict(values), temporary / name)
        entries[name] = flushed_entry(temporary / name)
    if first:
        (temporary / "config.yaml").write_text(contents.config_yaml, encoding="utf-8")
        entries["config.yaml"] = flushed_entry(temporary / "config.yaml")
    return entries


def flushed_entry(path: Path) -> dict[str, Any]:
    """Bytes and checksum of a file that has reached the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def finish_checkpoint(temporary: Path, final: Path, manifest: Manifest) -> None:
    """Manifest last, then the rename that makes the checkpoint visible, each flushed to disk."""
    path = temporary / MANIFEST
    contents = asdict(manifest)
    contents["sha256"] = manifest_checksum(contents)
    path.write_text(json.dumps(contents, indent=1), encoding="utf-8")
    flushed_entry(path)
    sync_folder(temporary)
    if final.exists():  # A resumed run has come to a step that was saved before.
        shutil.rmtree(final)
    temporary.rename(final)
    sync_folder(final.parent)


def load_embedder_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Weights and buffers of the embedder."""
    return load_file(checkpoint / _EMBEDDER)


def load_optimizer_state(checkpoint: Path) -> dict[str, Tensor]:
    """The embedder's optimizer state by `parameter|key`."""
    return load_file(checkpoint / _OPTIMIZER)


def load_head(checkpoint: Path, manifest: Manifest, head: Head) -> None:
    """Fill a worker's classes from whichever files hold them, for any number of workers then or
    now, and what all workers share.

    Rows go from the mapped files straight to their places: nothing of the size of the classes is
    held beside them.

    Raises:
        UsageError: if the checkpoint has another number of classes, or its tensors are not those of
            this head: another name, shape or kind of number, or a file that cannot be read.
    """
    partition = head.partition
    if manifest.num_classes != partition.num_classes:
        raise UsageError(
            f"checkpoint {checkpoint} has {manifest.num_classes} classes, the data "
            f"{partition.num_classes}; resume with its data set and data.num_classes"
        )
    own, found = head.shard_tensors(), {}
    for start, stop, name in sorted(manifest.class_files):
        first, last = max(start, partition.start), min(stop, partition.stop)
        if first >= last:
            continue
        try:
            with safe_open(checkpoint / name, framework="pt") as file:
                for key in sorted(own.keys() & set(file.keys())):
                    rows, place = file.get_slice(key), own[key]
                    expected = [stop - start, *place.shape[1:]] if place.ndim else []
                    if rows.get_shape() != expected:
                        shape = rows.get_shape()
                        raise _unfit(checkpoint, f"{name}: {key} is {shape}, expected {expected}")
                    if not place.ndim:
                        found[key] = file.get_tensor(key)
                        continue
                    piece = rows[first - start : last - start]
                    # Between kinds of floats values are rounded; integers would lose their meaning.
                    if piece.is_floating_point() != place.is_floating_point():
                        kinds = f"{piece.dtype}, expected {place.dtype}"
                        raise _unfit(checkpoint, f"{name}: {key} is of {kinds}")
                    place[first - partition.start : last - partition.start].copy_(piece)
                    found[key] = place
        except (SafetensorError, OSError) as error:
            raise _unfit(checkpoint, f"{name}: {' '.join(str(error).split()):.200}") from None
    # An optimizer's state that is missing starts anew; what the head consists of does not.
    if missing := sorted(key for key in own if "|" not in key and key not in found):
        raise _unfit(checkpoint, f"its files of classes lack {', '.join(missing)}")
    # What has been filled is copied onto itself; the rest is this function's to place.
    head.load_shard_tensors(found)
    if not head.shared_tensors():
        return
    if SHARED not in manifest.files:
        raise _unfit(checkpoint, f"it lacks {SHARED}")
    try:
        head.load_shared_tensors(load_file(checkpoint / SHARED))
    except UsageError:
        raise
    # Each head has tensors of its own kind in there, one of them JSON.
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise _unfit(checkpoint, f"{SHARED}: {' '.join(str(error).split()):.200}") from None


def _unfit(checkpoint: Path, reason: str) -> UsageError:
    return UsageError(
        f"checkpoint {checkpoint} does not fit the configuration ({reason}); resume with the "
        "sections `model`, `loss`, `classes` and `proxies` of its config.yaml, or start a new "
        "run.name"
    )
