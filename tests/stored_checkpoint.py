"""A small checkpoint on the disk, without a training, for tests of what is read back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from dist_dml.checkpoint import finish_checkpoint, flushed_entry
from dist_dml.checkpoint_manifest import MANIFEST, Manifest, Progress, manifest_checksum
from dist_dml.config_loading import config_hash, resolve, to_yaml
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.classifier import ClassParallelClassifier

NUM_CLASSES = 11
FIRST, SECOND = "classes-00000-of-00002.safetensors", "classes-00001-of-00002.safetensors"
CONFIG = resolve(None, []).config
PROGRESS = Progress(2, 14, 1.5, 0.25, 1)


def small_head(start: int = 0, stop: int = NUM_CLASSES) -> ClassParallelClassifier:
    """All or some of 11 classes with 6 features, biases and AdamW's two moments."""
    partition = ClassPartition(start, stop, NUM_CLASSES)
    return ClassParallelClassifier(6, partition, CONFIG.loss, CONFIG.optimizer, 0, 7)


def store(
    folder: Path,
    progress: Progress = PROGRESS,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Write the checkpoint of two workers.

    Args:
        folder: of the checkpoints.
        progress: whose step names the checkpoint.
        tensors: in the place of a file's, by its name.
    """
    final = folder / f"step-{progress.step:09d}"
    temporary = final.with_name("being-written")
    temporary.mkdir(parents=True)
    contents = {
        FIRST: small_head(0, 6).shard_tensors(),
        SECOND: small_head(6, NUM_CLASSES).shard_tensors(),
        "embedder.safetensors": {},
        "optimizer.safetensors": {},
        **(tensors or {}),
    }
    for name, values in contents.items():
        save_file({key: value.contiguous() for key, value in values.items()}, temporary / name)
    (temporary / "config.yaml").write_text(to_yaml(CONFIG))
    files = {path.name: flushed_entry(path) for path in sorted(temporary.iterdir())}
    parts = [(0, 6, FIRST), (6, NUM_CLASSES, SECOND)]
    plan = {"seed": 0, "fingerprint": "abc", "steps_per_epoch": 5, "weights": [0.5, 0.5]}
    manifest = Manifest(progress, plan, NUM_CLASSES, config_hash(CONFIG), parts, files)
    finish_checkpoint(temporary, final, manifest)
    return final


def copy_of(checkpoint: Path, step: int, best_step: int | None) -> Path:
    """Another step's checkpoint with the same tensors."""
    copy = checkpoint.with_name(f"step-{step:09d}")
    shutil.copytree(checkpoint, copy)
    contents = contents_of(copy)
    contents["progress"] |= vars(replace(PROGRESS, step=step, best_step=best_step))
    write_contents(copy, contents)
    return copy


def contents_of(checkpoint: Path) -> dict[str, Any]:
    """The manifest without its checksum."""
    contents = json.loads((checkpoint / MANIFEST).read_text())
    del contents["sha256"]
    return contents


def write_contents(checkpoint: Path, contents: Any) -> None:
    """Put a manifest there whose own checksum is right, whatever it says."""
    if isinstance(contents, dict):
        contents = {**contents, "sha256": manifest_checksum(contents)}
    (checkpoint / MANIFEST).write_text(json.dumps(contents))
