"""What a checkpoint says about itself: where training stood, and that its files are whole."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_dml.errors import UsageError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Progress:
    """Where training stood: all that a resumed run needs besides tensors.

    Random numbers are drawn from (seed, purpose, step, position), so `step` restores them all.
    """

    step: int = 0
    """Optimizer steps done."""
    images_seen: int = 0
    seconds: float = 0.0
    """Training time so far, of all runs together."""
    best_score: float | None = None
    best_step: int | None = None
    ledger: int = 0
    """Which rows were trained on, as one number (`dist_dml.batch_ledger`)."""
    skipped: tuple[int, ...] = ()
    """Steps whose batch was passed over after a loss that was not finite, ascending."""


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`.

    Attributes:
        plan: what the order of samples depends on: seed, batch size and so on, data fingerprint.
        num_classes: classes of the classifier.
        class_files: [start, stop, file name] of each worker's classes.
        files: bytes and sha256 of every file.
    """

    progress: Progress
    plan: dict[str, Any]
    num_classes: int
    config_hash: str
    class_files: list[tuple[int, int, str]]
    files: dict[str, dict[str, Any]]
    format_version: int = FORMAT_VERSION
    extra: dict[str, Any] = field(default_factory=dict)


def manifest_checksum(contents: dict[str, Any]) -> str:
    """The checksum of the manifest itself, which no other file vouches for."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def prune_checkpoints(folder: Path, keep_last: int, best_step: int | None) -> None:
    """Remove all but the newest `keep_last` checkpoints and the best one."""
    steps = sorted(_steps(folder))
    kept = {*steps[-keep_last:], best_step}
    for step in steps:
        if step not in kept:
            shutil.rmtree(folder / f"step-{step:09d}", ignore_errors=True)


def _steps(folder: Path) -> list[int]:
    names = [path.name for path in folder.glob("step-*") if path.suffix != ".tmp"]
    return [int(name.removeprefix("step-")) for name in names if name[5:].isdigit()]


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        UsageError: if it is missing, not JSON, lacks a field, or is of another format version.
    """
    path = checkpoint / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw["format_version"]
        if version != FORMAT_VERSION:
            raise UsageError(
                f"checkpoint {checkpoint} has format {version}, this version reads "
                f"{FORMAT_VERSION}; resume with the version that wrote it"
            )
        if raw.pop("sha256") != manifest_checksum(raw):
            raise _unreadable(checkpoint, f"{MANIFEST} does not have the checksum it should")
        progress = Progress(**raw.pop("progress"))
        parts = [(int(a), int(b), str(name)) for a, b, name in raw.pop("class_files")]
        return Manifest(progress=progress, class_files=parts, **raw)
    except OSError as error:
        raise _unreadable(checkpoint, f"{MANIFEST}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise _unreadable(checkpoint, f"{MANIFEST} is damaged") from None


def verify_checkpoint(checkpoint: Path) -> Manifest:
    """Read the manifest and compare every file's size and checksum with it.

    Raises:
        UsageError: naming the first file that is missing, short or altered.
    """
    manifest = read_manifest(checkpoint)
    for name, entry in manifest.files.items():
        try:
            size = (checkpoint / name).stat().st_size
            if size != entry["bytes"]:
                raise _unreadable(checkpoint, f"{name} has {size} bytes, not {entry['bytes']}")
            with (checkpoint / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise _unreadable(checkpoint, f"{name}: {error.strerror}") from None
        if digest != entry["sha256"]:
            raise _unreadable(checkpoint, f"{name} does not have the checksum it was written with")
    return manifest


def _unreadable(checkpoint: Path, reason: str) -> UsageError:
    return UsageError(
        f"checkpoint {checkpoint} is unreadable ({reason}); resume from another one with "
        "--resume PATH, or remove it and use --resume auto"
    )


def newest_checkpoint(folder: Path) -> tuple[Path, Manifest] | None:
    """The newest intact checkpoint below `folder`; damaged newer ones are passed over.

    Raises:
        UsageError: if there are checkpoints, but none is intact.
    """
    problem: UsageError | None = None
    for step in sorted(_steps(folder), reverse=True):
        path = folder / f"step-{step:09d}"
        try:
            return path, verify_checkpoint(path)
        except UsageError as error:
            problem = problem or error
    if problem is not None:
        raise problem
    return None
