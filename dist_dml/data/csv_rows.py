"""Rows of a user's CSV file, with the place of every mistake."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from dist_dml.errors import UsageError


def csv_rows(path: Path, delimiter: str = ",") -> Iterator[tuple[str, dict[str, str]]]:
    """How messages call a row ("FILE line 3"), and the row by column name, in the header's order.

    Raises:
        UsageError: the file cannot be read, or a row has more or fewer columns than the header.
    """
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            header = [name.strip() for name in next(reader, [])]
            if len(set(header)) < len(header):
                raise UsageError(f"{path} line 1: a column comes twice; rename one")
            for fields in reader:
                line = reader.line_num
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise UsageError(
                        f"{path} line {line}: has {len(fields)} columns, the header "
                        f"{len(header)}; quote texts that hold the delimiter"
                    )
                yield f"{path} line {line}", dict(zip(header, fields, strict=True))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); give a CSV file") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} near line {line + 1}: cannot be read as UTF-8 csv ({error}); correct it"
        ) from None
