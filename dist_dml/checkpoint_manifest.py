"""What a checkpoint says about itself: where training stood, and that its files are whole.

A manifest's own checksum says that nobody damaged it, not that what it says makes sense: another
program, or another version, may have written it. So every field is checked before anything follows
from it. Files are called by plain names, and are files and no links: no manifest makes us read
outside its folder, and a checkpoint that was copied or moved is whole without anything beside it.
The folder itself may be a link.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, JsonValue, ValidationError, model_validator

from dist_dml.errors import UsageError
from dist_dml.strict_json import Natural, StrictModel, first_problem, read_object

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_ALWAYS = ("config.yaml", "embedder.safetensors", "optimizer.safetensors")
"""What every checkpoint holds besides its classes."""
_MOST_BYTES = 2**24
"""Of a manifest: a worker's two entries take 300, so 50,000 workers fit."""


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


_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")]
_Part = Annotated[tuple[Natural, Natural, _FileName], Field(strict=False)]
"""Not strict about one thing: JSON has no tuples."""


class _StoredProgress(StrictModel):
    """`Progress` in a manifest. Fields with defaults are younger than the first checkpoints."""

    step: Natural
    images_seen: Natural
    seconds: Annotated[float, Field(ge=0)]
    best_score: float | None
    best_step: Natural | None
    ledger: int = 0
    skipped: Annotated[tuple[Natural, ...], Field(strict=False)] = ()


class _StoredFile(StrictModel):
    """What is known of a file."""

    bytes: Natural
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _StoredManifest(StrictModel):
    """`Manifest` without its checksum and format version."""

    progress: _StoredProgress
    plan: dict[str, JsonValue]
    num_classes: Annotated[Natural, Field(ge=1)]
    config_hash: str
    class_files: list[_Part]
    files: dict[_FileName, _StoredFile]
    extra: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _parts_agree(self) -> _StoredManifest:
        steps = self.plan.get("steps_per_epoch", 1)
        if type(steps) is not int or steps < 1:
            raise ValueError(f"plan.steps_per_epoch={steps!r:.40}: expected a number from 1")
        if absent := [name for name in _ALWAYS if name not in self.files]:
            raise ValueError(f"files lacks {absent[0]}")
        names = [name for _, _, name in self.class_files]
        if absent := [name for name in names if name not in self.files]:
            raise ValueError(f"class_files has {absent[0]}, which files lacks")
        if len(set(names)) < len(names):
            raise ValueError("class_files has a name twice")
        bounds = [0]
        for start, stop, name in sorted(self.class_files):
            if start != bounds[-1] or stop <= start:
                raise ValueError(
                    f"class_files has {start}..{stop} in {name}, expected some from {bounds[-1]}"
                )
            bounds.append(stop)
        if bounds[-1] != self.num_classes:
            raise ValueError(
                f"class_files ends at {bounds[-1]}, expected num_classes={self.num_classes}"
            )
        return self


def manifest_checksum(contents: dict[str, Any]) -> str:
    """The checksum of the manifest itself, which no other file vouches for."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def prune_checkpoints(folder: Path, keep_last: int, best_step: int | None) -> None:
    """Remove all but the newest `keep_last` checkpoints and the best one.

    A best one that could not be written does not cost the one before it: without a checkpoint of
    `best_step`, the newest one that was the best of its time stays.

    Args:
        folder: of the checkpoints.
        keep_last: 1 or more.
        best_step: of the best evaluation so far.
    """
    steps = checkpoint_steps(folder)
    kept = {*steps[-keep_last:], best_step}
    if best_step is not None and best_step not in steps:
        kept.add(next((step for step in reversed(steps) if _was_best(folder, step)), None))
    for step in steps:
        if step not in kept:
            remove_checkpoint(folder, step)


def remove_checkpoint(folder: Path, step: int) -> None:
    """Remove one checkpoint, as far as the disk lets us."""
    shutil.rmtree(_folder_of(folder, step), ignore_errors=True)


def _was_best(folder: Path, step: int) -> bool:
    try:
        return read_manifest(_folder_of(folder, step)).progress.best_step == step
    except UsageError:  # Nothing is known of it.
        return False


def _folder_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}"


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of all checkpoints, ascending; of names that are ours alone."""
    numbers = [path.name.removeprefix("step-") for path in folder.glob("step-*")]
    steps = sorted(int(text) for text in numbers if text.isascii() and text.isdecimal())
    return [step for step in steps if f"{step:09d}" in numbers]


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        UsageError: if it is missing, not JSON, lacks a field or has another, has values that make
            no sense, or is of another format version.
    """
    try:
        if problem := _not_a_file(checkpoint / MANIFEST):
            raise _unreadable(checkpoint, f"{MANIFEST} {problem}")
        raw = read_object(checkpoint / MANIFEST, _MOST_BYTES)
        version, stated = raw.pop("format_version", None), raw.pop("sha256", None)
        if type(version) is not int:
            raise ValueError("format_version is missing or no number")
        if version != FORMAT_VERSION:
            raise UsageError(
                f"checkpoint {checkpoint} has format {version}, this version reads "
                f"{FORMAT_VERSION}; resume with the version that wrote it"
            )
        if not isinstance(stated, str):
            raise ValueError("sha256 is missing or no text")
        if stated != manifest_checksum({**raw, "format_version": version}):
            raise _unreadable(checkpoint, f"{MANIFEST} does not have the checksum it should")
        stored = _StoredManifest.model_validate(raw)
    except OSError as error:
        raise _unreadable(checkpoint, f"{MANIFEST}: {error.strerror}") from None
    except UsageError:
        raise
    except ValidationError as error:
        reason = f"{MANIFEST} is damaged: {first_problem(error)}"
        raise _unreadable(checkpoint, reason) from None
    except RecursionError:  # The checksum's turn, where reading just managed.
        raise _unreadable(checkpoint, f"{MANIFEST} is damaged: too many levels") from None
    except ValueError as error:
        raise _unreadable(checkpoint, f"{MANIFEST} is damaged: {error}") from None
    return Manifest(
        progress=Progress(**dict(stored.progress)),
        plan=stored.plan,
        num_classes=stored.num_classes,
        config_hash=stored.config_hash,
        class_files=stored.class_files,
        files={name: dict(entry) for name, entry in stored.files.items()},
        extra=stored.extra,
    )


def _not_a_file(path: Path) -> str:
    """Why a path is no file of a checkpoint; empty if it is one."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return "is a symbolic link; put the file itself there"
    return "" if stat.S_ISREG(mode) else "is no regular file"


def verify_checkpoint(checkpoint: Path) -> Manifest:
    """Read the manifest and compare every file's size and checksum with it.

    Raises:
        UsageError: naming the first file that is missing, short, altered or no regular file.
    """
    manifest = read_manifest(checkpoint)
    for name, entry in manifest.files.items():
        path = checkpoint / name
        try:
            if problem := _not_a_file(path):
                raise ValueError(problem)
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise ValueError(f"has {size} bytes, not {entry['bytes']}")
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != entry["sha256"]:
                raise ValueError("does not have the checksum it was written with")
        except OSError as error:
            raise _unreadable(checkpoint, f"{name}: {error.strerror}") from None
        except ValueError as error:
            raise _unreadable(checkpoint, f"{name} {error}") from None
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
    for step in reversed(checkpoint_steps(folder)):
        path = _folder_of(folder, step)
        try:
            return path, verify_checkpoint(path)
        except UsageError as error:
            problem = problem or error
    if problem is not None:
        raise problem
    return None
