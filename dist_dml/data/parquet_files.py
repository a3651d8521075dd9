"""Parquet files that are whole or absent."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_dml.whole_files import sync_folder


def write_parquet(path: Path, table: Any, stamp: Mapping[str, str]) -> None:
    """Replace `path` by a pyarrow table with `stamp` as metadata: readers see the old or the new.

    Written beside its name, flushed to the disk and renamed.
    """
    import pyarrow.parquet

    # Two processes may replace the same file; each writes its own.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    kept = {
        name: value
        for name, value in (table.schema.metadata or {}).items()
        if name == b"ARROW:schema"
    }
    stamped = table.replace_schema_metadata({**kept, **stamp})
    try:
        with temporary.open("wb") as stream:
            pyarrow.parquet.write_table(stamped, stream, compression="zstd")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def read_stamp(path: Path) -> dict[str, str]:
    """The metadata of a Parquet file.

    Raises:
        OSError: it cannot be read.
        pyarrow.ArrowException: it is damaged.
    """
    import pyarrow.parquet

    found = pyarrow.parquet.read_schema(path).metadata or {}
    return {name.decode(): value.decode() for name, value in found.items()}
