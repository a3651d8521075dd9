"""Scores of every single query as a small Parquet file, so that runs can be compared in pairs.

`report/queries.parquet` has a row for each protocol, distance and query: `protocol`, `distance`,
`id`, `label`, `has_match`, `recall_at_1`, `r_precision`, `map_at_r`; about 10 bytes a row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64

from dist_dml.data.parquet_files import check_columns, open_parquet, stamp_of, write_parquet
from dist_dml.errors import UsageError
from dist_dml.retrieval.metrics import QueryScores

FILE = "queries.parquet"
SCORES = ("recall_at_1", "r_precision", "map_at_r")
_FORMAT = "dist_dml queries 1"


@dataclass(frozen=True)
class StoredQueries:
    """The scores of one protocol by one distance, in the order of the ids."""

    ids: Int64[np.ndarray, " q"]
    labels: Int64[np.ndarray, " q"]
    has_match: Bool[np.ndarray, " q"]
    scores: dict[str, Float32[np.ndarray, " q"]]
    """By the names in `SCORES`."""


@dataclass(frozen=True)
class QueryFile:
    """What a run's file says."""

    fingerprint: str
    """Of the data set."""
    checkpoint: str
    protocols: dict[str, list[str]]
    """Query and gallery split, by the protocol's name."""
    found: dict[tuple[str, str], StoredQueries]
    """By protocol and distance, in the order of the configuration."""


def write_query_scores(
    path: Path,
    scores: Mapping[tuple[str, str], tuple[Int64[np.ndarray, " _"], QueryScores]],
    protocols: Mapping[str, tuple[str, str]],
    fingerprint: str,
    checkpoint: str,
) -> None:
    """Replace `path`, whole or not at all.

    Args:
        path: the file.
        scores: sample ids and scores of the queries by protocol and distance.
        protocols: query and gallery split, by name.
        fingerprint: of the data set.
        checkpoint: what was measured.
    """
    import pyarrow as pa

    name = pa.dictionary(pa.int32(), pa.string())
    tables = []
    for (protocol, distance), (ids, every) in scores.items():
        columns = {
            "protocol": pa.array([protocol] * len(ids), name),
            "distance": pa.array([distance] * len(ids), name),
            "id": pa.array(ids),
            "label": pa.array(every.query_label),
            "has_match": pa.array(every.has_match),
            "recall_at_1": pa.array(every.precision_at_1.astype(np.float32)),
            "r_precision": pa.array(every.r_precision.astype(np.float32)),
            "map_at_r": pa.array(every.map_at_r.astype(np.float32)),
        }
        tables.append(pa.table(columns))
    table = pa.concat_tables(tables).unify_dictionaries()
    stamp = {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "checkpoint": checkpoint,
        "protocols": json.dumps({key: list(splits) for key, splits in protocols.items()}),
    }
    write_parquet(path, table, stamp)


def read_query_scores(path: Path) -> QueryFile:
    """The file of a run.

    Raises:
        UsageError: if it is damaged or of another format; names it and says what to do.
    """
    try:
        with open_parquet(path) as file:
            stamp = stamp_of(file)
            if stamp.get("format") != _FORMAT:
                raise ValueError(f"its format is {stamp.get('format')!r}, expected {_FORMAT!r}")
            check_columns(file, _types())
            table = file.read(list(_types()))
            protocols = json.loads(stamp["protocols"])
            return QueryFile(
                stamp["fingerprint"], stamp["checkpoint"], protocols, _by_protocol(table)
            )
    except ValueError as error:
        raise UsageError(f"{path}: {error}; write it again with `dist-dml evaluate`") from None


def _types() -> dict[str, Any]:
    import pyarrow as pa

    name = pa.dictionary(pa.int32(), pa.string())
    scores = dict.fromkeys(SCORES, pa.float32())
    return {
        "protocol": name,
        "distance": name,
        "id": pa.int64(),
        "label": pa.int64(),
        "has_match": pa.bool_(),
    } | scores


def _by_protocol(table: Any) -> dict[tuple[str, str], StoredQueries]:
    if any(table[name].null_count for name in table.column_names):
        raise ValueError("it has empty cells")
    # Names as numbers: a comparison of texts a row would cost more than all else.
    columns = {
        name: table[name].combine_chunks().to_numpy(zero_copy_only=False)
        for name in table.column_names
        if name not in ("protocol", "distance")
    }
    names, codes = {}, {}
    for key in ("protocol", "distance"):
        encoded = table[key].unify_dictionaries().combine_chunks()
        names[key] = encoded.dictionary.to_pylist()
        codes[key] = encoded.indices.to_numpy()
    both = codes["protocol"].astype(np.int64) * len(names["distance"]) + codes["distance"]
    values, first = np.unique(both, return_index=True)
    found = {}
    for value in values[np.argsort(first)]:
        rows = np.flatnonzero(both == value)
        rows = rows[np.argsort(columns["id"][rows], kind="stable")]
        protocol, distance = divmod(int(value), len(names["distance"]))
        found[names["protocol"][protocol], names["distance"][distance]] = StoredQueries(
            columns["id"][rows],
            columns["label"][rows],
            columns["has_match"][rows],
            {score: columns[score][rows] for score in SCORES},
        )
    return found
