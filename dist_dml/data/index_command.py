"""`dist-dml index`: scan shards, number the classes, write the index of a data set."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from dist_dml.data.index import (
    CLASSES_FILE,
    DATASET_FILE,
    EXTENSIONS,
    FORMAT_VERSION,
    INDEX_FILE,
    Index,
    load_index,
)
from dist_dml.data.labels import TRAIN, Classes, number_classes, read_label
from dist_dml.data.progress import ProgressLine
from dist_dml.data.shards import scan_shard
from dist_dml.errors import UsageError
from dist_dml.whole_files import write_json

_SPLIT = re.compile(r"^(.+)-\d{6,}\.tar$")


def split_of(name: str) -> str:
    """The split that a tar's name states: `seen-000001.tar` is `seen`, any other form `train`."""
    match = _SPLIT.match(name)
    return match.group(1) if match else TRAIN


@dataclass(frozen=True)
class _Scan:
    """What one shard contributes, in columns; `labels` are texts, not yet class ids.

    Keys and labels are pyarrow arrays of strings, which take a fifth of the memory of lists and are
    sent between processes as one block.
    """

    keys: Any
    labels: Any
    columns: dict[str, np.ndarray]


def _scan(path: Path, label_key: str) -> _Scan:
    import pyarrow

    samples = scan_shard(path)
    labels, checksums = [], []
    with path.open("rb") as stream:
        for sample in samples:
            labels.append(read_label(stream, path, sample, label_key))
            stream.seek(sample.image.offset)
            checksums.append(zlib.crc32(stream.read(sample.image.size)))
    absent = {name: -1 for name in ("offset", "size")}

    def column(member: str, field: str, dtype: type) -> np.ndarray:
        values = [
            getattr(s.labels[member], field) if member in s.labels else absent[field]
            for s in samples
        ]
        return np.array(values, dtype)

    return _Scan(
        keys=pyarrow.array([sample.key for sample in samples], pyarrow.string()),
        labels=pyarrow.array(labels, pyarrow.string()),
        columns={
            "offset": np.array([s.image.offset for s in samples], np.int64),
            "size": np.array([s.image.size for s in samples], np.int64),
            "extension": np.array([EXTENSIONS.index(s.image.extension) for s in samples], np.int8),
            "checksum": np.array(checksums, np.uint32),
            "cls_offset": column("cls", "offset", np.int64),
            "cls_size": column("cls", "size", np.int64),
            "json_offset": column("json", "offset", np.int64),
            "json_size": column("json", "size", np.int64),
        },
    )


def find_shards(sources: str | Path | Sequence[str | Path]) -> tuple[list[Path], Path]:
    """The tars of one folder, or the given tars, sorted by name; and the folder of the first.

    Raises:
        UsageError: if a path does not exist, or there is no tar.
    """
    paths = [Path(p) for p in ([sources] if isinstance(sources, (str, Path)) else sources)]
    for path in paths:
        if not path.exists():
            raise UsageError(f"shards {path}: no such file or folder; correct the path")
    shards = [s for path in paths for s in (path.glob("*.tar") if path.is_dir() else [path])]
    if not shards:
        raise UsageError(f"{paths[0] if paths else '.'}: holds no shards (*.tar); nothing to index")
    shards = sorted(set(shards), key=lambda shard: (shard.name, str(shard)))
    return shards, (paths[0] if paths[0].is_dir() else paths[0].parent)


def build_index(
    folder_or_shards: str | Path | Sequence[str | Path],
    num_classes: int = 0,
    label_key: str = "label",
    out: str | Path | None = None,
    source: Mapping[str, Any] | None = None,
    processes: int = 1,
) -> Index:
    """Scan shards and write `index.parquet`, `classes.parquet` and `dataset.json`.

    The split of a sample is its shard's (`split_of`), its label the text of its `.cls` or, without
    one, `json[label_key]`. Class ids: see `number_classes`. Each file appears whole, `dataset.json`
    last: an interrupted run leaves the old index, or one that `load_index` refuses.

    Args:
        folder_or_shards: a folder of tars, or tars.
        num_classes: 0 numbers the labels; above 0 training labels are integers below it, taken as
            they are.
        label_key: key of the label in the `.json` member.
        out: folder of the index; by default that of the shards.
        source: what made the shards (packer, version, seed): part of `dataset.json` and of the
            fingerprint.
        processes: scanning processes, a shard each.

    Raises:
        UsageError: a shard cannot be scanned, or a label is missing or outside the classes.
    """
    shards, home = find_shards(folder_or_shards)
    root = Path(out) if out is not None else home
    root.mkdir(parents=True, exist_ok=True)
    mebibytes = [shard.stat().st_size / 2**20 for shard in shards]
    progress = ProgressLine("index", sum(mebibytes), "MiB")
    scans = []
    for scan, size in zip(_scan_all(shards, label_key, processes), mebibytes, strict=True):
        scans.append(scan)
        progress.advance(size)
    progress.finish()
    if not any(len(scan.keys) for scan in scans):
        raise UsageError(f"{home}: its shards hold no samples; pack them again")

    splits = [split_of(shard.name) for shard in shards]
    split_names = sorted(set(splits))
    classes = number_classes(shards, splits, [(s.keys, s.labels) for s in scans], num_classes)
    columns = {
        name: np.concatenate([scan.columns[name] for scan in scans]) for name in scans[0].columns
    }
    counts = [len(scan.keys) for scan in scans]
    columns["shard"] = np.repeat(np.arange(len(shards), dtype=np.int32), counts)
    codes = np.array([split_names.index(split) for split in splits], np.int8)
    columns["split"] = np.repeat(codes, counts)
    columns["class_id"] = classes.class_id
    metadata = {
        "format_version": FORMAT_VERSION,
        "source": dict(source) if source else {"kind": "shards"},
        "num_classes": classes.num_training,
        "num_classes_all": len(classes.names),
        "num_samples": sum(counts),
        "samples_per_split": {
            name: int(np.sum(columns["split"] == i)) for i, name in enumerate(split_names)
        },
        "split_names": split_names,
        "shards": [
            {"name": os.path.relpath(s, root), "bytes": s.stat().st_size, "samples": n}
            for s, n in zip(shards, counts, strict=True)
        ],
    }
    metadata["fingerprint"] = _fingerprint(metadata, classes.names, scans, columns)
    _write(root, metadata, scans, columns, _class_table(classes, columns["split"], split_names))
    return load_index(root)


def _scan_all(shards: list[Path], label_key: str, processes: int) -> Iterator[_Scan]:
    """Yield a scan per shard, in order."""
    if processes <= 1 or len(shards) == 1:
        yield from map(_scan, shards, repeat(label_key))
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("forkserver")) as pool:
        yield from pool.map(_scan, shards, repeat(label_key))


def _fingerprint(
    metadata: Mapping[str, Any],
    names: Sequence[str],
    scans: Sequence[_Scan],
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


def _write(
    root: Path,
    metadata: Mapping[str, Any],
    scans: Sequence[_Scan],
    columns: Mapping[str, np.ndarray],
    class_table: Any,
) -> None:
    import pyarrow
    import pyarrow.parquet

    keys = pyarrow.chunked_array([scan.keys for scan in scans])
    table = pyarrow.table({"key": keys, **columns})
    stamp = {"fingerprint": metadata["fingerprint"]}
    for name, content in ((INDEX_FILE, table), (CLASSES_FILE, class_table)):
        temporary = root / (name + ".tmp")
        pyarrow.parquet.write_table(
            content.replace_schema_metadata(stamp), temporary, compression="zstd"
        )
        os.replace(temporary, root / name)
    write_json(root / DATASET_FILE, metadata)


def describe(index: Index) -> str:
    """One line: samples per split, classes, shards, fingerprint."""
    splits = ", ".join(f"{k} {v:,}" for k, v in index.metadata["samples_per_split"].items())
    return (
        f"{index.folder}: {len(index):,} samples ({splits}), {index.num_classes:,} training "
        f"classes of {index.metadata['num_classes_all']:,}, {len(index.shards)} shards, "
        f"fingerprint {index.fingerprint[:12]}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dist-dml index`."""
    parser.add_argument("shards", nargs="+", help="folder of tars, or tars")
    parser.add_argument("--out", help="folder of the index (default: that of the shards)")
    parser.add_argument(
        "--num-classes", type=int, default=0, help="labels are integers below this; 0 numbers them"
    )
    parser.add_argument("--label-key", default="label", help="key of the label in .json members")
    parser.add_argument("--processes", type=int, default=1, help="scanning processes")


def run(arguments: argparse.Namespace) -> int:
    """`dist-dml index`. Returns the exit code."""
    sources = arguments.shards[0] if len(arguments.shards) == 1 else arguments.shards
    index = build_index(
        sources,
        arguments.num_classes,
        arguments.label_key,
        arguments.out,
        None,
        arguments.processes,
    )
    print(describe(index))
    if not index.num_classes:
        print(f"note: no shard is called {TRAIN}-000000.tar, so there are no training classes")
    return 0
