"""Files of embeddings as raw tables: one file, a folder of parts, or several models' side by side.

Dimensions: `n` samples, embeddings of width `D`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dist_dml.data.plan import worker_slice
from dist_dml.data.progress import ProgressLine
from dist_dml.errors import UsageError
from dist_dml.retrieval.distances import unit_length
from dist_dml.retrieval.embedding_columns import ColumnNames, Footer, read_columns, read_footer
from dist_dml.retrieval.embedding_manifest import finished_parts
from dist_dml.retrieval.embedding_numbering import (
    RawTable,
    join_columns,
    number_ids,
    number_labels,
)
from dist_dml.usable import usable_memory

Share = tuple[int, int]
"""Which of how many parts of the rows' embeddings a worker reads."""
WHOLE: Share = (0, 1)
_SHOWN_FROM_BYTES = 2**29
"""Half a gigabyte takes some seconds to read."""


def read_side_by_side(
    paths: Sequence[Path],
    names: ColumnNames,
    metadata: Sequence[str] | None,
    share: Share = WHOLE,
) -> RawTable:
    """The same samples embedded by several models, as one: each at length 1, and the whole again.

    What papers report for k folds as "concatenated" (MLRC; `protocol_scores.concatenate`). Rows are
    those of the first file, whose metadata are kept; the others are brought in order by id. One
    path is read as it is.

    Raises:
        UsageError: as `embedding_files.read_embeddings`, or the files do not hold the same samples:
            ids that are missing, more or of another type, other labels, no ids; or a share is
            asked for of several: their rows are in different orders.
    """
    if len(paths) > 1 and share != WHOLE:
        raise UsageError(
            f"{len(paths)} models side by side are brought in order by one process; start it "
            "without a launcher"
        )
    tables = [
        read_raw(path, names, metadata if i == 0 else [], share) for i, path in enumerate(paths)
    ]
    first = tables[0]
    if len(tables) == 1:
        return first
    parts = [first.vectors]
    for other in tables[1:]:
        parts.append(other.vectors[_rows_in_order(first, other)])
    vectors = unit_length(np.concatenate([unit_length(part) for part in parts], axis=1))
    facts = {
        key: value
        for key, value in first.facts.items()
        if all(other.facts.get(key) == value for other in tables[1:])
    }
    return replace(first, vectors=vectors, facts=facts)


def _rows_in_order(first: RawTable, other: RawTable) -> np.ndarray:
    """Rows of the other table in the order of the first one's ids."""
    for table in (first, other):
        if table.ids is None:
            raise UsageError(
                f"{table.path} has no ids, and embeddings of several models are put together by "
                "id; write a column `id`, or name yours with --id-column"
            )
    kinds = {(table.id_kind, table.label_kind) for table in (first, other)}
    if len(kinds) > 1:
        raise UsageError(
            f"{first.path} has ids of {first.id_kind} and labels of {first.label_kind}, "
            f"{other.path} ids of {other.id_kind} and labels of {other.label_kind}; "
            "write both alike"
        )
    prints = [table.facts.get("fingerprint") for table in (first, other)]
    # Written by `embed`, ids are rows of an index: the same number is another image elsewhere.
    if all(prints) and prints[0] != prints[1]:
        raise UsageError(
            f"{first.path} and {other.path} were embedded from different data; embed the same "
            "samples by each model"
        )
    here, there = number_ids([first, other])
    for one, its, without in ((here, there, other), (there, here, first)):
        missing = ~np.isin(one, its)
        if missing.any():
            table = first if without is other else other
            raise UsageError(
                f"id {table.ids[int(missing.argmax())].as_py()!r:.80} of {table.path} is not in "
                f"{without.path}; files side by side hold the same samples"
            )
    rows = np.argsort(there)[np.argsort(np.argsort(here))]
    _, (own, others) = number_labels([first, other])
    differ = own != others[rows]
    if differ.any():
        row = int(differ.argmax())
        raise UsageError(
            f"id {first.ids[row].as_py()!r:.80} has label {first.labels[row].as_py()!r:.80} in "
            f"{first.path} and {other.labels[int(rows[row])].as_py()!r:.80} in {other.path}; files "
            "side by side hold the same samples"
        )
    return rows


def read_raw(
    path: Path, names: ColumnNames, metadata: Sequence[str] | None, share: Share = WHOLE
) -> RawTable:
    """Read a file or a folder; arguments and errors as of `embedding_files.read_embeddings`."""
    files, facts = files_of(path)
    footers = [read_footer(file, names) for file in files]
    first = check_alike(footers, path)
    rows = sum(footer.rows for footer in footers)
    chosen = [name for name in first.metadata if metadata is None or name in metadata]
    own = worker_slice(rows, *share)
    _check_memory(path, own.stop - own.start, first.width)
    vectors = np.empty((own.stop - own.start, first.width), dtype=np.float32)
    is_long = vectors.nbytes >= _SHOWN_FROM_BYTES
    progress = ProgressLine(f"read {path.name}", rows, "embeddings") if is_long else None
    parts: list[dict[str, Any]] = []
    done = 0
    for footer in footers:
        wanted = slice(*(min(max(end - done, 0), footer.rows) for end in (own.start, own.stop)))
        place = max(done - own.start, 0)
        block = vectors[place : place + wanted.stop - wanted.start]
        parts.append(read_columns(footer, names, chosen, block, wanted))
        done += footer.rows
        if progress:
            progress.advance(footer.rows)
    if progress:
        progress.finish()

    return RawTable(
        path=path,
        vectors=vectors,
        rows=own,
        ids=join_columns(parts, first.id_column, first.id_kind, path) if first.id_column else None,
        labels=join_columns(parts, names.label, first.label_kind, path),
        metadata={
            name: list(itertools.chain.from_iterable(_as_list(part[name]) for part in parts))
            for name in chosen
        },
        facts=facts or first.facts,
        id_kind=first.id_kind,
        label_kind=first.label_kind,
    )


def files_of(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The Parquet files of a path, and what a folder of `dist-dml embed` says of them."""
    if path.is_dir():
        return finished_parts(path)
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder; name a Parquet file of embeddings")
    return [path], {}


def check_alike(footers: Sequence[Footer], path: Path) -> Footer:
    """The first file that has rows; all that have some are as it is."""
    filled = [footer for footer in footers if footer.rows]
    if not filled:
        raise UsageError(f"{path} holds no embeddings: it has no rows")
    first = filled[0]
    for other in filled[1:]:
        for name in ("width", "id_column", "id_kind", "label_kind", "metadata"):
            one, its = getattr(first, name), getattr(other, name)
            if one != its:
                raise UsageError(
                    f"{first.path} and {other.path.name} differ in {name.replace('_', ' ')}: "
                    f"{one!s:.200} and {its!s:.200}; put files of one kind into a folder"
                )
    return first


def _check_memory(path: Path, rows: int, width: int) -> None:
    needed, free = rows * width * 4, usable_memory()
    if needed > free:
        raise UsageError(
            f"{path} takes {needed / 2**30:.3g} GiB in memory ({rows} x {width} float32) and "
            f"{free / 2**30:.3g} GiB are available; use a machine with more, or fewer samples"
        )


def _as_list(column: Any) -> list[Any]:
    """Values of Python; equal texts are one object, as most metadata repeats itself."""
    from pyarrow import types

    if not (types.is_string(column.type) or types.is_large_string(column.type)):
        return column.to_pylist()
    encoded = column.dictionary_encode()
    values = np.array([*encoded.dictionary.to_pylist(), None], dtype=object)
    places = encoded.indices.fill_null(len(values) - 1).to_numpy()
    return values[places].tolist()
