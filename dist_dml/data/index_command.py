"""`dist-dml index`: scan shards, number the classes, write the index of a data set."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dist_dml.data.dali_export import export_dali
from dist_dml.data.foreign_index import FOREIGN, Foreign
from dist_dml.data.index import Index, load_index, load_unchecked
from dist_dml.data.index_writing import LEFT_OUT_FILE, write_index
from dist_dml.data.labels import TRAIN, number_classes
from dist_dml.data.progress import ProgressLine
from dist_dml.data.quarantine import QUARANTINE_FILE, quarantined_ids
from dist_dml.data.scanning import ShardScan
from dist_dml.data.shard_files import (
    ScanJob,
    ShardFile,
    find_shards,
    local_shards,
    remote_shards,
    scan_all,
)
from dist_dml.data.sidecar import sidecar_path
from dist_dml.errors import UsageError

_SPLIT = re.compile(r"^(.+)-\d{6,}\.tar$")
_REMOTE_PROCESSES = 4
"""Shards that are streamed at a time, at least: one connection waits more than it works."""


@dataclass(frozen=True)
class ScanOptions:
    """How shards are scanned.

    Attributes:
        label_key: key of the label in `.json` members, or column of img2dataset's Parquet.
        start: the kind of foreign index that the scan starts from.
        damaged: `refuse` the data set, or `skip` the samples, which are counted and listed.
        rescan: read shards again that have not changed.
    """

    label_key: str = "label"
    start: Foreign | None = None
    damaged: Literal["refuse", "skip"] = "refuse"
    rescan: bool = False


def split_of(name: str) -> str:
    """The split that a tar's name states: `seen-000001.tar` is `seen`, any other form `train`."""
    match = _SPLIT.match(name)
    return match.group(1) if match else TRAIN


def build_index(
    folder_or_shards: str | Path | Sequence[str | Path],
    num_classes: int = 0,
    label_key: str = "label",
    out: str | Path | None = None,
    source: Mapping[str, Any] | None = None,
    processes: int = 1,
    options: ScanOptions | None = None,
) -> Index:
    """Scan shards and write `index.parquet`, `classes.parquet` and `dataset.json`.

    The split of a sample is its shard's (`split_of`), its label the text of its `.cls` or, without
    one, `json[label_key]`. Class ids: see `number_classes`. Each file appears whole, `dataset.json`
    last: an interrupted run leaves the old index, or one that `load_index` refuses. A shard of the
    same size and time as before is not read again: its scan was kept beside the index.

    Args:
        folder_or_shards: a folder of tars, or tars.
        num_classes: 0 numbers the labels; above 0 training labels are integers below it, taken as
            they are.
        label_key: key of the label in the `.json` member.
        out: folder of the index; by default that of the shards.
        source: what made the shards (packer, version, seed): part of `dataset.json` and of the
            fingerprint.
        processes: scanning processes, a shard each.
        options: how shards are scanned; its `label_key` counts then.

    Raises:
        UsageError: a shard cannot be scanned, or a label is missing or outside the classes.
    """
    paths, home = find_shards(folder_or_shards)
    root = Path(out) if out is not None else home
    root.mkdir(parents=True, exist_ok=True)
    how = options if options is not None else ScanOptions(label_key)
    return _index(root, local_shards(paths, root), num_classes, source, processes, how)


def build_remote_index(
    pattern: str,
    out: str | Path,
    num_classes: int = 0,
    source: Mapping[str, Any] | None = None,
    processes: int = _REMOTE_PROCESSES,
    options: ScanOptions | None = None,
) -> Index:
    """`build_index` for shards at URLs: each is streamed once, in bounded memory, nothing is kept.

    Args:
        pattern: folder, file or pattern of URLs; see `remote_shards`.
        out: folder of the index.
        num_classes: as for `build_index`.
        source: as for `build_index`.
        processes: shards that are streamed at a time.
        options: how shards are scanned.

    Raises:
        UsageError: as `build_index`.
        RunError: the storage failed.
    """
    how = options if options is not None else ScanOptions()
    if how.start is not None:
        raise UsageError(f"--from {how.start} reads files beside local tars; leave it out")
    shards = remote_shards(pattern)
    root = Path(out)
    root.mkdir(parents=True, exist_ok=True)
    return _index(root, shards, num_classes, source, processes, how)


def _index(
    root: Path,
    shards: Sequence[ShardFile],
    num_classes: int,
    source: Mapping[str, Any] | None,
    processes: int,
    options: ScanOptions,
) -> Index:
    scans = _scan(root, shards, processes, options)
    if not any(len(scan.keys) for scan in scans):
        reasons = Counter(sample.reason for scan in scans for sample in scan.left_out)
        why = f" (left out: {_counts(reasons)})" if reasons else ""
        raise UsageError(f"{root}: its shards hold no samples{why}; pack them again")
    splits = [split_of(shard.base) for shard in shards]
    named = [shard.shown for shard in shards]
    classes = number_classes(named, splits, [(s.keys, s.labels) for s in scans], num_classes)
    write_index(root, shards, splits, scans, classes, source if source else {"kind": "shards"})
    _drop_old_quarantine(root)
    return load_index(root)


def _scan(
    root: Path, shards: Sequence[ShardFile], processes: int, options: ScanOptions
) -> list[ShardScan]:
    jobs = [
        ScanJob(
            shard,
            sidecar_path(root, shard.name),
            options.label_key,
            options.start,
            options.rescan,
            options.damaged,
        )
        for shard in shards
    ]
    mebibytes = [shard.size / 2**20 for shard in shards]
    progress = ProgressLine("index", sum(mebibytes), "MiB")
    scans = []
    for scan, size in zip(scan_all(jobs, processes), mebibytes, strict=True):
        scans.append(scan)
        progress.advance(size)
    progress.finish()
    return scans


def _drop_old_quarantine(root: Path) -> None:
    """The sample ids of a quarantine are those of one index."""
    if not (root / QUARANTINE_FILE).exists():
        return
    index = load_unchecked(root)
    try:
        quarantined_ids(root, index.fingerprint, len(index))
    except UsageError:
        (root / QUARANTINE_FILE).unlink()
        print(
            f"note: {QUARANTINE_FILE} was of the index before and is deleted; run `dist-dml verify "
            f"{root} --fix` to find the damaged samples again"
        )


def describe(index: Index) -> str:
    """One line: samples per split, classes, shards, what is left out, fingerprint."""
    splits = ", ".join(f"{k} {v:,}" for k, v in index.metadata["samples_per_split"].items())
    missing = ""
    if index.metadata.get("left_out"):
        missing += f", left out: {_counts(index.metadata['left_out'])}"
    if len(index.quarantined):
        missing += f", in quarantine: {len(index.quarantined):,}"
    return (
        f"{index.folder}: {len(index):,} samples ({splits}), {index.num_classes:,} training "
        f"classes of {index.metadata['num_classes_all']:,}, {len(index.shards)} shards{missing}, "
        f"fingerprint {index.fingerprint[:12]}"
    )


def _counts(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dist-dml index`."""
    parser.add_argument("shards", nargs="*", help="folder of tars, or tars")
    parser.add_argument(
        "--remote", metavar="URL", help="s3://, gs://, http(s)://: folder, pattern with *, {0..9}"
    )
    parser.add_argument("--out", help="folder of the index (default: that of the shards)")
    parser.add_argument(
        "--num-classes", type=int, default=0, help="labels are integers below this; 0 numbers them"
    )
    parser.add_argument("--label-key", default="label", help="key of the label in .json members")
    parser.add_argument(
        "--processes", type=int, default=1, help="scanning processes (remote: at least 4)"
    )
    parser.add_argument("--rescan", action="store_true", help="read unchanged shards again")
    parser.add_argument(
        "--damaged",
        choices=("refuse", "skip"),
        default="refuse",
        help="skip leaves damaged samples out, counts and lists them (default: refuse)",
    )
    parser.add_argument(
        "--from",
        dest="start",
        choices=tuple(FOREIGN),
        help="check against this tool's index beside each tar; img2dataset also gives the labels",
    )
    parser.add_argument(
        "--export", choices=("dali",), help="write this tool's index of an indexed folder"
    )


def run(arguments: argparse.Namespace) -> int:
    """`dist-dml index`. Returns the exit code."""
    options = ScanOptions(arguments.label_key, arguments.start, arguments.damaged, arguments.rescan)
    if bool(arguments.shards) == bool(arguments.remote):
        raise UsageError("give a folder of tars, or tars, or --remote URL")
    if arguments.export:
        return _run_export(arguments)
    if arguments.remote:
        if not arguments.out:
            raise UsageError("--remote needs --out, the folder of the index")
        processes = max(arguments.processes, _REMOTE_PROCESSES)
        index = build_remote_index(
            arguments.remote, arguments.out, arguments.num_classes, None, processes, options
        )
    else:
        index = build_index(
            arguments.shards,
            arguments.num_classes,
            arguments.label_key,
            arguments.out,
            None,
            arguments.processes,
            options,
        )
    print(describe(index))
    _print_notes(index)
    return 0


def _run_export(arguments: argparse.Namespace) -> int:
    if len(arguments.shards) != 1:
        raise UsageError("--export takes the folder of an index, one")
    written = export_dali(load_index(arguments.shards[0]))
    print(f"{arguments.shards[0]}: {len(written)} indexes written, {written[0].name} first")
    return 0


def _print_notes(index: Index) -> None:
    if not index.num_classes:
        print(f"note: no shard is called {TRAIN}-000000.tar, so there are no training classes")
    if index.metadata.get("left_out"):
        print(f"note: what was left out, and why, is listed in {index.folder / LEFT_OUT_FILE}")
    unknown = index.num_without_size()
    if unknown:
        print(
            f"note: {unknown:,} images have no header of a JPEG, PNG or WebP; look at them with "
            f"`dist-dml verify {index.folder}`"
        )
