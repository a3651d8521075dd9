"""One shard: a plain WebDataset tar. Written whole or not at all; scanned into samples by offset.

Nothing in a shard is ever executed: members are found by their extension and read as bytes.
WebDataset's own `decode` unpickles some extensions, so it is not used anywhere.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dist_dml.errors import UsageError
from dist_dml.whole_files import sync_folder

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
LABEL_EXTENSIONS = ("cls", "json")
_BLOCK = 512
# As WebDataset splits a member's name: the key ends at the first dot of the last path component.
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")


@dataclass(frozen=True)
class Member:
    """Where the bytes of one file lie inside its tar."""

    extension: str
    offset: int
    size: int


@dataclass(frozen=True)
class ScannedSample:
    """One key of a shard: its image and its label members, `cls` or `json` or both."""

    key: str
    image: Member
    labels: Mapping[str, Member]


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case extension of a tar member, or None for a name that WebDataset ignores."""
    match = _NAME.match(name)
    return (match.group(1), match.group(2).lower()) if match else None


def write_shard(path: Path, samples: Iterable[Mapping[str, str | bytes]]) -> int:
    """Write samples to the tar `path`, which appears under its name only when it is complete.

    The bytes depend on the samples alone: times, owners and modes are fixed. The tar is written to
    `path` + ".tmp", flushed to the disk and renamed; a leftover ".tmp" is overwritten.

    Args:
        path: final name of the tar.
        samples: each with `__key__` (str) and one `bytes` value per extension.

    Returns:
        The number of samples written.
    """
    from webdataset.writer import TarWriter

    temporary = path.with_name(path.name + ".tmp")
    count = 0
    try:
        with temporary.open("wb") as stream:
            with TarWriter(
                stream,
                user="dist_dml",
                group="dist_dml",
                mode=0o444,
                encoder=False,
                mtime=0,
                format="GNU_FORMAT",  # USTAR refuses names of more than 100 bytes.
            ) as writer:
                for sample in samples:
                    writer.write(dict(sample))
                    count += 1
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return count


def scan_shard(path: Path) -> list[ScannedSample]:
    """The samples of an uncompressed tar in the order of their first members.

    Members with other extensions are ignored. Costs about 0.1 ms a sample, once per data set.

    Raises:
        UsageError: if the file is missing, no tar, cut short, or holds a key twice, a key with two
            images, an image without label or a label without image. Names shard and key.
    """
    found: dict[str, dict[str, Member]] = {}
    try:
        with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                _collect(path, member, found)
                # tarfile keeps every member it has seen; a shard of a million would fill memory.
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
            _check_end(path, stream, tar.offset)
    except FileNotFoundError:
        raise UsageError(f"shard {path}: no such file; check the path") from None
    except IsADirectoryError:
        raise UsageError(f"shard {path}: is a folder; give a tar") from None
    except tarfile.TarError as error:
        hint = "it is empty, cut short or not an uncompressed tar"
        raise UsageError(f"shard {path}: {hint} ({error}); write or copy it again") from None
    return [_sample(path, key, members) for key, members in found.items()]


def _collect(path: Path, member: tarfile.TarInfo, found: dict[str, dict[str, Member]]) -> None:
    """Add one tar member to `found` if it is a file with one of the accepted extensions."""
    split = split_name(member.name)
    if split is None or not member.isreg():
        return
    key, extension = split
    if extension not in IMAGE_EXTENSIONS and extension not in LABEL_EXTENSIONS:
        return
    if member.issparse():
        raise UsageError(f"shard {path}: {member.name} is a sparse file; write the tar without -S")
    members = found.setdefault(key, {})
    if extension in members:
        raise UsageError(
            f"shard {path}: key {key} has two .{extension} members; give every sample its own key"
        )
    members[extension] = Member(extension, member.offset_data, member.size)


def _check_end(path: Path, stream: BinaryIO, offset: int) -> None:
    """A tar ends with zeros. `tarfile` accepts one that was cut between two members: we do not.

    Raises:
        UsageError: if the end-of-archive block is missing, or data follow it (tars joined by `cat`,
            whose later members a reader would silently lose).
    """
    stream.seek(offset)
    block = stream.read(_BLOCK)
    if len(block) < _BLOCK:
        raise UsageError(f"shard {path}: cut short at byte {offset}; write or copy it again")
    while block:
        if block.count(0) != len(block):
            raise UsageError(
                f"shard {path}: damaged at byte {offset}, or tars joined by cat; write it again"
            )
        block = stream.read(1 << 20)


def _sample(path: Path, key: str, members: dict[str, Member]) -> ScannedSample:
    images = [members[extension] for extension in IMAGE_EXTENSIONS if extension in members]
    labels = {name: members[name] for name in LABEL_EXTENSIONS if name in members}
    if not images:
        wanted = ", .".join(IMAGE_EXTENSIONS)
        raise UsageError(
            f"shard {path}: key {key} has no image (.{wanted}); was the tar cut short?"
        )
    if len(images) > 1:
        names = " and .".join(image.extension for image in images)
        raise UsageError(f"shard {path}: key {key} has two images (.{names}); keep one")
    if not labels:
        raise UsageError(
            f"shard {path}: key {key} has no label; add {key}.cls (or .json with the label)"
        )
    return ScannedSample(key, images[0], labels)
