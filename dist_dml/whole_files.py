"""Files that are whole or absent: written beside their name, flushed to the disk, renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` by `content` as JSON: readers see the old file or the new one."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`: readers see the old file or the new one."""
    with replaced(path) as stream:
        stream.write(text.encode())


@contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """A stream whose content replaces `path` when the block ends well: readers see old or new."""
    # Two processes may replace the same file; each writes its own.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:  # A full disk leaves a part of it.
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
