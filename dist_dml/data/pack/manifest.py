"""`dist-dml pack manifest`: images that a CSV or Parquet file lists by path or URL.

    path,label,split,photographer          or url,label,...; other columns go to the `.json`
    images/1.jpg,red fox,train,Ann

Paths start from the manifest's folder. Without a column `split`, whole classes are divided as `pack
folder` does. Images behind http(s) URLs that cannot be fetched are left out, counted and listed.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dist_dml.data.index import Index
from dist_dml.data.index_command import describe
from dist_dml.data.pack.columns import (
    add_common_arguments,
    file_hash,
    present,
    shuffled_shards,
)
from dist_dml.data.pack.division import (
    add_division_arguments,
    check_classes,
    divide,
    renamed_splits,
)
from dist_dml.data.pack.image_files import Tree, encoders
from dist_dml.data.pack.manifest_rows import (
    LABEL,
    PATH,
    Manifest,
    ManifestColumns,
    read_manifest,
)
from dist_dml.data.pack.manifest_shards import forget_failed, render_shard, report_failed
from dist_dml.data.pack.url_images import Fetching, is_url
from dist_dml.data.pack.writing import write_shards
from dist_dml.data.retry import Retry
from dist_dml.errors import UsageError

VERSION = 1
_TAR_BYTES_PER_SAMPLE = 3072


@dataclass(frozen=True)
class Division:
    """How the rows of a manifest are divided.

    Attributes:
        seed: of division and order.
        test_fraction: share of the classes that are `test`, where there is no column of splits.
        seen_per_class: held-out images of a training class, likewise.
        splits: `theirs=ours,...`: the splits of the column that are packed; empty takes all.
    """

    seed: int = 0
    test_fraction: float = 0.5
    seen_per_class: int = 2
    splits: str = ""


_DIVISION, _COLUMNS, _FETCHING = Division(), ManifestColumns(), Fetching()


def pack_manifest(
    src: str | Path,
    out: str | Path,
    division: Division = _DIVISION,
    columns: ManifestColumns = _COLUMNS,
    root: str | Path = "",
    anywhere: bool = False,
    resize: int = 0,
    shard_samples: int = 2048,
    processes: int = 0,
    skip_missing: bool = False,
    fetching: Fetching = _FETCHING,
    max_failed: float = 0.2,
    retry_failed: bool = False,
) -> Index:
    """Pack the images of a manifest; the key of a sample is the number of its row.

    Args:
        src: a `.csv`, `.tsv` or `.parquet` file.
        out: data set folder.
        division: see `Division`.
        columns: names of the columns.
        root: folder that relative paths start from; by default the manifest's.
        anywhere: whether paths may lead out of it.
        resize: short side of the stored image in pixels, if it is longer; 0 copies the bytes.
        shard_samples: images of a tar.
        processes: writing processes; 0 takes one per core.
        skip_missing: leave rows whose file is not there out.
        fetching: how URLs are asked for.
        max_failed: share of a shard's URLs that may fail; above it the pack stops.
        retry_failed: write the shards anew that are without some images.

    Raises:
        UsageError: the manifest or a row is not as expected, a file is missing, or a class is on
            both sides.
        RunError: a file is no image, or too many URLs failed.
    """
    path, home = Path(src), Path(root) if str(root) else Path(src).parent
    tree = Tree(home.resolve())
    manifest = read_manifest(path, columns, tree.path, anywhere)
    splits, size = present(tree, _divided(path, manifest, division), _path_of, skip_missing)
    source = {
        "kind": "manifest",
        "version": VERSION,
        "name": path.name,
        **vars(division),
        "resize": resize,
        "shard_samples": shard_samples,
        "images": size,
        "largest_bytes": fetching.largest_bytes,
        "files": {path.name: file_hash(path)},
    }
    if retry_failed:
        forget_failed(Path(out), source)
    shards = shuffled_shards(splits, division.seed, shard_samples)
    render = partial(render_shard, tree, resize, fetching, max_failed, Path(out))
    size += _TAR_BYTES_PER_SAMPLE * sum(map(len, splits.values()))
    index = write_shards(Path(out), shards, render, source, encoders(resize), size, processes)
    report_failed(Path(out), shards)
    return index


def _divided(path: Path, manifest: Manifest, division: Division) -> dict[str, np.ndarray]:
    """The rows by split: by their column, or by class."""
    labels, classes = np.unique(manifest.rows[:, LABEL], return_inverse=True)
    if not manifest.split_names:
        if division.splits:
            raise UsageError(f"--splits={division.splits}: {path} has no column of splits")
        chosen = divide(
            classes,
            len(labels),
            division.seed,
            division.test_fraction,
            division.seen_per_class,
            str(path),
        )
        return {name: manifest.rows[rows] for name, rows in chosen.items()}
    names = renamed_splits(division.splits, manifest.split_names, str(path))
    codes = {new: manifest.split_names.index(old) for old, new in names.items()}
    found = {name: set(labels[classes[manifest.split == c]].tolist()) for name, c in codes.items()}
    check_classes(str(path), found)
    return {name: manifest.rows[manifest.split == code] for name, code in codes.items()}


def _path_of(split: str, row: Any) -> str:
    path = str(row[PATH])
    return "" if is_url(path) else path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dist-dml pack manifest`."""
    parser.add_argument("src", help="manifest: .csv, .tsv or .parquet with path (or url) and label")
    parser.add_argument("out", help="folder of the new data set")
    for name in ("path", "label", "split"):
        parser.add_argument(
            f"--{name}-column", default="label" if name == "label" else "", help="its name"
        )
    parser.add_argument("--splits", default="", help="theirs=ours,...: splits that are packed")
    parser.add_argument("--root", default="", help="folder of the paths (that of the manifest)")
    parser.add_argument("--anywhere", action="store_true", help="paths may lead out of it")
    parser.add_argument("--skip-missing", action="store_true", help="leave out files not there")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds of one download")
    parser.add_argument("--max-mebibytes", type=int, default=32, help="largest download")
    parser.add_argument("--retries", type=int, default=2, help="further attempts of a download")
    parser.add_argument("--connections", type=int, default=16, help="downloads of a process")
    parser.add_argument("--max-failed", type=float, default=0.2, help="share of URLs that may fail")
    parser.add_argument("--retry-failed", action="store_true", help="write their shards anew")
    add_division_arguments(parser, test_fraction=0.5, seen_per_class=2)
    add_common_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """`dist-dml pack manifest`. Returns the exit code."""
    a = arguments
    for option, value, fits in (
        ("--timeout", a.timeout, a.timeout > 0),
        ("--max-mebibytes", a.max_mebibytes, a.max_mebibytes > 0),
        ("--retries", a.retries, a.retries >= 0),
        ("--connections", a.connections, a.connections > 0),
    ):
        if not fits:
            raise UsageError(f"{option}={value}: too small; give a larger number")
    index = pack_manifest(
        a.src,
        a.out,
        Division(a.seed, a.test_fraction, a.seen_per_class, a.splits),
        ManifestColumns(a.path_column, a.label_column, a.split_column),
        a.root,
        a.anywhere,
        a.resize,
        a.shard_samples,
        a.processes,
        a.skip_missing,
        Fetching(a.timeout, a.max_mebibytes << 20, Retry(a.retries, 1.0), a.connections),
        a.max_failed,
        a.retry_failed,
    )
    print(describe(index))
    return 0
