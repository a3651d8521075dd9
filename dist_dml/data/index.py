"""The index of a data set: where every sample lies and which class it has, as columns.

A data set folder holds `index.parquet` (a row per sample), `classes.parquet` (a row per class) and
`dataset.json` (format version, source, counts, shards, fingerprint) beside its tars.
A *sample id* is the row number of the index, over all splits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int8, Int32, Int64, UInt32
from torch import Tensor

from dist_dml.data.shards import IMAGE_EXTENSIONS
from dist_dml.errors import UsageError

FORMAT_VERSION = 1
INDEX_FILE = "index.parquet"
CLASSES_FILE = "classes.parquet"
DATASET_FILE = "dataset.json"
EXTENSIONS = IMAGE_EXTENSIONS
"""The extension of code i, in the column `extension`."""


@dataclass(frozen=True, eq=False)
class Index:
    """All samples of a data set. Arrays have one entry a sample, `N` in all.

    Attributes:
        folder: the data set folder.
        shards: paths of the tars, relative to `folder` where they lie below it.
        split_names: the split of code i.
        num_classes: training classes; their ids are 0..num_classes-1.
        fingerprint: changes with keys, classes, splits, order, image bytes or source parameters,
            and not with the way the samples are cut into shards.
        metadata: the content of `dataset.json`.
        split: code of each sample's split.
        class_id: class of each sample.
        shard: position of its tar in `shards`.
        offset: first byte of its image inside the tar.
        size: bytes of its image.
        extension: code of its image's extension in `EXTENSIONS`.
        checksum: CRC-32 of its image's bytes.
    """

    folder: Path
    shards: tuple[str, ...]
    split_names: tuple[str, ...]
    num_classes: int
    fingerprint: str
    metadata: Mapping[str, Any]
    split: Int8[np.ndarray, " N"]
    class_id: Int64[np.ndarray, " N"]
    shard: Int32[np.ndarray, " N"]
    offset: Int64[np.ndarray, " N"]
    size: Int64[np.ndarray, " N"]
    extension: Int8[np.ndarray, " N"]
    checksum: UInt32[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.class_id)

    @cached_property
    def _keys(self) -> Any:
        """A pyarrow column, read on first use: training needs no keys, and they are large."""
        import pyarrow.parquet

        return pyarrow.parquet.read_table(self.folder / INDEX_FILE, columns=["key"])["key"]

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class in the catalogue, by class id; training classes come first."""
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(self.folder / CLASSES_FILE, columns=["name"])
        return tuple(table["name"].to_pylist())

    def key(self, sample_id: int) -> str:
        """The WebDataset key of one sample."""
        return self._keys[int(sample_id)].as_py()

    def shard_path(self, shard: int) -> Path:
        """The tar of code `shard`."""
        return self.folder / self.shards[shard]

    def select(self, split: str) -> Int[np.ndarray, " n"]:
        """The sample ids of a split, ascending.

        Raises:
            UsageError: if the data set has no sample of that split.
        """
        code = self.split_names.index(split) if split in self.split_names else -1
        chosen = np.flatnonzero(self.split == code)
        if not len(chosen):
            known = ", ".join(
                f"{name} ({int(np.sum(self.split == i))})"
                for i, name in enumerate(self.split_names)
            )
            raise UsageError(
                f"data.path={self.folder} has no samples of split {split!r}; it has: {known}. "
                "Name one of these, or index shards called SPLIT-000000.tar"
            )
        return chosen

    def class_counts(self, split: str, num_classes: int) -> Int64[Tensor, " C"]:
        """Images of each of the classes 0..C-1 in a split."""
        ids = self.class_id[self.select(split)]
        counts = np.bincount(ids[ids < num_classes], minlength=num_classes)
        return torch.from_numpy(counts.astype(np.int64))

    def check_labels(self, split: str, num_classes: int) -> None:
        """Refuse a split that holds a class which a classifier of `num_classes` does not have.

        Raises:
            UsageError: names the first such sample.
        """
        chosen = self.select(split)
        outside = chosen[self.class_id[chosen] >= num_classes]
        if len(outside):
            first = int(outside[0])
            class_id = int(self.class_id[first])
            raise UsageError(
                f"shard {self.shards[self.shard[first]]}: key {self.key(first)} has class "
                f"{class_id} ({self.class_names[class_id]}), outside the classifier's "
                f"0..{num_classes - 1}; set data.num_classes=0 (this data set trains "
                f"{self.num_classes}) or correct data.split"
            )


def load_index(folder: str | Path) -> Index:
    """Read the index of a data set folder and check that its tars are those that were indexed.

    Costs one `stat` per shard and about 35 bytes of memory per sample.

    Raises:
        UsageError: if the folder is missing, not indexed, damaged, or a tar is missing or has
            another size than when it was indexed.
    """
    if not str(folder):
        raise UsageError("data.path is empty; set it to the folder of a packed data set")
    root = Path(folder)
    metadata = _read_metadata(root)
    recorded, columns = _read_columns(root)
    if recorded != metadata["fingerprint"]:
        raise UsageError(
            f"data.path={root}: {INDEX_FILE} and {DATASET_FILE} are of different data sets "
            f"(fingerprints {recorded[:12]} and {metadata['fingerprint'][:12]}); {_remedy(root)}"
        )
    _check_shards(root, metadata["shards"])
    return Index(
        folder=root,
        shards=tuple(shard["name"] for shard in metadata["shards"]),
        split_names=tuple(metadata["split_names"]),
        num_classes=metadata["num_classes"],
        fingerprint=metadata["fingerprint"],
        metadata=metadata,
        **columns,
    )


_COLUMNS = ["split", "class_id", "shard", "offset", "size", "extension", "checksum"]


def _read_columns(root: Path) -> tuple[str, dict[str, np.ndarray]]:
    """The fingerprint that the index states, and its columns without the keys.

    One column at a time, and pyarrow's pages given back: read at once, 2.5 million samples held 0.2
    GB more than their arrays (2026-11), in every worker.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(root / INDEX_FILE) as file:
            recorded = (file.schema_arrow.metadata or {}).get(b"fingerprint", b"").decode()
            columns = {name: file.read([name])[name].to_numpy() for name in _COLUMNS}
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"data.path={root}: cannot read {INDEX_FILE} ({reason}); {_remedy(root)}"
        ) from None
    pyarrow.default_memory_pool().release_unused()
    return recorded, columns


def _remedy(root: Path) -> str:
    return f"run `dist-dml index {root}`"


def _read_metadata(root: Path) -> dict[str, Any]:
    if not root.is_dir():
        raise UsageError(
            f"data.path={root}: no such folder; pack one (`dist-dml pack glyphs {root}`) "
            "or correct data.path"
        )
    if not (root / DATASET_FILE).is_file() or not (root / INDEX_FILE).is_file():
        if not any(root.glob("*.tar")):
            raise UsageError(
                f"data.path={root}: holds no shards (*.tar); correct data.path, or pack a data "
                f"set there and run `dist-dml index {root}`"
            )
        raise UsageError(f"data.path={root}: its shards have no index; {_remedy(root)}")
    try:
        metadata = json.loads((root / DATASET_FILE).read_text(encoding="utf-8"))
        version = metadata["format_version"]
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"data.path={root}: {DATASET_FILE} is damaged; {_remedy(root)}") from None
    if version != FORMAT_VERSION:
        raise UsageError(
            f"data.path={root}: format version {version}, this program reads {FORMAT_VERSION}; "
            f"{_remedy(root)}"
        )
    return metadata


def _check_shards(root: Path, shards: list[dict[str, Any]]) -> None:
    """Offsets into a tar that has changed would read other bytes."""
    for shard in shards:
        path = root / shard["name"]
        try:
            size = os.stat(path).st_size
        except OSError:
            raise UsageError(
                f"data.path={root}: shard {shard['name']} is missing; bring it back or "
                f"{_remedy(root)}"
            ) from None
        if size != shard["bytes"]:
            raise UsageError(
                f"data.path={root}: shard {shard['name']} has {size} bytes and was indexed with "
                f"{shard['bytes']}; {_remedy(root)}"
            )
