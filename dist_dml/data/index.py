"""The index of a data set: where every sample lies and which class it has, as columns.

A data set folder holds `index.parquet` (a row per sample), `classes.parquet` (a row per class) and
`dataset.json` (format version, source, counts, shards, fingerprint) beside its tars.
A *sample id* is the row number of the index, over all splits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int8, Int32, Int64, UInt32
from torch import Tensor

from dist_dml.credentials import expand, refuse_secret
from dist_dml.data.index_reading import (
    CLASSES_FILE,
    DATASET_FILE,
    INDEX_FILE,
    read_columns,
    read_metadata,
    read_texts,
)
from dist_dml.data.parquet_files import open_parquet
from dist_dml.data.quarantine import quarantined_fingerprint, quarantined_ids
from dist_dml.data.shard_changes import check_shards, is_url
from dist_dml.data.shards import IMAGE_EXTENSIONS
from dist_dml.errors import UsageError

EXTENSIONS = IMAGE_EXTENSIONS
"""The extension of code i, in the column `extension`."""


@dataclass(frozen=True, eq=False)
class JoinedParts:
    """Where the samples of several data sets come from that are one index."""

    class_names: tuple[str, ...]
    parts: tuple[tuple[Index, Int64[np.ndarray, " _"]], ...]
    """Of each, its index and those of its sample ids that are taken, one part after the other."""


@dataclass(frozen=True, eq=False)
class Index:
    """All samples of a data set. Arrays have one entry a sample, `N` in all.

    Attributes:
        folder: the data set folder; of a mixture, the first.
        shards: the tars: paths, relative to `folder` where they lie below it, or URLs.
        split_names: the split of code i.
        num_classes: training classes; their ids are 0..num_classes-1.
        fingerprint: changes with keys, classes, splits, order, image bytes or source parameters,
            and not with the way the samples are cut into shards; also with the quarantine.
        metadata: the content of `dataset.json`.
        split: code of each sample's split.
        class_id: class of each sample.
        shard: position of its tar in `shards`.
        offset: first byte of its image inside the tar.
        size: bytes of its image.
        extension: code of its image's extension in `EXTENSIONS`.
        checksum: CRC-32 of its image's bytes.
        part: which data set of a mixture it is of, 0 being the first; None without a mixture.
        quarantined: sample ids, ascending, that are in no split.
        joined: of a mixture, where its samples come from.
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
    part: Int8[np.ndarray, " N"] | None = None
    quarantined: Int64[np.ndarray, " q"] = field(default_factory=lambda: np.zeros(0, np.int64))
    joined: JoinedParts | None = None

    def __len__(self) -> int:
        return len(self.class_id)

    @cached_property
    def _keys(self) -> Any:
        """A pyarrow column, read on first use: training needs no keys, and they are large."""
        return read_texts(self.folder, INDEX_FILE, "key")

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class in the catalogue, by class id; training classes come first."""
        if self.joined is not None:
            return self.joined.class_names
        return tuple(read_texts(self.folder, CLASSES_FILE, "name").to_pylist())

    def key(self, sample_id: int) -> str:
        """The WebDataset key of one sample."""
        row = int(sample_id)
        if self.joined is None:
            return self._keys[row].as_py()
        for index, ids in self.joined.parts:
            if row < len(ids):
                return index.key(int(ids[row]))
            row -= len(ids)
        raise IndexError(f"sample {sample_id} of {len(self)}")

    def keys(self, start: int, stop: int) -> list[str]:
        """The keys of the samples `start` to `stop`, of an index that is not joined."""
        assert self.joined is None, "the keys of a mixture lie in several files"
        return self._keys.slice(start, stop - start).to_pylist()

    def num_without_size(self) -> int:
        """Images whose headers state no size: no JPEG, PNG or WebP, or damaged. Reads the file."""
        with open_parquet(self.folder / INDEX_FILE) as file:
            if "width" not in file.schema_arrow.names:  # An index of before 2026-11.
                return 0
            return int(np.sum(file.read(["width"])["width"].to_numpy() == 0))

    def shard_location(self, shard: int) -> str:
        """Path or URL of the tar of code `shard`."""
        name = self.shards[shard]
        return name if is_url(name) else str(self.folder / name)

    def shard_path(self, shard: int) -> Path:
        """The tar of code `shard`, a local one."""
        assert not is_url(self.shards[shard]), "a remote shard has no path"
        return self.folder / self.shards[shard]

    def select(self, split: str) -> Int[np.ndarray, " n"]:
        """The sample ids of a split, ascending, without those in quarantine.

        Raises:
            UsageError: if the data set has no sample of that split.
        """
        code = self.split_names.index(split) if split in self.split_names else -1
        chosen = np.flatnonzero(self.split == code)
        if len(self.quarantined):
            chosen = chosen[~np.isin(chosen, self.quarantined, assume_unique=True)]
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

    Costs one `stat` per local shard, three reads per shard whose time is another than when it was
    indexed, and about 35 bytes of memory per sample. Remote shards are checked when they are
    fetched.

    Raises:
        UsageError: if the folder is missing, not indexed, damaged, or a tar is missing or another
            than the one that was indexed; if its quarantine is of another index.
    """
    index = load_unchecked(folder)
    ids = quarantined_ids(index.folder, index.fingerprint, len(index))
    columns = {name: getattr(index, name) for name in ("offset", "size", "checksum")}
    check_shards(index.folder, index.metadata["shards"], columns, ids)
    fingerprint = quarantined_fingerprint(index.fingerprint, ids)
    return replace(index, quarantined=ids, fingerprint=fingerprint)


def load_unchecked(folder: str | Path) -> Index:
    """Read an index without a look at its tars and its quarantine: for repairs, not for training.

    Raises:
        UsageError: if the folder is missing, not indexed, its index is damaged, or names a shard by
            a URL with a secret in it, which messages and reports would repeat.
    """
    if not str(folder):
        raise UsageError("data.path is empty; set it to the folder of a packed data set")
    root = Path(expand(str(folder), "data.path"))
    metadata = read_metadata(root)
    for shard in metadata["shards"]:
        refuse_secret(shard["name"], f"{root / DATASET_FILE}: the name of a shard")
    columns = read_columns(root, metadata)
    return Index(
        folder=root,
        shards=tuple(shard["name"] for shard in metadata["shards"]),
        split_names=tuple(metadata["split_names"]),
        num_classes=metadata["num_classes"],
        fingerprint=metadata["fingerprint"],
        metadata=metadata,
        **columns,  # pyright: ignore[reportArgumentType]
    )
