"""What the scan of one shard found, kept: a shard that has not changed is not read again.

`sidecars/SHARD.tar.parquet` in the folder of the index has a row per sound sample: key, text of the
label, extension, place, CRC-32, width and height of the image, places of `.cls` and `.json`. Its
metadata say which bytes it describes and what was left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dist_dml.data.parquet_files import write_parquet
from dist_dml.data.scanning import COLUMNS, LeftOut, ShardScan
from dist_dml.data.shards import IMAGE_EXTENSIONS

FOLDER = "sidecars"
VERSION = 1
"""Changes with what a scan finds: sidecars of another version are not used."""


def sidecar_path(root: Path, name: str) -> Path:
    """Where the sidecar of a shard lies.

    Shards of another folder or of an object store may share a name: theirs starts with a digest.

    Args:
        root: folder of the index.
        name: of the shard, as in `dataset.json`: a path below `root`, another path, or a URL.
    """
    base = name.partition("?")[0].rpartition("/")[2]
    if base != name:
        base = f"{hashlib.sha256(name.encode()).hexdigest()[:8]}-{base}"
    return root / FOLDER / f"{base}.parquet"


def write_sidecar(path: Path, scan: ShardScan, made_from: Mapping[str, Any]) -> None:
    """Keep a scan.

    Args:
        path: from `sidecar_path`.
        scan: of the shard.
        made_from: size, time and tag of the shard, and the options of the scan.
    """
    import pyarrow

    columns: dict[str, Any] = {"key": scan.keys, "label": scan.labels, **scan.columns}
    columns["extension"] = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array(scan.columns["extension"]), list(IMAGE_EXTENSIONS)
    )
    stamp = {
        "made_from": _text(made_from),
        "left_out": json.dumps([asdict(sample) for sample in scan.left_out]),
    }
    path.parent.mkdir(exist_ok=True)
    write_parquet(path, pyarrow.table(columns), stamp)


def read_sidecar(path: Path, made_from: Mapping[str, Any]) -> ShardScan | None:
    """The scan that was kept, or None if there is none of the same bytes with the same options.

    A damaged sidecar counts as none: everything in it can be found again.
    """
    import pyarrow
    from pyarrow.compute import index_in  # pyright: ignore[reportAttributeAccessIssue]
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            stamp = file.schema_arrow.metadata or {}
            if stamp.get(b"made_from", b"").decode() != _text(made_from):
                return None
            left_out = tuple(LeftOut(**row) for row in json.loads(stamp[b"left_out"]))
            table = file.read()
        extension = table["extension"].combine_chunks().cast(pyarrow.string())
        codes = index_in(extension, pyarrow.array(IMAGE_EXTENSIONS)).to_numpy(zero_copy_only=False)
        columns = {
            name: np.asarray(
                codes if name == "extension" else table[name].to_numpy(),
                dtype,
            )
            for name, dtype in COLUMNS.items()
        }
        keys, labels = (table[name].combine_chunks() for name in ("key", "label"))
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException):
        return None
    return ShardScan(keys, labels, columns, left_out)


def _text(made_from: Mapping[str, Any]) -> str:
    return json.dumps({"version": VERSION, **made_from}, sort_keys=True)
