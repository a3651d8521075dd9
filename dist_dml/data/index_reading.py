"""The files of an index, read without trust: what they say is checked before anything follows.

Whoever changes a byte of them, or copies one from another data set, gets one line. Checked once,
nothing behind needs to ask whether an offset lies inside its shard or a class id among the classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field, JsonValue, ValidationError, model_validator

from dist_dml.data.parquet_files import check_columns, open_parquet, stamp_of
from dist_dml.data.shards import IMAGE_EXTENSIONS
from dist_dml.errors import UsageError
from dist_dml.strict_json import Natural, StrictModel, first_problem, read_object

FORMAT_VERSION = 1
INDEX_FILE = "index.parquet"
CLASSES_FILE = "classes.parquet"
DATASET_FILE = "dataset.json"
COLUMNS = {
    "split": np.int8,
    "class_id": np.int64,
    "shard": np.int32,
    "offset": np.int64,
    "size": np.int64,
    "extension": np.int8,
    "checksum": np.uint32,
}
"""Of the index, without the keys, which are read when they are needed."""
_MOST_BYTES = 2**28
"""Of `dataset.json`: two million shards."""
_BLOCK = 512
"""A sample is at least the header of its image."""

_Name = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f]*$")]


class _Shard(StrictModel):
    """A shard's entry in `dataset.json`."""

    name: _Name
    bytes: Annotated[int, Field(ge=0, lt=2**60)]
    samples: Natural
    modified: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    tag: str | None = None


class _Dataset(StrictModel):
    """What `dataset.json` must say. What else it says is for people."""

    model_config = ConfigDict(extra="ignore")

    num_classes: Natural
    num_classes_all: Natural
    num_samples: Natural
    samples_per_split: dict[_Name, Natural]
    split_names: Annotated[list[_Name], Field(max_length=127)]
    shards: list[_Shard]
    fingerprint: str
    layout: str = ""
    source: dict[str, JsonValue] = Field(default_factory=dict)
    left_out: dict[str, Natural] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _counts_agree(self) -> _Dataset:
        for shard in self.shards:
            if shard.samples * _BLOCK > shard.bytes:
                raise ValueError(
                    f"shard {shard.name!r:.80} has {shard.samples} samples in {shard.bytes} bytes"
                )
        if len(set(self.split_names)) < len(self.split_names):
            raise ValueError("split_names has a name twice")
        if self.samples_per_split.keys() != set(self.split_names):
            raise ValueError("samples_per_split and split_names differ")
        if self.num_classes > self.num_classes_all:
            raise ValueError(
                f"num_classes={self.num_classes} of num_classes_all={self.num_classes_all}"
            )
        for name, found in (
            ("shards", sum(shard.samples for shard in self.shards)),
            ("samples_per_split", sum(self.samples_per_split.values())),
        ):
            if found != self.num_samples:
                raise ValueError(f"{name} add up to {found}, num_samples={self.num_samples}")
        return self


def read_metadata(root: Path) -> dict[str, Any]:
    """The content of `dataset.json`.

    Raises:
        UsageError: the folder is missing or not indexed, or the file is damaged.
    """
    if not root.is_dir():
        raise UsageError(
            f"data.path={root}: no such folder; pack one (`dist-dml pack glyphs {root}`) "
            "or correct data.path"
        )
    if not (root / DATASET_FILE).is_file() or not (root / INDEX_FILE).is_file():
        if not any(root.glob("*.tar")) and not (root / INDEX_FILE).is_file():
            raise UsageError(
                f"data.path={root}: holds no shards (*.tar); correct data.path, or pack a data "
                f"set there and run `dist-dml index {root}`"
            )
        raise UsageError(f"data.path={root}: its shards have no index; {remedy(root)}")
    try:
        metadata = read_object(root / DATASET_FILE, _MOST_BYTES)
        version = metadata.get("format_version")
        if type(version) is not int:
            raise ValueError("format_version is missing or no number")
        if version == FORMAT_VERSION:
            _Dataset.model_validate(metadata)
            return metadata
    except OSError as error:
        raise _damaged(root, DATASET_FILE, str(error.strerror)) from None
    except ValidationError as error:
        raise _damaged(root, DATASET_FILE, first_problem(error)) from None
    except ValueError as error:
        raise _damaged(root, DATASET_FILE, str(error)) from None
    raise UsageError(
        f"data.path={root}: format version {version}, this program reads {FORMAT_VERSION}; "
        f"{remedy(root)}"
    )


def read_columns(root: Path, metadata: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The columns of the index, without the keys.

    One column at a time, and pyarrow's pages given back: read at once, 2.5 million samples held 0.2
    GB more than their arrays (2026-11), in every worker. Checking takes a pass over them.

    Args:
        root: folder of the data set.
        metadata: its `dataset.json`.

    Raises:
        UsageError: index or class catalogue cannot be read, are of another data set than
            `dataset.json`, or say what cannot be.
    """
    import pyarrow

    try:
        with open_parquet(root / CLASSES_FILE) as file:
            _check_stamp(root, CLASSES_FILE, stamp_of(file), metadata, ("fingerprint",))
            _check_rows(file, {"name": pyarrow.string()}, metadata["num_classes_all"])
        with open_parquet(root / INDEX_FILE) as file:
            # Indexes older than the layout have none.
            both = ("fingerprint", "layout")
            _check_stamp(root, INDEX_FILE, stamp_of(file), metadata, both)
            types = {name: pyarrow.from_numpy_dtype(kind) for name, kind in COLUMNS.items()}
            _check_rows(file, {"key": pyarrow.string(), **types}, metadata["num_samples"])
            columns = {name: _numbers(file.read([name])[name], name) for name in COLUMNS}
        _check_values(columns, metadata)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"data.path={root}: {error}; {remedy(root)}") from None
    pyarrow.default_memory_pool().release_unused()
    return columns


def _numbers(column: Any, name: str) -> np.ndarray:
    """A pyarrow column as numpy has it.

    By DLPack: pyarrow's own `to_numpy` imports pandas first, a second of every worker's start.
    """
    if column.null_count:
        raise ValueError(f"{name} has rows without a value")
    parts = [np.from_dlpack(chunk) for chunk in column.chunks]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([np.empty(0, COLUMNS[name]), *parts])


def read_texts(root: Path, name: str, column: str) -> Any:
    """A column of texts of the index or the catalogue, as a pyarrow array.

    Raises:
        UsageError: it cannot be read, or has a text that is none.
    """
    try:
        with open_parquet(root / name) as file:
            texts = file.read([column])[column]
            texts.validate(full=True)  # Parquet's reader takes any bytes for UTF-8.
            if texts.null_count:
                raise ValueError(f"{column} has rows without a value")
    except ValueError as error:
        raise UsageError(f"data.path={root}: {error}; {remedy(root)}") from None
    return texts


def _check_stamp(
    root: Path,
    name: str,
    recorded: Mapping[str, str],
    metadata: Mapping[str, Any],
    fields: tuple[str, ...],
) -> None:
    """Refuse files of which an interrupted indexing has replaced some only."""
    for field in fields:
        stated, found = metadata.get(field, ""), recorded.get(field, "")
        if found != stated:
            raise UsageError(
                f"data.path={root}: {name} and {DATASET_FILE} are of different data sets "
                f"({field}s {found[:12]} and {stated[:12]}); {remedy(root)}"
            )


def _check_rows(file: Any, types: Mapping[str, Any], num_rows: int) -> None:
    check_columns(file, types)
    if file.metadata.num_rows != num_rows:
        raise ValueError(f"it has {file.metadata.num_rows} rows, {DATASET_FILE} says {num_rows}")


def _check_values(columns: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Refuse values that lead outside: of a shard, of the classes, of the splits.

    Shard by shard, so that what comparisons hold does not grow with the data set.
    """
    for name, kind in COLUMNS.items():
        # Where a value is missing pyarrow makes floats of all.
        if columns[name].dtype != kind or len(columns[name]) != metadata["num_samples"]:
            raise ValueError(f"{INDEX_FILE}: {name} has rows without a value")
    start = 0
    for code, shard in enumerate(metadata["shards"]):
        rows = slice(start, start + shard["samples"])
        limits = {
            "shard": (code, code),
            "split": (0, len(metadata["split_names"]) - 1),
            "class_id": (0, metadata["num_classes_all"] - 1),
            "extension": (0, len(IMAGE_EXTENSIONS) - 1),
            "offset": (0, shard["bytes"]),
            "size": (0, shard["bytes"]),
        }
        for name, (least, most) in limits.items():
            part = columns[name][rows]
            if not len(part) or (least <= part.min() and part.max() <= most):
                continue
            found = part.min() if part.min() < least else part.max()
            raise ValueError(
                f"{INDEX_FILE}: {name} of a sample of shard {shard['name']} is {found}, expected "
                f"{least}..{most}"
            )
        if _overlap(columns["offset"][rows], columns["size"][rows], shard["bytes"]):
            raise ValueError(
                f"{INDEX_FILE}: images of shard {shard['name']} overlap or reach beyond its end"
            )
        start = rows.stop


def _overlap(offset: np.ndarray, size: np.ndarray, num_bytes: int) -> bool:
    """Whether two images share a byte, or one ends behind the shard."""
    ends = offset + size
    if len(ends) and ends.max() > num_bytes:
        return True
    if np.all(offset[1:] >= ends[:-1]):  # As they are nearly always.
        return False
    order = np.argsort(offset, kind="stable")
    return bool(np.any(offset[order][1:] < ends[order][:-1]))


def _damaged(root: Path, name: str, reason: str) -> UsageError:
    return UsageError(f"data.path={root}: {name} is damaged ({reason}); {remedy(root)}")


def remedy(root: Path) -> str:
    """What to do about an index that cannot be used."""
    return f"run `dist-dml index {root}`"
