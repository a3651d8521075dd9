"""Parquet files that are whole or absent, with checksums of their pages, and read without trust."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_dml.errors import UsageError
from dist_dml.whole_files import sync_folder


def write_parquet(path: Path, table: Any, stamp: Mapping[str, str]) -> None:
    """Replace `path` by a pyarrow table with `stamp` as metadata: readers see the old or the new.

    Written beside its name, flushed to the disk and renamed. Its pages have checksums: a bit that
    flips in a column of numbers makes another number, which nobody else would notice.
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
            pyarrow.parquet.write_table(
                stamped, stream, compression="zstd", write_page_checksum=True
            )
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def open_parquet(path: Path, buffer_bytes: int = 0) -> Iterator[Any]:
    """An open `pyarrow.parquet.ParquetFile`, whose pages are compared with their checksums.

    Whatever pyarrow says of the file while it is open, and whatever ValueError the caller raises
    about it, comes out as one line.

    Args:
        path: of the file.
        buffer_bytes: of each column in memory at a time; 0: a whole column of a row group, which is
            one read, and of any size in files that others wrote.

    Raises:
        ValueError: it cannot be read; begins with the file's name.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(
            path,
            page_checksum_verification=True,
            pre_buffer=not buffer_bytes,
            buffer_size=buffer_bytes,
        ) as file:
            yield file
    except UsageError:  # Of the caller, who has said it all.
        raise
    except (OSError, ValueError, LookupError, TypeError, pyarrow.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot read {path.name} ({reason:.200})") from None


def check_columns(file: Any, types: Mapping[str, Any]) -> None:
    """Refuse other columns before anything of their size is read.

    Args:
        file: from `open_parquet`.
        types: the pyarrow type of each column that must be there, once.

    Raises:
        ValueError: names the first column that is not as it should be.
    """
    schema = file.schema_arrow
    for name, kind in types.items():
        if schema.names.count(name) != 1:
            raise ValueError(f"it has the column {name} {schema.names.count(name)} times")
        if schema.field(name).type != kind:
            raise ValueError(f"{name} is of {schema.field(name).type}, expected {kind}")


def stamp_of(file: Any) -> dict[str, str]:
    """The metadata of an open Parquet file; bytes that are no text are shown as numbers."""
    found = file.schema_arrow.metadata or {}
    return {
        name.decode("ascii", "backslashreplace"): value.decode("utf-8", "backslashreplace")
        for name, value in found.items()
    }
