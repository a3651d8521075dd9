"""The columns of one Parquet file of embeddings, read without trust and a batch of rows at a time.

Dimensions: `n` rows, embeddings of width `D`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32

from dist_dml.data.parquet_files import open_parquet, stamp_of
from dist_dml.errors import UsageError

Kind = Literal["int", "string"]
_BATCH_ROWS = 16_384
_BUFFER_BYTES = 2**20
_UNREADABLE_NULL = "Expected all lists to be of size"
"""How pyarrow says that a fixed-size list is null, before it gives any row of it."""
_NO_FACTS = ("ARROW:schema", "pandas", "huggingface")


@dataclass(frozen=True)
class ColumnNames:
    """How a file calls its columns."""

    embedding: str = "embedding"
    label: str = "label"
    id: str | None = None
    """None: `id` where there is one, else the samples are numbered by their rows."""


@dataclass(frozen=True)
class Footer:
    """What a file says about itself; nothing of its size has been read."""

    path: Path
    rows: int
    width: int
    """`D`; 0 where the file has no rows to tell it."""
    id_column: str | None
    id_kind: Kind | None
    label_kind: Kind
    metadata: tuple[str, ...]
    """Other columns of numbers, texts, truth values or times."""
    facts: dict[str, str]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with open_parquet(path, _BUFFER_BYTES) as file:
            yield file
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        text = str(error)
        if _UNREADABLE_NULL in text:
            raise UsageError(
                f"{path}: an embedding is null; leave out samples without one"
            ) from None
        raise UsageError(f"{path}: {text}; is it a whole Parquet file?") from None


def read_footer(path: Path, names: ColumnNames) -> Footer:
    """What columns a file has, and that they are of types that can be embeddings.

    Raises:
        UsageError: it is no Parquet, a column is missing or there twice, or is of another type.
    """
    with _opened(path) as file:
        schema = file.schema_arrow
        for name in (names.embedding, names.label, *([names.id] if names.id else [])):
            _check_there(path, schema, name)
        id_column = names.id or ("id" if "id" in schema.names else None)
        if id_column is not None:
            _check_there(path, schema, id_column)
        used = {names.embedding, names.label, id_column}
        rows = file.metadata.num_rows
        return Footer(
            path=path,
            rows=rows,
            width=_width(path, file, names.embedding) if rows else 0,
            id_column=id_column,
            id_kind=_kind(path, schema.field(id_column)) if id_column else None,
            label_kind=_kind(path, schema.field(names.label)),
            metadata=tuple(
                field.name
                for field in schema
                if field.name not in used
                and _is_metadata(field.type)
                and schema.names.count(field.name) == 1
            ),
            facts={key: value for key, value in stamp_of(file).items() if key not in _NO_FACTS},
        )


def _check_there(path: Path, schema: Any, name: str) -> None:
    count = schema.names.count(name)
    if count == 1:
        return
    if count:
        raise UsageError(f"{path} has the column {name!r:.80} {count} times; write it once")
    there = ", ".join(repr(other)[:80] for other in schema.names[:20])
    option = {"embedding": "--embedding-column", "label": "--label-column", "id": "--id-column"}
    options = ", ".join(option.values()) if name not in option else option[name]
    raise UsageError(
        f"{path} has no column {name!r:.80}; it has: {there}; name the right one with {options}"
    )


def _width(path: Path, file: Any, name: str) -> int:
    """`D`: of the type where that fixes it, else of the first row."""
    from pyarrow import types

    kind = file.schema_arrow.field(name).type
    is_list = types.is_fixed_size_list(kind) or types.is_list(kind) or types.is_large_list(kind)
    if not is_list or not types.is_floating(kind.value_type):
        raise UsageError(
            f"{path}: column {name!r:.80} is of {str(kind)[:80]}, expected lists of float16, "
            "float32 or float64; name another column with --embedding-column"
        )
    if types.is_fixed_size_list(kind):
        width = kind.list_size
    else:
        first = next(file.iter_batches(batch_size=1, columns=[name])).column(name)
        width = 0 if first.null_count else len(first.flatten())
    if width < 1:
        raise UsageError(
            f"{path}: column {name!r:.80} begins with an empty embedding; give numbers"
        )
    return width


def _kind(path: Path, field: Any) -> Kind:
    from pyarrow import types

    kind = field.type.value_type if types.is_dictionary(field.type) else field.type
    if types.is_integer(kind):
        return "int"
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "string"
    raise UsageError(
        f"{path}: column {field.name!r:.80} is of {str(kind)[:80]}, expected integers or strings; "
        "convert it, or name another column"
    )


def _is_metadata(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    allowed: tuple[Callable[[Any], bool], ...] = (
        types.is_integer,
        types.is_floating,
        types.is_boolean,
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_date,
        types.is_timestamp,
    )
    return any(test(kind) for test in allowed)


def read_columns(
    footer: Footer,
    names: ColumnNames,
    metadata: Sequence[str],
    into: Float32[np.ndarray, "m D"],
    wanted: slice | None = None,
) -> dict[str, Any]:
    """A file: embeddings of wanted rows into `into`, the other columns whole, as pyarrow arrays.

    Beyond the results it holds what pyarrow decodes for 16,384 rows. Embeddings are not read from
    groups of rows where none is wanted.

    Args:
        footer: of the file.
        names: how it calls its columns.
        metadata: which other columns to read.
        into: of the wanted rows.
        wanted: rows of the file, ends within it; None: all.

    Returns:
        By column name; no nulls in labels and ids.

    Raises:
        UsageError: it cannot be read, or holds nulls, other widths, NaN or infinity.
    """
    import pyarrow

    path = footer.path
    wanted = slice(0, footer.rows) if wanted is None else wanted
    plain = list(dict.fromkeys([names.label, *metadata]))
    if footer.id_column is not None and footer.id_column not in plain:
        plain.append(footer.id_column)
    pieces: dict[str, list[Any]] = {name: [] for name in plain}
    done = 0
    with _opened(path) as file:
        for batch in _batches(file, names.embedding, plain, wanted):
            batch.validate(full=True)  # Offsets and texts of a file that others wrote.
            rows = len(batch)
            if done + rows > footer.rows:
                raise UsageError(f"{path} has more rows than the {footer.rows} of its footer")
            start, stop = max(done, wanted.start), min(done + rows, wanted.stop)
            if start < stop:
                if names.embedding not in batch.schema.names:
                    raise UsageError(f"{path} has other groups of rows than its footer says")
                column = batch.column(names.embedding).slice(start - done, stop - start)
                _fill(path, column, into[start - wanted.start : stop - wanted.start], start)
            for name in plain:
                column = batch.column(name)
                if name not in metadata and column.null_count:
                    row = done + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
                    raise UsageError(f"{path}: column {name!r:.80} is null in row {row}; fill it")
                pieces[name].append(_plain(column))
            done += rows
    if done != footer.rows:
        raise UsageError(f"{path} has {done} rows and its footer says {footer.rows}")
    return {
        name: pyarrow.chunked_array(found).combine_chunks() if found else pyarrow.array([])
        for name, found in pieces.items()
    }


def _batches(file: Any, embedding: str, plain: Sequence[str], wanted: slice) -> Iterator[Any]:
    """All rows; the column of embeddings is there where some are wanted, and around them."""
    groups, starts = range(file.metadata.num_row_groups), [0]
    for group in groups:
        starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
    touched = [starts[g] < wanted.stop and wanted.start < starts[g + 1] for g in groups]
    for is_touched, run in itertools.groupby(groups, touched.__getitem__):
        columns = [embedding, *plain] if is_touched else list(plain)
        yield from file.iter_batches(batch_size=_BATCH_ROWS, row_groups=list(run), columns=columns)


def _plain(column: Any) -> Any:
    """Dictionaries of parts differ: their values do not."""
    from pyarrow import types

    kind = column.type
    return column.cast(kind.value_type) if types.is_dictionary(kind) else column


def _fill(path: Path, column: Any, block: np.ndarray, first_row: int) -> None:
    """The embeddings of a batch of rows, checked."""
    from pyarrow import types

    if column.null_count:
        row = first_row + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise UsageError(f"{path}: the embedding of row {row} is null; leave such samples out")
    width = block.shape[1]
    if not types.is_fixed_size_list(column.type):
        lengths = column.value_lengths().to_numpy()
        if (lengths != width).any():
            row = int(np.argmax(lengths != width))
            raise UsageError(
                f"{path}: the embedding of row {first_row + row} has {lengths[row]} numbers and "
                f"those before it {width}; all must have the same width"
            )
    numbers = column.flatten()
    if numbers.null_count:
        row = int(np.argmax(numbers.is_null().to_numpy(zero_copy_only=False))) // width
        raise UsageError(f"{path}: the embedding of row {first_row + row} holds a null; fill it")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, and is refused.
        block[:] = numbers.to_numpy(zero_copy_only=False).reshape(block.shape)
    finite = np.isfinite(block)
    if not finite.all():
        row, place = np.unravel_index(int(np.argmin(finite)), block.shape)
        raise UsageError(
            f"{path}: the embedding of row {first_row + int(row)} holds {block[row, place]} at "
            f"place {place}; embeddings must be finite in float32, leave such samples out"
        )
