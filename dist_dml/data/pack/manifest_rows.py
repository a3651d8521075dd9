"""A manifest, CSV or Parquet, as an array of texts: number, path or URL, label, other columns."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_dml.credentials import redact
from dist_dml.data.csv_rows import csv_rows
from dist_dml.data.pack.url_images import is_url
from dist_dml.errors import UsageError

NUMBER, PATH, LABEL, OTHERS = range(4)
"""Columns of the rows."""
OWN_KEYS = ("label", "file", "url", "row")
"""What the `.json` of a sample says besides the other columns."""
_BATCH = 10_000
_SPLIT = re.compile(r"[a-z][a-z0-9_]*")
_KINDS = {".csv": ",", ".tsv": "\t", ".parquet": ""}


@dataclass(frozen=True)
class ManifestColumns:
    """Names of the columns. An empty `path` takes `path` or `url`, an empty `split` `split`."""

    path: str = ""
    label: str = "label"
    split: str = ""


@dataclass(frozen=True, eq=False)
class Manifest:
    """What a manifest says.

    Attributes:
        rows: texts, n x 4: number of the row, path or URL, label, the other columns as JSON. About
            400 bytes a row while it is read, 200 after that; 6 us a row (2026-11).
        split: split of each row as a code, -1 everywhere without that column.
        split_names: the split of code i.
    """

    rows: np.ndarray
    split: np.ndarray
    split_names: tuple[str, ...]


def read_manifest(path: Path, columns: ManifestColumns, root: Path, anywhere: bool) -> Manifest:
    """Read a whole manifest and check each row.

    Args:
        path: a `.csv`, `.tsv` or `.parquet` file.
        columns: names of its columns.
        root: the folder that relative paths start from, resolved.
        anywhere: whether a path may be absolute or lead out of `root`; it is then stored relative
            to it.

    Raises:
        UsageError: the file cannot be read, lacks a column, or a row has an empty or odd value;
            names the row.
    """
    if path.suffix.lower() not in _KINDS:
        raise UsageError(f"{path}: expected a manifest .csv, .tsv or .parquet")
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give a manifest .csv, .tsv or .parquet")
    delimiter = _KINDS[path.suffix.lower()]
    rows = csv_rows(path, delimiter) if delimiter else _parquet_rows(path)
    names: tuple[str, str, str] | None = None
    parts, splits, codes = [], [], {}
    texts: list[tuple[str, str, str, str]] = []
    for number, (where, row) in enumerate(rows):
        if names is None:
            names = _names(path, row, columns)
        place, label, split = names
        texts.append(
            (
                str(number),
                _place(where, row[place], root, anywhere),
                _label(where, row[label]),
                _others(where, row, names),
            )
        )
        splits.append(codes.setdefault(_split(where, row[split]), len(codes)) if split else -1)
        if len(texts) == _BATCH:
            parts.append(np.array(texts, np.dtypes.StringDType()))
            texts = []
    parts += [np.array(texts, np.dtypes.StringDType())] if texts else []
    if not parts:
        raise UsageError(f"{path}: has no row below its header; nothing to pack")
    return Manifest(np.concatenate(parts), np.array(splits, np.int16), tuple(codes))


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The same of a Parquet file, values as Python objects; 10,000 rows at a time."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH):
                for row in batch.to_pylist():
                    yield f"{path} row {number}", row
                    number += 1
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0][:120]
        raise UsageError(f"{path}: no readable Parquet file ({reason}); write it again") from None


def _names(path: Path, row: Mapping[str, Any], columns: ManifestColumns) -> tuple[str, str, str]:
    """Names of the columns of path, label and split; the last one may be "".

    Raises:
        UsageError: there is no such column.
    """
    place = columns.path or next((name for name in ("path", "url") if name in row), "path")
    split = columns.split or ("split" if "split" in row else "")
    for option, name in (
        ("--path-column", place),
        ("--label-column", columns.label),
        ("--split-column", split),
    ):
        if name and name not in row:
            raise UsageError(
                f"{path}: has no column {name!r} (it has {', '.join(map(str, row))[:120]}); name "
                f"it with {option}"
            )
    return place, columns.label, split


def _place(where: str, value: Any, root: Path, anywhere: bool) -> str:
    """A URL, or a path below `root`."""
    text = value.strip() if isinstance(value, str) else ""
    if not text or "\0" in text:
        raise UsageError(f"{where}: its path is {value!r:.40}, expected a path or a URL")
    if is_url(text):
        return text
    if "://" in text:
        shown = redact(text)[:80]
        raise UsageError(f"{where}: {shown!r}: only http:// and https:// are fetched")
    leads_out = os.path.isabs(text) or ".." in text.split("/")
    if leads_out and not anywhere:
        raise UsageError(
            f"{where}: {text[:80]!r} leads out of {root}; correct it, set --root, or allow it with "
            "--anywhere"
        )
    # Below the resolved root, ".." means the same to the program and to the kernel.
    return os.path.relpath(text, root) if os.path.isabs(text) else text


def _label(where: str, value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # A column of integers with a gap is a column of floats.
    if isinstance(value, bool) or not isinstance(value, (int, str)) or not str(value).strip():
        raise UsageError(f"{where}: its label is {value!r:.40}, expected a name or an integer")
    return str(value).strip()


def _split(where: str, value: Any) -> str:
    text = value.strip().lower() if isinstance(value, str) else ""
    if not _SPLIT.fullmatch(text):
        raise UsageError(
            f"{where}: its split is {value!r:.40}, expected a name of a-z, 0-9 and _, like train"
        )
    return text


def _others(where: str, row: Mapping[str, Any], names: tuple[str, str, str]) -> str:
    """The other columns as JSON; a name that a sample's `.json` uses itself gets a `_`."""
    others = {
        f"{name}_" if name in OWN_KEYS else str(name): _plain(where, name, value)
        for name, value in row.items()
        if name not in names
    }
    return json.dumps(others, default=str, ensure_ascii=False)


def _plain(where: str, name: str, value: Any) -> Any:
    """A value that JSON knows; dates and decimals become text."""
    if isinstance(value, bytes):
        raise UsageError(f"{where}: column {name!r} holds bytes; leave it out of the manifest")
    return None if isinstance(value, float) and not math.isfinite(value) else value
