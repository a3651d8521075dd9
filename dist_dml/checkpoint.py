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

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

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


def save_checkpoint(
    folder: Path,
    contents: Contents,
    engine: Engine,
    head: Head,
    world: World,
) -> Path:
    """Write a checkpoint; called by all workers together. Returns its folder.

    Raises:
        RunError: on every worker, if any of them could not write. Nothing under a final name has
            changed then, and the temporary folder is removed.
    """
    final = folder / f"step-{contents.progress.step:09d}"
    temporary = final.with_name(final.name + ".tmp")
    tensors = {}
    optimizer_state = engine.optimizer_tensors()
    if world.is_first:
        tensors[_EMBEDDER] = dict(engine.embedder.state_dict())
        tensors[_OPTIMIZER] = optimizer_state
        if shared := head.shared_tensors():
            tensors[SHARED] = shared
    partition = head.partition
    class_file = f"classes-{world.rank:05d}-of-{world.size:05d}.safetensors"
    tensors[class_file] = head.shard_tensors()

    try:
        _agree(world, lambda: _start_folder(temporary) if world.is_first else None)
        written = _agree(world, lambda: _write_files(temporary, tensors, contents, world))
        parts = gather_objects((partition.start, partition.stop, class_file), world.group)
        files = {name: entry for worker in written for name, entry in worker.items()}
        manifest = Manifest(
            contents.progress,
            contents.plan,
            partition.num_classes,
            contents.config_hash,
            parts,
            files,
        )
        _agree(
            world, lambda: finish_checkpoint(temporary, final, manifest) if world.is_first else None
        )
    except RunError:
        # All have agreed to give up. Removed earlier, the folder would vanish under a worker that
        # still writes, whose own error would then hide the reason.
        if world.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _agree(world: World, action: Callable[[], Any]) -> list[Any]:
    """Every worker's result, or the same RunError on all: nobody waits for one that gave up."""
    try:
        outcome, problem = action(), None
    except (OSError, SafetensorError) as error:
        outcome, problem = None, f"worker {world.rank}: {error}"
    outcomes = gather_objects((outcome, problem), world.group)
    for _, reason in outcomes:
        if reason is not None:
            raise RunError(
                f"the checkpoint was not written ({reason}); free space or mend the disk below "
                "run.root: earlier checkpoints are untouched, resume with --resume auto"
            )
    return [result for result, _ in outcomes]


def _start_folder(temporary: Path) -> None:
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)


def _write_files(
    temporary: Path, tensors: dict[str, dict[str, Tensor]], contents: Contents, world: World
) -> dict[str, dict[str, Any]]:
    entries = {}
    for name, values in tensors.items():
        # Tensors may be views of one another's storage (DDP's buckets), which is refused.
        on_cpu = {key: value.detach().cpu().contiguous() for key, value in values.items()}
        save_file(on_cpu, temporary / name)
        entries[name] = flushed_entry(temporary / name)
    if world.is_first:
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
