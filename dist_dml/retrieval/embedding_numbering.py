"""Labels and ids of embedding files as numbers: the same for the same, in one file or in two."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from dist_dml.errors import UsageError


@dataclass(frozen=True)
class RawTable:
    """Files of one path, read and not yet numbered."""

    path: Path
    vectors: np.ndarray
    """Of `rows`; everything else is of all rows."""
    rows: slice
    ids: Any
    """A pyarrow array, or None."""
    labels: Any
    metadata: dict[str, list[Any]]
    facts: dict[str, str]
    id_kind: str | None
    label_kind: str


def join_columns(parts: Sequence[dict[str, Any]], name: str, kind: str | None, path: Path) -> Any:
    """A column of ids or labels of all parts, as one pyarrow array of int64 or large_string.

    Raises:
        UsageError: an integer is beyond int64.
    """
    import pyarrow

    target = pyarrow.int64() if kind == "int" else pyarrow.large_string()
    try:
        return pyarrow.concat_arrays([part[name].cast(target) for part in parts if len(part[name])])
    except pyarrow.ArrowInvalid:
        raise UsageError(
            f"{path}: column {name!r:.80} holds 2^63 or more; write such numbers as strings"
        ) from None


def number_labels(raws: Sequence[RawTable]) -> tuple[list[Any], list[Int64[np.ndarray, " _"]]]:
    """The labels of all tables, sorted, and the number of each row's.

    Raises:
        UsageError: one is negative.
    """
    if raws[0].label_kind == "int":
        columns = [raw.labels.to_numpy() for raw in raws]
        for raw, column in zip(raws, columns, strict=True):
            if column.min() < 0:
                raise UsageError(
                    f"{raw.path}: row {column.argmin()} has label {column.min()}, expected 0 or "
                    "more; leave samples without a label out, or give each a label of its own"
                )
        values, places = np.unique(np.concatenate(columns), return_inverse=True)
        written: list[Any] = values.tolist()
    else:
        places, dictionary = _encode([raw.labels for raw in raws])
        texts = dictionary.to_pylist()
        order = sorted(range(len(texts)), key=texts.__getitem__)
        number = np.empty(len(texts), np.int64)
        number[order] = np.arange(len(texts))
        places, written = number[places], [texts[i] for i in order]
    ends = np.cumsum([len(raw.labels) for raw in raws])[:-1]
    return written, [part.astype(np.int64) for part in np.split(places, ends)]


def number_ids(raws: Sequence[RawTable]) -> list[Int64[np.ndarray, " _"]]:
    """The number of each row's id, no number twice in one table.

    Raises:
        UsageError: an id is in a table twice.
    """
    if any(raw.ids is None for raw in raws):
        # Nothing says that a sample is in both.
        for raw in raws:
            if raw.ids is not None:
                number_ids([raw])
        starts = np.cumsum([0, *(len(raw.labels) for raw in raws)])
        return [np.arange(a, b) for a, b in itertools.pairwise(starts.tolist())]
    if raws[0].id_kind == "int":
        # pyarrow's own memory is read-only, which torch warns of.
        numbers = [raw.ids.to_numpy().copy() for raw in raws]
    else:
        places, _ = _encode([raw.ids for raw in raws])
        ends = np.cumsum([len(raw.ids) for raw in raws])[:-1]
        numbers = np.split(places.astype(np.int64), ends)
    for raw, column in zip(raws, numbers, strict=True):
        order = np.argsort(column, kind="stable")
        same = np.flatnonzero(np.diff(column[order]) == 0)
        if len(same):
            rows = order[same[0] : same[0] + 2]
            raise UsageError(
                f"{raw.path}: id {raw.ids[int(rows[0])].as_py()!r:.80} is in rows {rows[0]} and "
                f"{rows[1]}; an id names one sample, leave out what is there twice"
            )
    return numbers


def _encode(columns: Sequence[Any]) -> tuple[np.ndarray, Any]:
    """Places of texts in the dictionary of all, and that dictionary."""
    import pyarrow

    encoded = pyarrow.concat_arrays(columns).dictionary_encode()
    return encoded.indices.to_numpy(), encoded.dictionary
