"""An index as a folder: `index.faiss`, `gallery.parquet`, and `search.json` that describes both.

Written whole or not at all; read only if every file is what the description says, byte for byte.
That tells damage, not intent: FAISS's reader is not made for files of strangers (docs/security.md).
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Int64
from pydantic import Field, ValidationError

from dist_dml.data.parquet_files import check_columns, open_parquet, write_parquet
from dist_dml.errors import UsageError
from dist_dml.retrieval.distances import named_distance
from dist_dml.retrieval.search_index import IndexOptions, Kind, SearchIndex, check_faiss_index
from dist_dml.strict_json import Natural, StrictModel, first_problem, read_object
from dist_dml.whole_files import sync_folder, write_json

FACTS_FILE = "search.json"
INDEX_FILE = "index.faiss"
GALLERY_FILE = "gallery.parquet"
METADATA = "metadata."
"""Before the names of the gallery's further columns."""
_MOST_BYTES = 2**20
_BYTES_PER_ITEM = 2**14
"""Of a row of the gallery's table, far more than ids, labels and metadata take."""


class StoredFile(StrictModel):
    """What a file must be."""

    bytes: Natural
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Images(StrictModel):
    """The data set that the gallery's images lie in."""

    path: str
    """Of the data set's folder, from the index's; see `relative_path`."""
    fingerprint: str


class Checkpoint(StrictModel):
    """What embeds queries."""

    path: str
    """Of the checkpoint's folder, from the index's."""
    embedder_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class SearchFacts(StrictModel):
    """The contents of `search.json`."""

    format_version: Literal[1] = 1
    kind: Kind
    distance: Literal["cosine", "l2"]
    width: Annotated[Natural, Field(ge=1)]
    count: Annotated[Natural, Field(ge=1)]
    rows: Literal["images", "classes"]
    """What an item of the gallery is."""
    options: dict[str, str | int]
    """Of `IndexOptions`."""
    recall: dict[str, float]
    """By K, against exact neighbours; empty where nothing could be measured."""
    num_measured: Natural
    measured_on: str
    """Which queries."""
    milliseconds: float
    """A search of one query, median, on the machine that built the index."""
    exact_milliseconds: float
    """A query of an exact search of many, there."""
    threshold: float | None = None
    """The value that parts images of the query's class from others; of the distance's kind."""
    threshold_from: str = ""
    images: Images | None = None
    checkpoint: Checkpoint | None = None
    files: dict[Literal["index.faiss", "gallery.parquet"], StoredFile]

    def summary(self) -> list[str]:
        """What the index is and what was measured, in lines for a person."""
        recall = ", ".join(f"recall@{at} {value:.4f}" for at, value in self.recall.items())
        if self.recall:
            recall += f" against exact neighbours ({self.num_measured} queries: {self.measured_on})"
        line = "unknown" if self.threshold is None else f"{self.threshold:.4g}"
        return [
            f"index: {self.kind}, {self.count:,} {self.rows} x {self.width}, {self.distance}",
            f"measured: {recall or 'nothing, as no query has a neighbour'}",
            f"time: {self.milliseconds:.3g} ms a query alone; exact, many at once: "
            f"{self.exact_milliseconds:.3g} ms a query",
            f"threshold: {line} ({self.threshold_from})",
        ]


@dataclass(frozen=True, eq=False)
class OpenIndex:
    """An index folder in use."""

    folder: Path
    facts: SearchFacts
    index: SearchIndex
    gallery: Any
    """A pyarrow table: `id` (int64 or string), `label` (string), `image_row` (int64, the row of the
    data set's index or -1), and further columns named `metadata.NAME`."""

    def item(self, position: int) -> dict[str, Any]:
        """Id, label and metadata of one item."""
        row = self.gallery.slice(position, 1).to_pylist()[0]
        metadata = {
            name.removeprefix(METADATA): _plain(value)
            for name, value in row.items()
            if name.startswith(METADATA) and value is not None
        }
        return {"id": row["id"], "label": row["label"], "metadata": metadata}

    def position_of(self, text: str) -> int | None:
        """The item of an id as it is written in an address; None if there is none. O(n)."""
        import pyarrow
        from pyarrow import compute

        column = self.gallery["id"]
        if pyarrow.types.is_integer(column.type):
            digits = text.removeprefix("-")
            if not (digits.isascii() and digits.isdecimal() and len(digits) < 20):
                return None
            if not -(2**63) <= int(text) < 2**63:
                return None
            found = compute.index(column, pyarrow.scalar(int(text), column.type)).as_py()
        else:
            found = compute.index(column, pyarrow.scalar(text, column.type)).as_py()
        return None if found < 0 else int(found)

    def image_rows(self) -> Int64[np.ndarray, " n"]:
        """Where the image of each item is in the data set; -1 where it has none."""
        return self.gallery["image_row"].to_numpy()

    def place(self, stored: str) -> str:
        """A stored path, from the folder of the index; as it is where it names a variable."""
        return stored if "${" in stored else os.path.normpath(self.folder / stored)


def _plain(value: Any) -> Any:
    """As JSON can say it: times, NaN and infinity as texts."""
    is_number = isinstance(value, (bool, int)) or (isinstance(value, float) and isfinite(value))
    return value if is_number else str(value)


def relative_path(target: str | Path, folder: Path) -> str:
    """How `search.json` names what lies elsewhere: moved together, both stay found.

    `${NAME}` may stand for a secret, and stays as it is.
    """
    if "${" in str(target):
        return str(target)
    return os.path.relpath(Path(target).resolve(), folder.resolve())


def check_absent(folder: Path) -> None:
    """Refuse to write where something is.

    Raises:
        UsageError: names the folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already; give another name, or remove it first")
    if not folder.absolute().parent.is_dir():
        raise UsageError(f"{folder.absolute().parent} is no folder; make it, or name another")


def write_index(folder: Path, index: SearchIndex, gallery: Any, facts: SearchFacts) -> SearchFacts:
    """Write an index folder whole or not at all.

    Args:
        folder: absent or empty.
        index: of the gallery.
        gallery: see `OpenIndex.gallery`.
        facts: `files` are filled in here.

    Returns:
        The facts as written.

    Raises:
        UsageError: if the folder is there already.
        OSError: the disk's.
    """
    import faiss

    check_absent(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        faiss.write_index(index.faiss_index, str(temporary / INDEX_FILE))
        with (temporary / INDEX_FILE).open("rb") as file:
            os.fsync(file.fileno())
        write_parquet(temporary / GALLERY_FILE, gallery, {})
        files = {name: _stored(temporary / name) for name in (INDEX_FILE, GALLERY_FILE)}
        written = facts.model_copy(update={"files": files})
        write_json(temporary / FACTS_FILE, written.model_dump())
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
        sync_folder(folder.absolute().parent)
        return written
    except RuntimeError as error:  # FAISS's for a disk that is full.
        raise OSError(f"cannot write {INDEX_FILE}: {str(error).splitlines()[0]:.200}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _stored(path: Path) -> StoredFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return StoredFile(bytes=path.stat().st_size, sha256=digest)


def read_facts(folder: Path) -> SearchFacts:
    """The description of an index folder, checked field by field.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    path = folder / FACTS_FILE
    if not path.is_file():
        raise UsageError(
            f"{folder} is not an index (it has no {FACTS_FILE}); make one with "
            "`dist-dml search build`"
        )
    try:
        return SearchFacts.model_validate(read_object(path, _MOST_BYTES))
    except ValidationError as error:
        raise _damaged(folder, f"{FACTS_FILE}: {first_problem(error)}") from None
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"{FACTS_FILE}: {error}") from None


def open_search_index(folder: Path) -> OpenIndex:
    """Read an index folder; its files are compared with their sizes and checksums first.

    Costs a pass over the files and their size in memory.

    Raises:
        UsageError: it is no index, a file is missing or altered, or its parts do not fit together.
    """
    facts = read_facts(folder)
    try:
        for name in (INDEX_FILE, GALLERY_FILE):
            if name not in facts.files:
                raise ValueError(f"{FACTS_FILE} does not describe {name}")
            _check_file(folder / name, facts.files[name])
        options = _options(facts)
        index = _read_faiss(folder / INDEX_FILE)
        check_faiss_index(index, options, facts.count, facts.width)
        gallery = _read_gallery(folder / GALLERY_FILE, facts.count)
    except OSError as error:
        raise _damaged(folder, str(error.strerror or error)) from None
    except (ValueError, TypeError) as error:
        raise _damaged(folder, str(error)) from None
    searched = SearchIndex(index, named_distance(facts.distance), options)
    return OpenIndex(folder, facts, searched, gallery)


def _options(facts: SearchFacts) -> IndexOptions:
    numbers = {name: value for name, value in facts.options.items() if name != "kind"}
    known = {field.name for field in fields(IndexOptions)} - {"kind"}
    if facts.options.get("kind") != facts.kind or not set(numbers) <= known:
        raise ValueError(f"{FACTS_FILE}: options are not those of {facts.kind}")
    whole = {name: value for name, value in numbers.items() if isinstance(value, int)}
    if len(whole) < len(numbers) or min(whole.values(), default=0) < 0:
        raise ValueError(f"{FACTS_FILE}: options are not whole numbers from 0 on")
    return IndexOptions(facts.kind, **whole)


def _check_file(path: Path, stated: StoredFile) -> None:
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path.name} is missing or no regular file")
    size = path.stat().st_size
    if size != stated.bytes:
        raise ValueError(f"{path.name} has {size} bytes, not {stated.bytes}")
    if _stored(path).sha256 != stated.sha256:
        raise ValueError(f"{path.name} does not have the checksum it was written with")


def _read_faiss(path: Path) -> Any:
    import faiss

    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        raise ValueError(f"FAISS cannot read {path.name} ({str(error)[-120:]!r})") from None


def _read_gallery(path: Path, count: int) -> Any:
    import pyarrow

    with open_parquet(path) as file:
        if file.metadata.num_rows != count:
            raise ValueError(f"it has {file.metadata.num_rows} rows, expected {count}")
        held = sum(
            file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)
        )
        if held > _BYTES_PER_ITEM * count + _MOST_BYTES:
            raise ValueError(f"it unpacks to {held:,} bytes, too many for {count} rows")
        check_columns(file, {"label": pyarrow.string(), "image_row": pyarrow.int64()})
        kind = file.schema_arrow.field("id").type if "id" in file.schema_arrow.names else None
        if kind not in (pyarrow.int64(), pyarrow.string()):
            raise ValueError(f"id is of {kind}, expected int64 or string")
        table = file.read()
        table.validate(full=True)
        for name in ("id", "label", "image_row"):
            if table[name].null_count:
                raise ValueError(f"{name} has a null")
        return table.combine_chunks()


def _damaged(folder: Path, reason: str) -> UsageError:
    return UsageError(f"index {folder} is unreadable ({reason:.300}); build it again")
