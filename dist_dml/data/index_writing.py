"""The files of an index from the scans of its shards: `dataset.json` is the last to appear."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_dml.data.index_reading import CLASSES_FILE, DATASET_FILE, FORMAT_VERSION, INDEX_FILE
from dist_dml.data.labels import TRAIN, Classes
from dist_dml.data.parquet_files import write_parquet
from dist_dml.data.scanning import COLUMNS, ShardScan
from dist_dml.data.shard_files import ShardFile
from dist_dml.whole_files import write_json

LEFT_OUT_FILE = "left_out.parquet"


def write_index(
    root: Path,
    shards: Sequence[ShardFile],
    splits: Sequence[str],
    scans: Sequence[ShardScan],
    classes: Classes,
    source: Mapping[str, Any],
) -> None:
    """Write `index.parquet`, `classes.parquet`, `left_out.parquet` and `dataset.json`.

    Args:
        root: folder of the index.
        shards: of the data set.
        splits: the split of each shard.
        scans: of each shard.
        classes: of all samples.
        source: see `build_index`.
    """
    import pyarrow

    split_names = sorted(set(splits))
    columns = {name: np.concatenate([scan.columns[name] for scan in scans]) for name in COLUMNS}
    counts = [len(scan.keys) for scan in scans]
    codes = np.array([split_names.index(split) for split in splits], np.int8)
    columns |= {
        "shard": np.repeat(np.arange(len(shards), dtype=np.int32), counts),
        "split": np.repeat(codes, counts),
        "class_id": classes.class_id,
    }
    metadata: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "source": dict(source),
        "num_classes": classes.num_training,
        "num_classes_all": len(classes.names),
        "num_samples": sum(counts),
        "samples_per_split": {
            name: int(np.sum(columns["split"] == i)) for i, name in enumerate(split_names)
        },
        "split_names": split_names,
        "shards": [s.record(n) for s, n in zip(shards, counts, strict=True)],
    }
    left_out = Counter(sample.reason for scan in scans for sample in scan.left_out)
    if left_out:
        metadata["left_out"] = dict(sorted(left_out.items()))
    metadata["fingerprint"] = _fingerprint(metadata, classes.names, scans, columns)
    metadata["layout"] = _layout(shards, columns)
    stamp = {name: metadata[name] for name in ("fingerprint", "layout")}
    keys = pyarrow.chunked_array([scan.keys for scan in scans], pyarrow.string())
    write_parquet(root / INDEX_FILE, pyarrow.table({"key": keys, **columns}), stamp)
    table = _class_table(classes, columns["split"], split_names)
    write_parquet(root / CLASSES_FILE, table, stamp)
    _write_left_out(root, shards, scans, stamp)
    write_json(root / DATASET_FILE, metadata)


def _fingerprint(
    metadata: Mapping[str, Any],
    names: Sequence[str],
    scans: Sequence[ShardScan],
    columns: Mapping[str, np.ndarray],
) -> str:
    """SHA-256 of what a run can notice of a data set: not of offsets, nor of shard names."""
    digest = hashlib.sha256()
    header = [metadata[k] for k in ("format_version", "source", "num_classes", "split_names")]
    digest.update(json.dumps([header, list(names)], sort_keys=True).encode())
    for scan in scans:
        digest.update(("\n".join(scan.keys.to_pylist()) + "\n").encode())
    for name in ("split", "class_id", "size", "checksum"):
        digest.update(np.ascontiguousarray(columns[name]).tobytes())
    return digest.hexdigest()


def _layout(shards: Sequence[ShardFile], columns: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of what the fingerprint leaves out: two indexes of the same samples, cut otherwise.

    An interrupted run leaves the files of both; this tells them apart.
    """
    digest = hashlib.sha256(json.dumps([[s.name, s.size] for s in shards]).encode())
    for name in ("shard", "offset"):
        digest.update(np.ascontiguousarray(columns[name]).tobytes())
    return digest.hexdigest()


def _class_table(classes: Classes, split: np.ndarray, split_names: Sequence[str]) -> Any:
    """A pyarrow table of a row per class: home split (`train`, or its first) and images there."""
    import pyarrow

    total = len(classes.names)
    per_split = np.stack(
        [
            np.bincount(classes.class_id[split == i], minlength=total)
            for i in range(len(split_names))
        ]
    )
    home = np.argmax(per_split > 0, axis=0)
    if TRAIN in split_names:
        home[: classes.num_training] = split_names.index(TRAIN)
    return pyarrow.table(
        {
            "class_id": np.arange(total),
            "name": list(classes.names),
            "split": [split_names[i] for i in home],
            "num_samples": per_split[home, np.arange(total)],
        }
    )


def _write_left_out(
    root: Path,
    shards: Sequence[ShardFile],
    scans: Sequence[ShardScan],
    stamp: Mapping[str, str],
) -> None:
    """List the samples that are not in the index; no file if there are none."""
    import pyarrow

    rows = [
        (shard.name, sample.key, sample.offset, sample.reason)
        for shard, scan in zip(shards, scans, strict=True)
        for sample in scan.left_out
    ]
    path = root / LEFT_OUT_FILE
    if not rows:
        path.unlink(missing_ok=True)
        return
    names, keys, offsets, reasons = zip(*rows, strict=True)
    columns = {"shard": names, "key": keys, "offset": offsets, "reason": reasons}
    write_parquet(path, pyarrow.table({k: list(v) for k, v in columns.items()}), stamp)
