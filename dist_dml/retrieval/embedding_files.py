"""Embeddings as data: Parquet files that `dist-dml embed` or anybody else wrote.

One row a sample, with the columns `id` (integer or string), `label` (integer or string),
`embedding` (list of float16, float32 or float64) and any others, which are metadata. See
docs/embeddings.md.

Dimensions: `n` samples, embeddings of width `D`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int64

from dist_dml.data.parquet_files import write_parquet
from dist_dml.data.plan import worker_slice
from dist_dml.errors import UsageError
from dist_dml.retrieval.embedding_columns import ColumnNames, read_footer
from dist_dml.retrieval.embedding_numbering import RawTable, number_ids, number_labels
from dist_dml.retrieval.embedding_raw import (
    WHOLE,
    Share,
    check_alike,
    files_of,
    read_raw,
    read_side_by_side,
)
from dist_dml.retrieval.embeddings import Embeddings


@dataclass(frozen=True)
class EmbeddingTable:
    """What a file holds: row i of everything is one sample."""

    embeddings: Embeddings
    """Of all rows, or of this worker's share of them. Labels are numbered 0, 1, ... in the order of
    `label_values`; ids are those of the file where they are integers, else numbers of their own."""
    labels: Int64[np.ndarray, " n"]
    """Of all rows, and so is what follows."""
    ids: Int64[np.ndarray, " n"]
    label_values: list[int] | list[str]
    """Labels as written, sorted, by label number."""
    metadata: dict[str, list[Any]] = field(default_factory=dict)
    """Other columns, by name; None where they are null."""
    facts: dict[str, str] = field(default_factory=dict)
    """What made the file, as it says; may be empty."""
    written_ids: Any = None
    """The file's ids as a pyarrow array; None: they are row numbers, and mean nothing in another
    file."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def width(self) -> int:
        """`D`."""
        return self.embeddings.vectors.shape[1]

    @property
    def has_ids(self) -> bool:
        """Whether the file has ids."""
        return self.written_ids is not None

    @property
    def id_values(self) -> list[int] | list[str]:
        """Ids as written, or row numbers: objects of Python, made anew at each call."""
        if self.written_ids is None:
            return list(range(len(self)))
        return self.written_ids.to_pylist()

    def share(self, rank: int, size: int) -> Embeddings:
        """The embeddings of one worker, of a table that holds these or all."""
        if len(self.embeddings) < len(self):
            return self.embeddings
        return self.embeddings.rows(worker_slice(len(self), rank, size))

    def label_of(self, row: int) -> int | str:
        """The label of a row, as written."""
        return self.label_values[int(self.labels[row])]


def read_embeddings(
    path: str | Path,
    columns: ColumnNames | None = None,
    metadata: Sequence[str] | None = None,
) -> EmbeddingTable:
    """Read a Parquet file, or a folder of parts, into memory: `n * D * 4` bytes and the columns.

    Rows are read in batches: beyond the result it holds a few megabytes. Pages that have checksums
    are compared with them.

    Args:
        path: a file; or a folder: one of `dist-dml embed`, or any with `*.parquet` files.
        columns: how the columns are called.
        metadata: which other columns to read; all, if None. Columns of lists or bytes never are.

    Raises:
        UsageError: one line, before anything is computed: nothing there, no Parquet, no rows, a
            column missing or of another type, nulls, NaN or infinity, different widths, an id
            twice, a negative label, parts that differ, too little memory.
    """
    return _number(read_raw(Path(path), columns or ColumnNames(), metadata), None)[0]


def read_pair(
    queries: str | Path | Sequence[str | Path],
    gallery: str | Path | Sequence[str | Path] | None,
    columns: ColumnNames | None = None,
    metadata: Sequence[str] | None = None,
    share: Share = WHOLE,
) -> tuple[EmbeddingTable, EmbeddingTable | None]:
    """Read queries and gallery, whose labels and ids are numbered together.

    An id in both is the same sample, which no query finds as its own neighbour, and has the same
    label in both. Where one of the files has no ids, no sample is in both. Both tables have all
    labels of the two in `label_values`.

    Args:
        queries: see `read_embeddings`; several, one of each model, are put side by side
            (`embedding_raw.read_side_by_side`).
        gallery: likewise; None: the queries are searched among themselves.
        columns: how the columns are called, in both.
        metadata: which other columns to read; those that one of the files lacks are left out there.
        share: which of how many workers' embeddings are read, in contiguous parts of the rows;
            the other columns are read whole, so that all workers number alike.

    Raises:
        UsageError: see `read_embeddings`; also for other widths, labels or ids of another type, an
            id with two labels, numbers of different data sets, and one file as both.
    """
    names = columns or ColumnNames()
    first = read_side_by_side(_paths(queries), names, metadata, share)
    if gallery is None:
        return _number(first, None)[0], None
    if [path.resolve() for path in _paths(queries)] == [path.resolve() for path in _paths(gallery)]:
        raise UsageError(
            f"{first.path} is given as queries and as gallery; leave the gallery out to search the "
            "queries among themselves, each without itself"
        )
    second = read_side_by_side(_paths(gallery), names, metadata, share)
    widths = first.vectors.shape[1], second.vectors.shape[1]
    if widths[0] != widths[1]:
        raise UsageError(
            f"{first.path} has embeddings of width {widths[0]} and {second.path} of {widths[1]}; "
            "both must come from the same model"
        )
    _check_one_data_set(first, second, names)
    for what, one, other in (
        ("labels", first.label_kind, second.label_kind),
        ("ids", first.id_kind, second.id_kind),
    ):
        if one and other and one != other:
            raise UsageError(
                f"{what} are {one}s in {first.path} and {other}s in {second.path}; write both "
                "alike, as they are compared"
            )
    found, searched = _number(first, second)
    assert searched is not None
    _check_labels_of_common_ids(found, searched, (str(first.path), str(second.path)))
    return found, searched


def _paths(given: str | Path | Sequence[str | Path]) -> list[Path]:
    return [Path(given)] if isinstance(given, str | Path) else [Path(one) for one in given]


def metadata_names(path: str | Path, columns: ColumnNames | None = None) -> tuple[str, ...]:
    """The columns that `read_embeddings` takes for metadata; reads footers alone.

    Raises:
        UsageError: see `read_embeddings`.
    """
    files, _ = files_of(Path(path))
    names = columns or ColumnNames()
    return check_alike([read_footer(file, names) for file in files], Path(path)).metadata


def write_embeddings(
    path: Path,
    ids: Any,
    labels: Any,
    vectors: Float32[np.ndarray, "n D"],
    metadata: Mapping[str, Any] | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write a file that `read_embeddings` and others read: whole or not at all, with checksums.

    Args:
        path: of the file.
        ids: a sequence or pyarrow array of integers or strings, no id twice.
        labels: likewise, integers from 0, or strings.
        vectors: finite.
        metadata: further columns, as sequences or pyarrow arrays.
        dtype: of the numbers in the file; float16 rounds to 11 bits.
        facts: what made it, kept in the file's footer.

    Raises:
        UsageError: a number is beyond float16.
    """
    import pyarrow

    with np.errstate(over="ignore"):
        numbers = np.ascontiguousarray(vectors, dtype=np.dtype(dtype))
    if dtype == "float16" and not np.isfinite(numbers).all():
        raise UsageError(
            f"an embedding holds {np.abs(vectors).max():g}, and float16 ends at 65504; write "
            "float32"
        )
    lists = pyarrow.FixedSizeListArray.from_arrays(
        pyarrow.array(numbers.reshape(-1)), vectors.shape[1]
    )
    table = pyarrow.table(
        {
            "id": pyarrow.array(ids),
            "label": pyarrow.array(labels),
            **(metadata or {}),
            "embedding": lists,
        }
    )
    write_parquet(path, table, facts or {})


def _number(
    first: RawTable, second: RawTable | None
) -> tuple[EmbeddingTable, EmbeddingTable | None]:
    """Labels and ids as int64, the same for the same."""
    raws = [first] if second is None else [first, second]
    values, labels = number_labels(raws)
    ids = number_ids(raws)
    tables = [
        EmbeddingTable(
            embeddings=Embeddings(raw.vectors, labels[i][raw.rows], ids[i][raw.rows]),
            labels=labels[i],
            ids=ids[i],
            label_values=values,
            metadata=raw.metadata,
            facts=raw.facts,
            written_ids=raw.ids,
        )
        for i, raw in enumerate(raws)
    ]
    return tables[0], (tables[1] if second is not None else None)


def _check_one_data_set(queries: RawTable, gallery: RawTable, names: ColumnNames) -> None:
    """Of `dist-dml embed`, ids are rows of an index and labels its classes: of that index alone."""
    own = names.label == "label" or names.id in (None, "id")
    prints = [raw.facts.get("fingerprint") for raw in (queries, gallery)]
    if own and all(prints) and prints[0] != prints[1]:
        raise UsageError(
            f"{queries.path} and {gallery.path} were embedded from different data, whose ids and "
            "labels are numbers of their own; compare names: --label-column class_name --id-column "
            "key"
        )


def _check_labels_of_common_ids(
    queries: EmbeddingTable, gallery: EmbeddingTable, paths: tuple[str, str]
) -> None:
    _, here, there = np.intersect1d(
        queries.ids, gallery.ids, assume_unique=True, return_indices=True
    )
    differ = queries.labels[here] != gallery.labels[there]
    if differ.any():
        row, other = int(here[differ.argmax()]), int(there[differ.argmax()])
        sample = queries.written_ids[row].as_py()
        raise UsageError(
            f"id {sample!r:.80} has label {queries.label_of(row)!r:.80} in "
            f"{paths[0]} and {gallery.label_of(other)!r:.80} in {paths[1]}; an id in both names "
            "the same sample"
        )
